"""Recipes, losses, budgets, the divergence guard and the trainer."""

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

import fastnca
from fastnca.sound.metrics import grid_metrics
from fastnca.sound.spectrogram import analyze
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.training import optim as optim_module
from fastnca.training import trainer as trainer_module
from fastnca.training.divergence import CLIMBING, DIVERGING, RECENT, DivergenceGuard, TrainingDiverged
from fastnca.training.losses import OVERFLOW, RecipeLoss
from fastnca.training.optim import Soap
from fastnca.training.recipes import RECIPES, Recipe, find_recipe
from fastnca.training.trainer import MAX_SETBACKS, Budget, Trainer, Windows, damaged, time_octaves

BUDGET = Budget(epochs=10)
# Every epoch from the same seeds, and what it grew lives on.
SHORT = replace(RECIPES["default"], num_steps=6, seed_spacing=1, continue_share=0.0, restart_share=1.0)
# Windows of a state that lives on, of a sound of 24 frames.
LIVING = replace(RECIPES["default"], num_steps=5, window=10, continue_share=0.5, restart_share=0.3)


def longer(target):
    return target.with_grids(target.mel_db.repeat(1, 3), target.linear_db.repeat(1, 3))


def make_trainer(target, recipe=SHORT, budget=BUDGET, **options):
    return Trainer([target], recipe, budget, **options)


def judge(recipe, levels, targets):
    """The loss of levels, lists of (mel_db, linear_db), that overflow nothing."""
    levels, targets = (tuple(torch.stack(grids) for grids in zip(*pairs)) for pairs in (levels, targets))
    return RecipeLoss(recipe)(tuple(torch.zeros(1) for _ in levels), levels, targets)


class TestGuard:
    def test_the_lowest_losses_are_told(self):
        guard = DivergenceGuard()
        assert all(guard.record(loss) for loss in (3.0, 4.0, *[2.0] * (RECENT - 2)))  # there is nothing to compare with
        assert [guard.record(loss) for loss in (2.0, 9.0, 2.0, 0.5)] == [True, False, False, False]
        assert [guard.record(0.5) for _ in range(5)][-1]

    @pytest.mark.parametrize("loss", [math.nan, math.inf, 2.001 * DIVERGING])
    def test_explodes(self, loss):
        guard = DivergenceGuard()
        assert guard.exploded(loss) != math.isfinite(loss)
        guard.record(2.0)
        assert guard.exploded(loss) and not guard.exploded(2.0 * DIVERGING)

    def test_climbs_slowly(self):
        guard = DivergenceGuard()
        for _ in range(RECENT):
            assert not guard.climbing()
            guard.record(1.0)
        for _ in range(RECENT - 1):
            guard.record(CLIMBING + 0.02)
            assert not guard.climbing() or sum(guard.recent) > CLIMBING * RECENT
        guard.record(CLIMBING + 0.02)
        assert guard.climbing()
        guard.step_back()
        assert not guard.climbing() and guard.lowest_mean == 1.0 and guard.recent == []

    def test_a_single_jump_is_not_climbing(self):
        guard = DivergenceGuard()
        for loss in [*[1.0] * RECENT, 3.9, *[1.0] * RECENT]:
            assert not guard.exploded(loss)
            guard.record(loss)
            assert not guard.climbing()

    def test_recent_losses_set_the_measure(self):
        guard = DivergenceGuard()
        for loss in [10.0, *[1.0] * (RECENT - 1)]:
            guard.record(loss)
        assert not guard.exploded(39.0)
        guard.record(1.0)
        assert guard.exploded(4.1)

    def test_parts_that_are_harder_are_no_climbing(self):
        """Whole sweeps are compared: at no time would 50 losses of three kinds be alike."""
        guard = DivergenceGuard(sweep=3)
        assert guard.span == 51 and DivergenceGuard(sweep=60).span == 60
        for loss in [0.1, 0.1, 10.0] * 40:
            assert not guard.climbing()
            guard.record(loss)
        assert guard.lowest_mean == pytest.approx(3.4)
        for loss in [0.16, 0.16, 16.0] * 17:
            guard.record(loss)
        assert guard.climbing()

    def test_its_numbers_come_back(self):
        guard, other = DivergenceGuard(), DivergenceGuard()
        for loss in range(30, 0, -1):
            guard.record(float(loss))
        other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert vars(other) == vars(guard)


def test_learns_a_sound():
    """A missed bar means that sounds are not learned any more, whatever else passes.

    Every epoch is from seeds here, which is learned fastest. Of two seeds the worse came to 0.8 and 3.4 dB; without
    training it is 12 and 20.
    """
    target = analyze(synthesize_bowed_string(0.09))
    recipe = replace(RECIPES["default"], num_steps=16, continue_share=0.0, learning_rate=0.01)
    trainer = Trainer([target], recipe, Budget(epochs=90))
    while trainer.progress < 1.0:
        trainer.train_epoch()
    grown = trainer.model.grow(target.n_frames, recipe.num_steps, at=recipe.seed_spacing)
    errors = grid_metrics(target.with_grids(*grown), target)
    assert errors["mel_l1_db"] < 1.5 and errors["linear_l1_db"] < 5.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_steps_and_names_its_terms(target, recipe):
    trainer = make_trainer(target, replace(RECIPES[recipe], num_steps=6))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    row = trainer.train_epoch()
    first = ["epoch", "seconds", "learning_rate", "age", "mel_l1_db", "linear_l1_db", "loss"]
    assert list(row)[:7] == first and len(row) > 8
    assert sum(value for name, value in row.items() if name not in first) == pytest.approx(row["loss"], rel=1e-5)
    assert row["epoch"] == 1 and trainer.seconds > 0
    trainer.train_epoch()  # the first step of SOAP makes the basis alone
    changed = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert any(changed)


def test_the_callers_random_state_is_left_alone(target):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    trainer = make_trainer(target, replace(LIVING, texture_weight=1.0))
    for _ in range(3):
        trainer.train_epoch()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_repeats_and_another_does_not(target):
    def train(seed):
        trainer = make_trainer(longer(target), LIVING, seed=seed)
        for _ in range(3):
            trainer.train_epoch()
        return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


class TestSoap:
    @pytest.mark.parametrize("shape", [(8, 5, 1, 1), (3, 4), (6,)], ids=str)
    def test_a_step_is_as_large_as_adams(self, shape):
        torch.manual_seed(0)
        parameter, idle = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        optimizer = Soap([parameter, idle], lr=0.1)
        for _step in range(2):
            assert parameter.eq(1).all()  # the first step only finds the basis
            parameter.grad, idle.grad = 7.0 * torch.randn(shape), torch.zeros(shape)
            optimizer.step()
        move = parameter.detach() - 1.0
        assert move.square().mean().sqrt() == pytest.approx(0.1, rel=1e-3)
        assert (move * parameter.grad).sum() < 0
        assert idle.eq(1).all()

    def test_badly_scaled_axes_are_no_hindrance(self):
        """A quadratic whose axes are those of no entry: for Adam its valley is narrow, in the eigenbasis it is not."""

        def lowest(optimizer_type, lr):
            generator = torch.Generator().manual_seed(0)
            sides = []
            for size in (12, 8):
                basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
                sides.append(basis @ torch.diag(torch.logspace(-1.5, 0, size)) @ basis.T)
            wanted = torch.randn(12, 8, generator=generator)
            matrix = torch.nn.Parameter(torch.zeros(12, 8))
            optimizer = optimizer_type([matrix], lr=lr)
            losses = []
            for _ in range(150):
                optimizer.zero_grad()
                loss = (sides[0] @ (matrix - wanted) @ sides[1]).square().sum()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return min(losses)

        rates = (3e-3, 1e-2, 3e-2, 1e-1)
        assert min(lowest(Soap, lr) for lr in rates) < 0.5 * min(lowest(torch.optim.Adam, lr) for lr in rates)

    def test_a_closure_computes_the_gradient(self):
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = Soap([parameter], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[0] == losses[1] == 6.0 > losses[2]

    def test_its_state_survives(self):
        generator = torch.Generator().manual_seed(0)
        gradients = torch.randn(14, 6, 4, generator=generator)
        one, other = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
        first, second = (Soap([parameter], lr=0.1) for parameter in (one, other))
        for step, gradient in enumerate(gradients):
            if step == 7:
                with torch.no_grad():
                    other.copy_(one)
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            for parameter, optimizer in ((one, first), (other, second))[: 1 + (step >= 7)]:
                parameter.grad = gradient.clone()
                optimizer.step()
        assert torch.equal(one, other) and not one.eq(1).any()
        # As files give it back; products of another layout round differently.
        assert all(tensor.is_contiguous() for tensor in first.state[one].values())


def test_learning_rate_decays_over_the_budget(target):
    trainer = make_trainer(target, budget=Budget(epochs=100, minutes=2))
    peak = RECIPES["default"].learning_rate
    assert trainer.learning_rate == pytest.approx(peak)
    trainer.epoch = 50
    assert trainer.progress == 0.5 and trainer.learning_rate == pytest.approx(0.51 * peak)
    trainer.seconds = 120.0
    assert trainer.progress == 1.0 and trainer.learning_rate == pytest.approx(0.02 * peak)
    notebook = make_trainer(target, RECIPES["notebook"])
    notebook.epoch = 9
    assert notebook.learning_rate == 2e-4


def test_no_value_may_overflow(target):
    weights = []
    for overflow_weight in (0.0, 3.0):
        recipe = replace(SHORT, num_steps=2, overflow_weight=overflow_weight)
        trainer = make_trainer(target, recipe)
        with torch.no_grad():
            bias = torch.linspace(-3.0, 3.0, 16)
            bias[1] = 1.0  # alive
            trainer.model.update_mlp[-1].bias.copy_(bias)
        weights.append((trainer.train_epoch()["loss"], trainer.lessons[0].living_grids))
    (without, grids), (loss, _) = weights
    excess = [F.relu(grid.abs() - OVERFLOW).mean().item() for grid in grids]
    assert min(excess) > 0.1 and loss == pytest.approx(without + 3.0 * sum(excess), rel=1e-5)


def test_divergence_stops_before_the_weights(target):
    trainer = make_trainer(target)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.lessons[0].target_levels[0][0, 3, 3] = float("nan")
    with pytest.raises(TrainingDiverged, match="the loss became nan .* in epoch 1"):
        trainer.train_epoch()
    assert trainer.epoch == 0
    for parameter, kept in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_divergence_goes_on_from_the_lowest_loss_at_half_the_learning_rate(target):
    trainer = make_trainer(target)
    rows = [trainer.train_epoch() for _ in range(3)]
    assert rows[-1]["loss"] == min(row["loss"] for row in rows) and trainer.setbacks == 0
    before = trainer.learning_rate
    diverge(trainer)
    row = trainer.train_epoch()
    assert trainer.setbacks == 1 and row["epoch"] == 4
    assert row["loss"] == rows[-1]["loss"] and row["learning_rate"] == before / 2
    assert trainer.train_epoch()["loss"] < row["loss"]


def test_divergence_that_comes_back_ends_training_at_the_lowest_loss(target):
    trainer = make_trainer(target)
    trainer.train_epoch()
    for setback in range(1, MAX_SETBACKS + 1):
        diverge(trainer)
        trainer.train_epoch()
        assert trainer.setbacks == setback
    kept = {name: tensor.clone() for name, tensor in trainer.best.items() if name.startswith("model.")}
    diverge(trainer)
    with pytest.raises(TrainingDiverged, match=f"in epoch {MAX_SETBACKS + 2}, as 10 times before; try another seed"):
        trainer.train_epoch()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, kept[f"model.{name}"])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_wrong_share_of_continued_epochs(share):
    with pytest.raises(ValueError, match="continue_share must be from 0 to below 1, got"):
        replace(RECIPES["default"], continue_share=share)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"damage_share": 1.1}, "damage_share must be from 0 to 1, got 1.1"),
        ({"restart_share": math.nan}, "restart_share must be from 0 to 1, got nan"),
        ({"window": 0}, "window must be None or at least 1, got 0"),
        ({"seed_spacing": -1}, "seed_spacing must be None or at least 1, got -1"),
        ({"judgements": 0}, "judgements must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_of_a_recipe(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(RECIPES["default"], **fields)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': expected one of adam, soap"):
        replace(RECIPES["default"], optimizer="sgd")


def test_a_recipe_survives_json():
    for recipe in RECIPES.values():
        assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe


def test_damage_zeroes_one_block_of_all_channels():
    torch.manual_seed(0)
    sizes = []
    whole = torch.ones(2, 3, 12, 30)
    for _ in range(200):
        for state in damaged(whole):
            assert torch.equal(state, state[:1].expand_as(state))
            rows, columns = (state[0] == 0).any(dim=1), (state[0] == 0).any(dim=0)
            assert torch.equal(state[0] == 0, rows[:, None] & columns)
            for hit in (rows, columns):
                assert hit.int().diff().abs().sum() <= 2  # one run of cells
            sizes.append(rows.float().mean() * columns.float().mean())
    assert 0.05 < sum(sizes) / len(sizes) < 0.2 and len(set(sizes)) > 50
    assert whole.eq(1).all()


def watch(trainer, monkeypatch):
    """Two lists that fill: with the grids (mel, linear) that epochs start from, and with the windows of the sound."""
    starts, windows = [], []
    attempt = trainer._attempt

    def watched_attempt(turns, window, grids, *arguments):
        starts.append(tuple(grid.clone() for grid in grids))
        return attempt(turns, window, grids, *arguments)

    def watched_next(real):
        windows.append(real())
        return windows[-1]

    monkeypatch.setattr(trainer, "_attempt", watched_attempt)
    for of_epochs in (trainer.lessons[0].seed_windows, trainer.lessons[0].living_windows):
        monkeypatch.setattr(of_epochs, "next", lambda real=of_epochs.next: watched_next(real))
    return starts, windows


def copied(lesson):
    """What lives, the ages and the errors, as they are now."""
    return [x.clone() for x in (*lesson.living_grids, lesson.ages, lesson.errors)]


class TestWindows:
    @pytest.mark.parametrize(("n_frames", "width"), [(24, 10), (30, 7), (11, 10), (5, 1)])
    def test_every_sweep_covers_the_sound(self, n_frames, width):
        windows = Windows(n_frames, width, torch.Generator().manual_seed(0))
        orders = set()
        for _ in range(20):
            sweep = [windows.next()]
            while windows.waiting:
                sweep.append(windows.next())
            covered = torch.zeros(n_frames, dtype=torch.bool)
            for window in sweep:
                assert window.start >= 0 and window.stop <= n_frames and window.stop - window.start == width
                covered[window] = True
            assert covered.all() and len(sweep) <= windows.per_sweep
            orders.add(tuple(window.start for window in sweep))
        assert len(orders) > (5 if n_frames > 2 * width else 1)

    @pytest.mark.parametrize("width", [None, 8, 22])
    def test_of_a_sound_that_is_no_longer(self, width):
        windows = Windows(8, width, torch.Generator())
        assert windows.per_sweep == 1 and [windows.next() for _ in range(3)] == [slice(0, 8)] * 3


@pytest.mark.parametrize("n_frames", [8, 43, 264, 1000])
def test_the_shortest_wave_of_time_is_about_eight_frames(n_frames):
    assert 8 <= n_frames / 2 ** (time_octaves(n_frames) - 2) < 16


def test_the_notebook_sees_the_whole_sound(target, monkeypatch):
    trainer = make_trainer(longer(target), replace(RECIPES["notebook"], num_steps=4))
    starts, windows = watch(trainer, monkeypatch)
    rows = [trainer.train_epoch() for _ in range(3)]
    assert trainer.model.context is None and not trainer.model.growth
    assert windows == [slice(0, 24)] * 3 and [row["age"] for row in rows] == [4] * 3
    for start in starts:
        assert all(torch.equal(*pair) for pair in zip(start, trainer.model.seed(24), strict=True))


def test_epochs_begin_at_seeds_or_go_on_from_what_lives(target, monkeypatch):
    trainer = make_trainer(longer(target), replace(LIVING, damage_share=0.0))
    starts, windows = watch(trainer, monkeypatch)
    lesson = trainer.lessons[0]
    lesson.ages.fill_(1)  # to tell what lives from a seed
    continued, restarted = 0, 0
    for epoch in range(1, 41):
        *living, ages, errors = copied(lesson)
        row = trainer.train_epoch()
        window = windows[-1]
        outside = torch.ones(24, dtype=torch.bool)
        outside[window] = False
        assert len(starts) == len(windows) == epoch and window.stop - window.start == 10
        goes_on = row["age"] > 5
        replaced = not goes_on and bool((lesson.ages[window] != ages[window]).any())
        if goes_on:
            continued += 1
            assert row["age"] == ages[window].max() + 5
            assert torch.equal(lesson.ages[window], ages[window] + 5)
        elif replaced:
            restarted += 1
            assert lesson.ages[window].eq(5).all()
        for start, before, after in zip(starts[-1], living, lesson.living_grids, strict=True):
            if goes_on:
                assert torch.equal(start, before[..., window])
            else:
                assert torch.equal(start[:, 1].unique(), torch.tensor([0.0, 1.0]))
                assert not start[:, 0].any() and not start[:, 2:].any()
            assert torch.equal(after[..., outside], before[..., outside])
            assert torch.equal(after[..., window], before[..., window]) != (goes_on or replaced)
        assert torch.equal(lesson.ages[outside], ages[outside])
        torch.testing.assert_close(lesson.errors[:, outside], errors[:, outside], equal_nan=True, rtol=0, atol=0)
        assert [row["mel_l1_db"], row["linear_l1_db"]] == lesson.errors.nanmean(dim=1).tolist()
    assert 10 < continued < 30 and 1 < restarted < 15
    assert lesson.errors.isfinite().all()


@pytest.mark.parametrize(("judgements", "ages"), [(1, [5]), (2, [3, 5]), (9, [1, 2, 3, 4, 5])])
def test_what_goes_on_is_judged_on_the_way_too(target, judgements, ages):
    trainer = make_trainer(target, replace(LIVING, normalize_gradients=False, judgements=judgements))
    for _ in range(3):
        trainer.train_epoch()
    lesson = trainer.lessons[0]
    grids = lesson.living_grids
    attempt = trainer._attempt(trainer.turns[0], slice(0, 8), grids, age=5)
    losses = []
    for age in ages:
        grown = trainer.model.rollout(*grids, age, tables=trainer.model.tables(8))
        losses.append(trainer.loss(grown, [fastnca.decode_db(grid) for grid in grown], lesson.target_levels)[0])
    loss = sum(losses) / len(losses)
    assert attempt.loss == pytest.approx(loss.item(), rel=1e-5) == pytest.approx(sum(attempt.terms.values()), rel=1e-5)
    assert all(torch.equal(*pair) for pair in zip(attempt.grids, grown, strict=True))
    for mine, expected in zip(
        attempt.gradients, torch.autograd.grad(loss, list(trainer.model.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_every_gradient_weighs_the_same(target):
    trainers = [make_trainer(target, replace(SHORT, normalize_gradients=normalize)) for normalize in (False, True)]
    plain, normalized = (
        [parameter.grad for parameter in trainer.model.parameters()] for trainer in trainers if trainer.train_epoch()
    )
    norm = torch.stack(torch._foreach_norm(plain)).norm()
    assert not 0.99 < norm < 1.01
    for mine, expected in zip(normalized, plain, strict=True):
        torch.testing.assert_close(mine, expected / norm)


def test_seeds_lie_elsewhere_in_each_epoch(target, monkeypatch):
    trainer = make_trainer(target, replace(SHORT, seed_spacing=12, num_steps=2))
    starts, _ = watch(trainer, monkeypatch)
    for _ in range(8):
        trainer.train_epoch()
    for grids in zip(*starts, strict=True):
        assert len({tuple(grid[0, 1].nonzero()[0].tolist()) for grid in grids}) > 3


def test_what_lives_is_damaged(target, monkeypatch):
    trainer = make_trainer(longer(target), replace(LIVING, continue_share=0.9, damage_share=1.0, restart_share=1.0))
    starts, windows = watch(trainer, monkeypatch)
    trainer.lessons[0].ages.fill_(1)
    holes = 0
    for _ in range(20):
        living = copied(trainer.lessons[0])[:2]
        if trainer.train_epoch()["age"] > 5:
            for grid, whole in zip(starts[-1], living, strict=True):
                hole = (grid != whole[..., windows[-1]]).any(dim=1)
                assert (grid.movedim(1, -1)[hole] == 0).all()
                holes += hole.any().item()
    assert holes > 5


def test_what_falls_apart_is_replaced_by_seeds(target):
    trainer = make_trainer(target, replace(LIVING, continue_share=0.999, restart_share=0.0, damage_share=0.0))
    assert [trainer.train_epoch()["age"] for _ in range(3)] == [5, 5, 10]  # the first from seeds, beside what lives
    lesson = trainer.lessons[0]
    lesson.living_grids = tuple(torch.full_like(grid, torch.nan) for grid in lesson.living_grids)
    assert trainer.train_epoch()["age"] == 5
    assert trainer.setbacks == 0 and not lesson.ages.any()
    for grid in lesson.living_grids:
        assert torch.equal(grid[:, 1].unique(), torch.tensor([0.0, 1.0])) and not grid[:, 2:].any()
    assert [trainer.train_epoch()["age"] for _ in range(2)] == [5, 10]


@pytest.mark.parametrize("recipe", [SHORT, LIVING], ids=["seeds", "windows"])
@pytest.mark.parametrize("epochs_before", [0, 3, 6])
def test_state_goes_on_bit_for_bit(target, epochs_before, recipe):
    whole, first, second = (make_trainer(longer(target), recipe, seed=seed) for seed in (0, 0, 1))
    rows = [whole.train_epoch() for _ in range(epochs_before + 4)]
    for _ in range(epochs_before):
        first.train_epoch()
    second.load_state_dict(*as_from_a_file(*first.state_dict()))
    assert_goes_on(second, whole, rows[-4:])


def test_a_state_is_not_changed_by_the_next_epochs(target):
    trainer = make_trainer(longer(target), LIVING)
    for _ in range(3):
        trainer.train_epoch()
    tensors, _ = trainer.state_dict()
    lives = (*(f"lesson.0.{name}" for name in ("living.mel", "living.linear", "ages", "errors")), "random_state.0")
    kept = {name: tensors[name].clone() for name in lives}
    trainer.train_epoch()
    for name in lives:
        torch.testing.assert_close(tensors[name], kept[name], rtol=0, atol=0, equal_nan=True)


def as_from_a_file(tensors, numbers):
    """What a checkpoint gives back of a trainer's state: every tensor by rows, however it lay in memory."""
    return load(save({name: tensor.contiguous() for name, tensor in tensors.items()})), json.loads(json.dumps(numbers))


def assert_goes_on(resumed, whole, rows):
    for row in rows:
        assert {**resumed.train_epoch(), "seconds": 0} == {**row, "seconds": 0}
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(copied(resumed.lessons[0])[:3], copied(whole.lessons[0])[:3], strict=True):
        assert torch.equal(one, other)


def diverge(trainer):
    with torch.no_grad():
        trainer.model.update_mlp[0].weight.fill_(float("nan"))


@pytest.mark.parametrize("recipe", [SHORT, replace(LIVING, continue_share=0.2)], ids=["seeds", "windows"])
@pytest.mark.parametrize("saved_after", [2, 3])
def test_state_goes_on_bit_for_bit_over_a_setback(target, saved_after, recipe):
    whole, first, second = (make_trainer(longer(target), recipe, seed=seed) for seed in (0, 0, 1))
    rows = []
    for trainer, epochs in ((whole, 5), (first, saved_after)):
        for epoch in range(epochs):
            if epoch == 2:
                diverge(trainer)
            row = trainer.train_epoch()
            if trainer is whole:
                rows.append(row)
    second.load_state_dict(*as_from_a_file(*first.state_dict()))
    if saved_after == 2:
        diverge(second)
    assert_goes_on(second, whole, rows[saved_after:])
    assert second.setbacks == 1 and second.guard.state_dict() == whole.guard.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs epochs or minutes"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"minutes": 0.0}, "minutes must be a positive number"),
        ({"minutes": float("nan")}, "minutes must be a positive number"),
    ],
)
def test_wrong_budgets(options, words):
    with pytest.raises(ValueError, match=words):
        Budget(**options)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="unknown recipe 'best': expected one of default, notebook"):
        find_recipe("best")


def test_perceptual_loss_is_zero_on_itself_and_positive_elsewhere():
    loss = fastnca.PerceptualLoss("cpu")
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 80, 16), torch.randn(2, 1, 80, 16)
    assert loss(x, x) == 0.0 and loss(x, y) > 0.0
    assert loss.gram_matrix(torch.ones(2, 3, 4, 5)).shape == (2, 3, 3)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"feature_extractor"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_change_no_bit(target, monkeypatch):
    def train():
        torch.cuda.synchronize()
        trainer = make_trainer(target, replace(RECIPES["default"], window=5), device="cuda")
        rows = [trainer.train_epoch() for _ in range(24)]
        assert set(trainer.graphs) == {(1, 5), (2, 5)} and len(trainer.optimizer.graphs) == 2
        tensors, numbers = trainer.state_dict()
        again = make_trainer(target, replace(RECIPES["default"], window=5), device="cuda")
        again.load_state_dict(tensors, numbers)
        rows += [again.train_epoch() for _ in range(6)]
        return [{**row, "seconds": 0} for row in rows], [*again.model.parameters(), *again.lessons[0].living_grids]

    rows, tensors = train()
    for module in (trainer_module, optim_module):
        monkeypatch.setattr(module, "Captured", lambda function, *arguments: function)
    eager_rows, eager_tensors = train()
    assert rows == eager_rows
    assert all(map(torch.equal, tensors, eager_tensors))

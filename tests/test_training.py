"""Recipes, budgets and the trainer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastnca
from fastnca.training.divergence import TrainingDiverged
from fastnca.training.optim import Muon
from fastnca.training.recipes import RECIPES, find_recipe
from fastnca.training.trainer import MAX_SETBACKS, Budget, Trainer, damaged

BUDGET = Budget(epochs=10)
REGENERATE = replace(RECIPES["regenerate"], num_steps=6, continued=0.7)


def make_trainer(target, recipe="default", budget=BUDGET, **options):
    return Trainer(*target, RECIPES.get(recipe, recipe), budget, **options)


def test_notebook_recipe_is_the_notebooks_loss(target):
    trainer = make_trainer(target, "notebook")
    assert trainer.optimizer.param_groups[0]["lr"] == 2e-4 and trainer.recipe.num_steps == 96
    torch.manual_seed(5)
    mel, linear = (-80 * torch.rand(1, *grid.shape) for grid in target)
    target_mel, target_linear = (grid[None] for grid in target)
    mel_mask, linear_mask = (target_mel > -70).float(), (target_linear > -70).float()
    gram = trainer.perceptual_loss((mel * mel_mask)[:, None], (target_mel * mel_mask)[:, None])
    mel_loss = 2.0 * gram + 0.3 * F.l1_loss(mel * mel_mask, target_mel * mel_mask)
    linear_loss = F.l1_loss(linear * linear_mask, target_linear * linear_mask)
    torch.testing.assert_close(trainer.loss(mel, linear), mel_loss + 0.5 * linear_loss)


def test_default_recipe_judges_quiet_cells_too(target):
    trainer = make_trainer(target)
    silent = [torch.full_like(grid, -80.0)[None] for grid in target]
    trainer.target_mel, trainer.target_linear = silent
    louder = [grid + 5.0 for grid in silent]
    assert trainer.loss(*louder) > trainer.loss(*silent) == 0.0


def test_a_few_active_cells_weigh_as_much_as_all(target):
    trainer = make_trainer(target, replace(RECIPES["default"], active_weight=1.0, magnitude_weight=0.0))
    trainer.target_mel = torch.full_like(trainer.target_mel, -80.0)
    trainer.target_mel[0, 3, :2] = -20.0
    grown = trainer.target_mel.clone()
    grown[0, 3, 0] -= 8.0
    grown[0, 5] += 1.0
    all_cells = (8.0 + grown.shape[2]) / grown.numel()
    assert trainer.loss(grown, trainer.target_linear).item() == pytest.approx(all_cells + 8.0 / 2)
    trainer.target_mel[:] = -80.0
    assert torch.isfinite(trainer.loss(grown, trainer.target_linear))


@pytest.mark.parametrize("recipe", RECIPES)
def test_learns(target, recipe):
    trainer = make_trainer(target, recipe)
    losses = [trainer.train_epoch()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert trainer.epoch == 4 and trainer.seconds > 0


def test_the_same_seed_repeats_and_another_does_not(target):
    def train(seed):
        trainer = make_trainer(target, seed=seed)
        for _ in range(2):
            trainer.train_epoch()
        return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_normalised_gradients_have_unit_norm(target):
    trainer = make_trainer(target)
    for _ in range(2):
        trainer.train_epoch()
    for parameter in trainer.model.parameters():
        assert parameter.grad.norm() == pytest.approx(1.0, abs=1e-4)


def test_muon_steps_are_orthogonal_and_weights_decay():
    torch.manual_seed(0)
    matrix, idle, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 5, 1, 1), (3, 4), (6,)))
    idle.data.fill_(1.0)
    optimizer = Muon([matrix, idle, bias], lr=0.1, weight_decay=0.3)
    matrix.grad, idle.grad, bias.grad = torch.randn(8, 5, 1, 1), torch.zeros(3, 4), torch.tensor([1e-3] * 3 + [5.0] * 3)
    optimizer.step()
    singular = torch.linalg.svdvals(matrix.detach().flatten(1)) / (0.2 * 0.1 * 8**0.5)
    assert (singular > 0.6).all() and (singular < 1.3).all()
    assert (matrix.detach() * matrix.grad).sum() < 0
    torch.testing.assert_close(idle.detach(), torch.full((3, 4), 0.97))
    torch.testing.assert_close(bias.detach(), torch.full((6,), -0.01), rtol=1e-3, atol=0)


def test_learning_rate_decays_over_the_budget(target):
    trainer = make_trainer(target, budget=Budget(epochs=100, minutes=2))
    peak = RECIPES["default"].learning_rate
    assert trainer.learning_rate == pytest.approx(peak)
    trainer.epoch = 50
    assert trainer.progress == 0.5 and trainer.learning_rate == pytest.approx(0.51 * peak)
    trainer.seconds = 120.0
    assert trainer.progress == 1.0 and trainer.learning_rate == pytest.approx(0.02 * peak)
    notebook = make_trainer(target, "notebook")
    notebook.epoch = 9
    assert notebook.learning_rate == 2e-4


def test_no_value_may_overflow(target):
    weights = []
    for overflow_weight in (0.0, 3.0):
        recipe = replace(RECIPES["default"], num_steps=2, overflow_weight=overflow_weight)
        trainer = make_trainer(target, recipe)
        with torch.no_grad():
            bias = torch.linspace(-3.0, 3.0, 16)
            bias[1] = 1.0  # alive
            trainer.model.update_mlp[-1].bias.copy_(bias)
        weights.append((trainer.train_epoch()["loss"], trainer.grown_grids))
    (without, grids), (loss, _) = weights
    excess = [F.relu(grid.abs() - OVERFLOW).mean().item() for grid in grids]
    assert min(excess) > 0.1 and loss == pytest.approx(without + 3.0 * sum(excess), rel=1e-5)


def test_divergence_stops_before_the_weights(target):
    trainer = make_trainer(target)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.target_mel = trainer.target_mel.clone()
    trainer.target_mel[0, 3, 3] = float("nan")
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


def test_a_loss_that_climbs_slowly_goes_back_too(target, monkeypatch):
    monkeypatch.setattr("fastnca.training.RECENT", 3)
    trainer = make_trainer(target, replace(RECIPES["default"], num_steps=2, overflow_weight=0.0, continued=0.0))
    factors, original = [1.0, 1.0, 1.0, 1.2, 1.3, 1.4, 1.0], trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda *grown: 0.0 * original(*grown) + factors[trainer.epoch])
    setbacks = []
    for _ in factors:
        trainer.train_epoch()
        setbacks.append(trainer.setbacks)
    assert setbacks == [0, 0, 0, 0, 0, 0, 1]  # the mean of 1.2, 1.3 and 1.4 is the first above 1.25


def test_divergence_that_comes_back_ends_training_at_the_lowest_loss(target):
    trainer = make_trainer(target)
    trainer.train_epoch()
    for setback in range(1, MAX_SETBACKS + 1):
        diverge(trainer)
        trainer.train_epoch()
        assert trainer.setbacks == setback
    kept = {name: tensor.clone() for name, tensor in trainer.best.items()}
    diverge(trainer)
    with pytest.raises(TrainingDiverged, match=f"in epoch {MAX_SETBACKS + 2}, as 10 times before; try another seed"):
        trainer.train_epoch()
    for name, tensor in trainer._learned().items():
        assert torch.equal(tensor, kept[name])


@pytest.mark.parametrize("continued", [-0.1, 1.0, float("nan")])
def test_wrong_share_of_continued_epochs(continued):
    with pytest.raises(ValueError, match="continued must be a share from 0 to below 1, got"):
        replace(RECIPES["default"], continued=continued)


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


def watch_rollouts(trainer, monkeypatch):
    """A list that fills with the grids (mel, linear) that rollouts start from."""
    starts = []
    rollout = trainer.model.rollout

    def watched(*grids, **options):
        mel, linear, _ = grids
        starts.append((mel, linear))
        return rollout(*grids, **options)

    monkeypatch.setattr(trainer.model, "rollout", watched)
    return starts


def test_continued_epochs_start_where_the_last_one_ended(target, monkeypatch):
    trainer = make_trainer(target, replace(RECIPES["default"], num_steps=5, continued=0.4))
    starts = watch_rollouts(trainer, monkeypatch)
    seed, ends, rows = trainer.initial_grids, [], []
    for _ in range(60):
        rows.append(trainer.train_epoch())
        ends.append(trainer.grown_grids)
    assert len(starts) == 60 and rows[0]["steps"] == 5
    for epoch in range(1, 60):
        continued = rows[epoch]["steps"] > 5
        assert rows[epoch]["steps"] == (rows[epoch - 1]["steps"] + 5 if continued else 5)
        for grid, expected in zip(starts[epoch], ends[epoch - 1] if continued else seed, strict=True):
            assert torch.equal(grid, expected)
    assert 12 < sum(row["steps"] > 5 for row in rows) < 36


def test_regenerate_damages_what_it_goes_on_from(target, monkeypatch):
    trainer = make_trainer(target, REGENERATE)
    starts = watch_rollouts(trainer, monkeypatch)
    holes = 0
    for _ in range(20):
        before = trainer.grown_grids
        if trainer.train_epoch()["steps"] > 6:
            for grid, whole in zip(starts[-1], before, strict=True):
                hole = (grid != whole).any(dim=1)
                assert (grid.movedim(1, -1)[hole] == 0).all()
                holes += hole.any().item()
    assert holes > 5


def test_what_falls_apart_is_left_for_the_seed(target):
    trainer = make_trainer(target, replace(RECIPES["default"], num_steps=5, continued=0.999))
    assert [trainer.train_epoch()["steps"] for _ in range(3)] == [5, 10, 15]
    trainer.grown_grids = tuple(torch.full_like(grid, torch.nan) for grid in trainer.grown_grids)
    assert trainer.train_epoch()["steps"] == 5
    assert trainer.setbacks == 0
    assert trainer.train_epoch()["steps"] == 10


@pytest.mark.parametrize("recipe", ["default", REGENERATE], ids=["default", "regenerate"])
@pytest.mark.parametrize("epochs_before", [0, 2])
def test_state_goes_on_bit_for_bit(target, epochs_before, recipe):
    whole, first, second = (make_trainer(target, recipe, seed=seed) for seed in (0, 0, 1))
    rows = [whole.train_epoch() for _ in range(epochs_before + 2)]
    for _ in range(epochs_before):
        first.train_epoch()
    second.load_state_dict(*first.state_dict())
    assert_goes_on(second, whole, rows[-2:])


def assert_goes_on(resumed, whole, rows):
    for row in rows:
        assert {**resumed.train_epoch(), "seconds": 0} == {**row, "seconds": 0}
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def diverge(trainer):
    with torch.no_grad():
        trainer.model.update_mlp[0].weight.fill_(float("nan"))


@pytest.mark.parametrize("saved_after", [2, 3])
def test_state_goes_on_bit_for_bit_over_a_setback(target, saved_after):
    whole, first, second = (make_trainer(target, seed=seed) for seed in (0, 0, 1))
    rows = []
    for trainer, epochs in ((whole, 5), (first, saved_after)):
        for epoch in range(epochs):
            if epoch == 2:
                diverge(trainer)
            row = trainer.train_epoch()
            if trainer is whole:
                rows.append(row)
    second.load_state_dict(*first.state_dict())
    if saved_after == 2:
        diverge(second)
    assert_goes_on(second, whole, rows[saved_after:])
    assert second.setbacks == 1 and second.lowest_loss == whole.lowest_loss


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
    with pytest.raises(ValueError, match="unknown recipe 'best': expected one of notebook, default, regenerate"):
        find_recipe("best")


def test_perceptual_loss_is_zero_on_itself_and_positive_elsewhere():
    loss = fastnca.PerceptualLoss("cpu")
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 80, 16), torch.randn(2, 1, 80, 16)
    assert loss(x, x) == 0.0 and loss(x, y) > 0.0
    assert loss.gram_matrix(torch.ones(2, 3, 4, 5)).shape == (2, 3, 3)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"feature_extractor"}

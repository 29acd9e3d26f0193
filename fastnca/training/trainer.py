"""The trainer: teaches one model its targets by a recipe, epoch by epoch."""

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from ..context import Places
from ..model import DualSpecTNCA, decode_db
from ..sound.convention import on_cpu
from .capture import Captured
from .divergence import DivergenceGuard, TrainingDiverged
from .losses import RecipeLoss
from .optim import Soap

FINAL_LEARNING_RATE = 0.02  # share of the recipe's learning rate that is left where it decays
MAX_SETBACKS = 10  # after each the learning rate is half of what it was
STATES_BUDGET = 2 * 2**30  # bytes of saved states: 6 s of sound without replaying; a GPU gives half of what it has free
_OPTIMIZERS = {"adam": torch.optim.Adam, "soap": Soap}


@dataclass(frozen=True)
class Budget:
    """When training ends: after ``epochs`` or ``minutes`` of training time, whichever comes first."""

    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes must be a positive number, got {self.minutes}")
        if self.epochs is None and self.minutes is None:
            raise ValueError("a budget needs epochs or minutes")

    def spent(self, epoch, seconds):
        """The used share of the budget, 1 or more when it is over."""
        by_epochs = epoch / self.epochs if self.epochs else 0.0
        by_time = seconds / (60.0 * self.minutes) if self.minutes else 0.0
        return max(by_epochs, by_time)


def damaged(grid, generator=None):
    """A copy of ``grid`` [N, C, H, T] in which a random block of each state's cells is zero in all channels.

    Each side of the block is a third of the grid's side on average. To train on such states is the way of Mordvintsev
    et al. 2020, "Growing Neural Cellular Automata".
    """
    grid = grid.clone()
    for state in grid:
        (top, bottom), (left, right) = (
            torch.randint(size + 1, (2,), generator=generator).sort().values for size in state.shape[1:]
        )
        state[:, top:bottom, left:right] = 0.0
    return grid


class Windows:
    """The parts of a sound that epochs see: each sweep covers the whole sound, in random order and cut at other places.

    Args:
        n_frames: of the sound. width: of a window, in frames; None for the whole sound.
    """

    def __init__(self, n_frames, width, generator):
        self.n_frames = n_frames
        self.width = n_frames if width is None else min(width, n_frames)
        self.generator = generator
        self.waiting = []  # the first frames of this sweep's windows that are still to come

    @property
    def per_sweep(self):
        """The most windows that a sweep can have."""
        return 1 if self.width == self.n_frames else math.ceil(self.n_frames / self.width) + 1

    def next(self):
        """-> slice of the frames."""
        if self.width == self.n_frames:
            return slice(0, self.n_frames)
        if not self.waiting:
            first = -int(torch.randint(self.width, (), generator=self.generator))
            last = self.n_frames - self.width
            starts = [min(max(start, 0), last) for start in range(first, self.n_frames, self.width)]
            self.waiting = [starts[i] for i in torch.randperm(len(starts), generator=self.generator)]
        begin = self.waiting.pop()
        return slice(begin, begin + self.width)


def time_octaves(n_frames):
    """For ``context.Places``: as many as give the shortest wave about 8 frames, 0.1 s."""
    return max(1, math.floor(math.log2(n_frames / 8)) + 2)


@dataclass(frozen=True)
class _Attempt:
    """One rollout of an epoch."""

    grids: tuple
    gradients: tuple  # of each parameter
    loss: float
    terms: dict
    norms: torch.Tensor  # of the gradients, before they were normalized
    errors: torch.Tensor  # [2, frames]: of both grids, in dB

    @property
    def finite(self):
        return bool(torch.isfinite(self.norms).all())


class Trainer:
    """Teaches one model its targets.

    An epoch shows every target once and takes one gradient step.

    Args:
        targets: DualSpectrograms of equal shape, at least one. All grow from the same seed.
        seed: of the initial weights and all that follows; on one machine the same seed and epochs give the same model.
            The caller's random state is left as it is.
        precision: of the training rollouts; the weights and what :meth:`grown` shows are float32.
        pitch_hz: of the targets, for recipes with context; None where they have none.

    Raises ValueError for targets of different shapes.
    """

    def __init__(
        self, targets, recipe, budget, *, seed=0, backend="auto", precision="fp32", device="cpu", pitch_hz=None
    ):
        if len({target.mel_db.shape for target in targets}) != 1:
            shapes = [list(target.mel_db.shape) for target in targets]
            raise ValueError(f"targets must be at least one, and all of one shape, got {shapes}")
        self.targets = tuple(targets)
        self.recipe = recipe
        self.budget = budget
        self.generator = torch.Generator().manual_seed(seed)
        n_frames = targets[0].n_frames
        places = None
        if recipe.context:
            places = Places(time_octaves=time_octaves(n_frames), pitch_hz=pitch_hz, bands=targets[0].scale.bands)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            self.model = DualSpecTNCA(backend=backend, precision=precision, context=places, growth=recipe.context)
            self.model.to(device)
            self.loss = RecipeLoss(recipe, device)
        with torch.no_grad():
            self.model.update_mlp[0].weight[:, self.model.num_channels :] *= recipe.stencil_gain
        self.optimizer = _OPTIMIZERS[recipe.optimizer](self.model.parameters(), lr=recipe.learning_rate)
        self.target_levels = tuple(
            torch.stack([getattr(target, name) for target in targets]).to(device) for name in ("mel_db", "linear_db")
        )
        self.frames = torch.arange(n_frames, device=device)
        self.graphs = {}  # of _differentiate, by its number of judgements
        self.seed_windows, self.living_windows = (Windows(n_frames, recipe.window, self.generator) for _ in range(2))
        self.living_grids = self._seeds(n_frames)  # what lives beside the epochs from seeds
        self.ages = torch.zeros(n_frames, dtype=torch.long)  # steps since the seed of the living grids' frames
        self.errors = torch.full((2, n_frames), math.nan)  # of both grids' frames, as last judged
        self.epoch = 0
        self.seconds = 0.0  # of training alone: pictures and checkpoints do not count
        self.guard = DivergenceGuard(self.seed_windows.per_sweep)
        self.best = {}  # what had been learned at the lowest losses, see _learned
        self.setbacks = 0  # how often training diverged and went on from there

    @property
    def progress(self):
        """The spent share of the budget, 1 or more when training is over."""
        return self.budget.spent(self.epoch, self.seconds)

    @property
    def learning_rate(self):
        learning_rate = self.recipe.learning_rate * 0.5**self.setbacks
        if not self.recipe.cosine_decay:
            return learning_rate
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.progress))
        return learning_rate * (FINAL_LEARNING_RATE + (1.0 - FINAL_LEARNING_RATE) * cosine)

    def _checkpoint_every(self):
        """The fewest replayed steps whose saved states fit the memory budget."""
        steps = self.recipe.num_steps
        if self.model.backend == "reference":
            return 4  # eager autograd keeps about 1 kB per cell and step; replaying costs it little
        width = self.seed_windows.width
        state = sum(grid[..., :width].nbytes for grid in self.living_grids)
        device = self.living_grids[0].device
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else STATES_BUDGET
        longest = max(1, math.isqrt(steps))
        return next((k for k in range(1, longest) if (steps / k + k) * state <= budget), longest)

    @on_cpu
    def train_epoch(self):
        """One gradient step -> {"epoch", "seconds", "learning_rate", "age", "mel_l1_db", "linear_l1_db", "loss"} and
        the terms of the loss.

        ``age`` is the number of steps since the seed of what was judged: more than the recipe's where the epoch went on
        from what lives. ``mel_l1_db`` and ``linear_l1_db`` are mean absolute errors over all cells, each frame's as it
        was last judged. Errors and losses are those before the step.

        Where the loss is not finite, has become a multiple of the last ones or has been climbing for long, the epoch
        starts from seeds or, if it did, training goes on from the lowest losses at half the learning rate. Raises
        TrainingDiverged when that has not helped.
        """
        started = time.perf_counter()
        recipe = self.recipe
        continued = self._chance(recipe.continue_share) and bool(self.best)  # the first epoch is from seeds
        if continued:
            window = self.living_windows.next()
            age = int(self.ages[window].max())
            attempt = self._attempt(self._living(window), window, recipe.judgements)
            continued = not self._failed(attempt)
            if continued:
                self._keep(window, attempt.grids, self.ages[window] + recipe.num_steps)
            else:
                self._keep(window, self._seeds(self.living_windows.width), 0)
        if not continued:
            window, age = self.seed_windows.next(), 0
            attempt = self._attempt(self._seeds(self.seed_windows.width), window)
            while self._failed(attempt) or self.guard.climbing():
                self._step_back(f"the loss became {attempt.loss:g} (gradient norm {attempt.norms.max().item():g})")
                attempt = self._attempt(self._seeds(self.seed_windows.width), window)
            if self.guard.record(attempt.loss):
                self.best = {name: tensor.detach().clone() for name, tensor in self._learned().items()}
            if self._chance(recipe.restart_share):
                self._keep(window, attempt.grids, recipe.num_steps)
        for parameter, gradient in zip(self.model.parameters(), attempt.gradients):
            parameter.grad = gradient
        learning_rate = self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        self.errors[:, window] = attempt.errors
        mel_l1_db, linear_l1_db = self.errors.nanmean(dim=1).tolist()
        return {
            "epoch": self.epoch,
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate,
            "age": age + recipe.num_steps,
            "mel_l1_db": mel_l1_db,
            "linear_l1_db": linear_l1_db,
            "loss": attempt.loss,
            **attempt.terms,
        }

    def _chance(self, share):
        return torch.rand((), generator=self.generator).item() < share

    def _seeds(self, n_frames):
        """Initial grids of all targets: one seed each, or a lattice of seeds that lies elsewhere each time."""
        spacing = self.recipe.seed_spacing
        grids = self.model.seed(n_frames, at=spacing)
        if spacing is not None:
            shifts = torch.randint(spacing, (len(grids), 2), generator=self.generator).tolist()
            grids = tuple(grid.roll(shift, dims=(2, 3)) for grid, shift in zip(grids, shifts))
        return tuple(grid.repeat(len(self.targets), 1, 1, 1) for grid in grids)

    def _living(self, window):
        grids = tuple(grid[..., window] for grid in self.living_grids)
        if self._chance(self.recipe.damage_share):
            grids = tuple(damaged(grid, self.generator) for grid in grids)
        return grids

    def _keep(self, window, grids, age):
        """From now on these grids live in that window."""
        for living, grid in zip(self.living_grids, grids):
            living[..., window] = grid.detach()
        self.ages[window] = age

    def _attempt(self, grids, window, judgements=1):
        """Grows the window's ``grids`` and judges them so many times, the last time at the end."""
        arguments = *grids, self.frames[window]
        work = self.graphs.get(judgements)
        if work is None:
            work = partial(self._differentiate, judgements, self._checkpoint_every())
            if grids[0].is_cuda and self.model.backend == "triton":  # Python would take longer than the kernels
                work = self.graphs[judgements] = Captured(work, arguments)
        grids, gradients, measured = work(*arguments)
        numbers = torch.cat([value.flatten() for value in measured.values()]).cpu()  # waits for the GPU, once
        parts = dict(zip(measured, numbers.split([value.numel() for value in measured.values()])))
        norms, errors = parts.pop("norms"), parts.pop("errors").view(2, -1)
        loss, *terms = (part.item() for part in parts.values())
        return _Attempt(grids, gradients, loss, dict(zip(list(parts)[1:], terms)), norms, errors)

    def _differentiate(self, judgements, checkpoint_every, mel, linear, frames):
        """-> (the grown grids, the gradients, what was measured: the loss, its terms, the gradients' norms and both
        grids' errors by frame)."""
        tables = self.model.tables(self.targets[0].n_frames)
        if tables is not None:
            *rows, columns = tables
            tables = (*rows, columns.index_select(2, frames))
        targets = tuple(target.index_select(2, frames) for target in self.target_levels)
        ages = sorted({math.ceil(self.recipe.num_steps * n / judgements) for n in range(judgements + 1)})
        grids, losses, terms = (mel, linear), [], []
        for before, age in pairwise(ages):
            grids = self.model.rollout(*grids, age - before, checkpoint_every=checkpoint_every, tables=tables)
            levels = tuple(decode_db(grid) for grid in grids)
            for judged, value in zip((losses, terms), self.loss(grids, levels, targets)):
                judged.append(value)
        loss = sum(losses) / len(losses)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.recipe.normalize_gradients:
            torch._foreach_div_(gradients, norms.norm().clamp(min=torch.finfo(norms.dtype).tiny))
        errors = [(level - target).detach().abs().mean(dim=(0, 1)) for level, target in zip(levels, targets)]
        measured = {"loss": loss.detach()}
        measured |= {name: sum(each[name] for each in terms) / len(terms) for name in terms[0]}
        return (
            tuple(grid.detach() for grid in grids),
            gradients,
            {**measured, "norms": norms, "errors": torch.stack(errors)},
        )

    def _failed(self, attempt):
        return self.guard.exploded(attempt.loss) or not attempt.finite

    def _step_back(self, reason):
        self.guard.step_back()
        if self.best:
            self._load_learned(self.best)
        if not self.best or self.setbacks == MAX_SETBACKS:
            again = f", as {self.setbacks} times before; try another seed" if self.setbacks else ""
            raise TrainingDiverged(f"{reason} in epoch {self.epoch + 1}{again}")
        self.setbacks += 1

    def _learned(self):
        """{name: tensor}: the weights and the optimizer's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _load_learned(self, tensors):
        names = [name for name, _ in self.model.named_parameters()]
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in names})
        state = {index: {} for index in range(len(names))}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                state[names.index(parameter)][key] = tensor.clone()  # or its next steps would change ``tensors``
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def state_dict(self):
        """(tensors, numbers): all that :meth:`load_state_dict` needs to go on as if nothing had happened.

        Tensors: the weights and the optimizer's state, now and at the lowest loss; the random state; what lives.
        """
        tensors = self._learned()
        tensors.update({f"best.{name}": tensor for name, tensor in self.best.items()})
        tensors["random_state"] = self.generator.get_state()
        tensors["living.mel"], tensors["living.linear"] = (grid.clone() for grid in self.living_grids)
        tensors["living.ages"], tensors["errors"] = self.ages.clone(), self.errors.clone()
        numbers = {"epoch": self.epoch, "seconds": self.seconds, "setbacks": self.setbacks}
        waiting = [list(windows.waiting) for windows in (self.seed_windows, self.living_windows)]
        return tensors, {**numbers, "waiting": waiting, "guard": self.guard.state_dict()}

    def load_state_dict(self, tensors, numbers):
        self._load_learned(tensors)
        self.best = {name[len("best.") :]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        self.generator.set_state(tensors["random_state"])
        device = self.living_grids[0].device
        self.living_grids = tuple(tensors[name].clone().to(device) for name in ("living.mel", "living.linear"))
        self.ages, self.errors = tensors["living.ages"].clone(), tensors["errors"].clone()
        for windows, waiting in zip((self.seed_windows, self.living_windows), numbers["waiting"]):
            windows.waiting = list(waiting)
        for name in ("epoch", "seconds", "setbacks"):
            setattr(self, name, numbers[name])
        self.guard.load_state_dict(numbers["guard"])

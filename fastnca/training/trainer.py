"""The trainer: teaches one model its targets by a recipe, epoch by epoch."""

import math
import time
from dataclasses import dataclass

import torch

from ..model import DualSpecTNCA, decode_db
from .divergence import DivergenceGuard, TrainingDiverged
from .losses import RecipeLoss
from .optim import Muon

FINAL_LEARNING_RATE = 0.02  # share of the recipe's learning rate that is left where it decays
MAX_SETBACKS = 10  # after each the learning rate is half of what it was
STATES_BUDGET = 2 * 2**30  # bytes of saved states: 6 s of sound without replaying
_OPTIMIZERS = {"adam": torch.optim.Adam, "muon": Muon}


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


@dataclass(frozen=True)
class _Attempt:
    """One rollout of an epoch and its gradient."""

    grids: tuple
    loss: float
    terms: dict
    gradients: list
    norms: torch.Tensor  # of each gradient

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

    Raises ValueError for targets of different shapes.
    """

    def __init__(self, targets, recipe, budget, *, seed=0, backend="auto", precision="fp32", device="cpu"):
        if len({target.mel_db.shape for target in targets}) != 1:
            shapes = [list(target.mel_db.shape) for target in targets]
            raise ValueError(f"targets must be at least one, and all of one shape, got {shapes}")
        self.targets = tuple(targets)
        self.recipe = recipe
        self.budget = budget
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            self.model = DualSpecTNCA(backend=backend, precision=precision, coordinates=recipe.coordinates).to(device)
            self.loss = RecipeLoss(recipe, device)
        with torch.no_grad():
            self.model.update_mlp[0].weight[:, self.model.num_channels :] *= recipe.stencil_gain
        self.optimizer = _OPTIMIZERS[recipe.optimizer](self.model.parameters(), lr=recipe.learning_rate)
        self.target_levels = tuple(
            torch.stack([getattr(target, name) for target in targets]).to(device) for name in ("mel_db", "linear_db")
        )
        seeds = self.model.seed(self.targets[0].n_frames)
        self.initial_grids = tuple(grid.expand(len(targets), -1, -1, -1) for grid in seeds)
        self.living_grids, self.age = self.initial_grids, 0  # the last epoch's end, and its steps since the seed
        self.epoch = 0
        self.seconds = 0.0  # of training alone: pictures and checkpoints do not count
        self.guard = DivergenceGuard()
        self.best = {}  # what had been learned at the lowest loss, see _learned
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
        state = sum(grid.nbytes for grid in self.initial_grids)
        longest = max(1, math.isqrt(steps))
        return next((k for k in range(1, longest) if (steps / k + k) * state <= STATES_BUDGET), longest)

    def train_epoch(self):
        """One gradient step -> {"epoch", "seconds", "learning_rate", "age", "mel_l1_db", "linear_l1_db", "loss"} and
        the terms of the loss.

        ``age`` is the number of steps since the seed of what was judged: more than the recipe's where the epoch went on
        from the last one's end. ``mel_l1_db`` and ``linear_l1_db`` are mean absolute errors over all cells. Errors and
        losses are those before the step.

        Where the loss is not finite, has become a multiple of its lowest value or has been climbing for long, the epoch
        starts from the seed or, if it did, training goes on from that lowest loss at half the learning rate. Raises
        TrainingDiverged when that has not helped.
        """
        started = time.perf_counter()
        continued = self.age > 0 and torch.rand((), generator=self.generator).item() < self.recipe.continue_share
        if continued:
            attempt = self._attempt(self._continued_grids())
            continued = not self._failed(attempt)
        if not continued:
            attempt = self._attempt(self.initial_grids)
            while self._failed(attempt) or self.guard.climbing():
                self._step_back(f"the loss became {attempt.loss:g} (gradient norm {attempt.norms.max().item():g})")
                attempt = self._attempt(self.initial_grids)
            if self.guard.record(attempt.loss):
                self.best = {name: tensor.detach().clone() for name, tensor in self._learned().items()}
        self.living_grids = tuple(grid.detach() for grid in attempt.grids)
        self.age = self.recipe.num_steps + (self.age if continued else 0)
        learning_rate = self.optimizer.param_groups[0]["lr"] = self.learning_rate
        if self.recipe.normalize_gradients:
            for gradient, norm in zip(attempt.gradients, attempt.norms, strict=True):
                gradient.div_(norm + 1e-8)
        self.optimizer.step()
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        errors = [
            (decode_db(grid) - target).abs().mean().item()
            for grid, target in zip(self.living_grids, self.target_levels, strict=True)
        ]
        return {
            "epoch": self.epoch,
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate,
            "age": self.age,
            "mel_l1_db": errors[0],
            "linear_l1_db": errors[1],
            "loss": attempt.loss,
            **attempt.terms,
        }

    def _continued_grids(self):
        if not self.recipe.damage_continued:
            return self.living_grids
        return tuple(damaged(grid, self.generator) for grid in self.living_grids)

    def _attempt(self, grids):
        grown = self.model.rollout(*grids, self.recipe.num_steps, checkpoint_every=self._checkpoint_every())
        loss, terms = self.loss(grown, tuple(decode_db(grid) for grid in grown), self.target_levels)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return _Attempt(grown, loss.item(), terms, gradients, torch.stack(torch._foreach_norm(gradients)))

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

        Tensors: the weights and the optimizer's state, now and at the lowest loss; the random state; the living grids.
        """
        tensors = self._learned()
        tensors.update({f"best.{name}": tensor for name, tensor in self.best.items()})
        tensors["random_state"] = self.generator.get_state()
        tensors["living.mel"], tensors["living.linear"] = self.living_grids
        numbers = {"epoch": self.epoch, "seconds": self.seconds, "age": self.age, "setbacks": self.setbacks}
        return tensors, {**numbers, "guard": self.guard.state_dict()}

    def load_state_dict(self, tensors, numbers):
        self._load_learned(tensors)
        self.best = {name[len("best.") :]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        self.generator.set_state(tensors["random_state"])
        device = self.initial_grids[0].device
        self.living_grids = tuple(tensors[name].to(device) for name in ("living.mel", "living.linear"))
        for name in ("epoch", "seconds", "age", "setbacks"):
            setattr(self, name, numbers[name])
        self.guard.load_state_dict(numbers["guard"])

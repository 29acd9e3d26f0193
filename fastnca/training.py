"""Recipes, and the trainer that follows one."""

import copy
import math
import time
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.nn.functional as F

from .losses import PerceptualLoss
from .model import DualSpecTNCA, decode_db
from .optim import Muon

ACTIVE_DB = -70.0  # the notebook's border between sound and silence
FINAL_LEARNING_RATE = 0.02  # of the recipe's, where it decays
DIVERGING = 4.0  # times the lowest loss so far; young losses jump by less
CLIMBING = 1.25  # times the lowest mean of RECENT losses so far, see docs/recipes.md
RECENT = 20
MAX_SETBACKS = 10  # after each the learning rate is half of what it was
OVERFLOW = 2.0  # coordinates are within 1, and tanh(2) is -79 dB
STATES_BUDGET = 2 * 2**30  # bytes of saved states: 6 s of sound without replaying
NUMBERS = ("epoch", "seconds", "age", "lowest_loss", "lowest_mean", "recent", "setbacks")  # of a checkpoint
GROWN = ("grown.mel", "grown.linear")


class TrainingDiverged(RuntimeError):
    """The loss exploded, and going on from its lowest value did not help; the trainer is back there."""


OPTIMIZERS = {"adam": torch.optim.Adam, "muon": Muon}


@dataclass(frozen=True)
class Recipe:
    """How a model learns one target. All levels and losses are in dB."""

    learning_rate: float
    optimizer: str = "adam"  # or "muon"
    coordinates: tuple = ()  # of the initial grids, see DualSpecTNCA
    stencil_gain: float = 1.0  # on the initial weights that see the stencils, whose output is larger than the state
    cosine_decay: bool = False  # of the learning rate over the whole budget
    normalize_gradients: bool = False  # each parameter's gradient to unit norm
    active_cells_only: bool = False  # only where the target is above ACTIVE_DB, as the notebook
    mel_weight: float = 1.0  # of the mean absolute error of the mel grid
    linear_weight: float = 1.0  # the same of the linear grid
    active_weight: float = 0.0  # in both, of the mean absolute error of the cells above ACTIVE_DB, however few they are
    gram_weight: float = 0.0  # of the mel grid's PerceptualLoss
    magnitude_weight: float = 0.0  # of the mean absolute error of sqrt(magnitude), which the loud cells dominate
    overflow_weight: float = 0.0  # of the mean excess of the grown grids over -OVERFLOW...OVERFLOW
    num_steps: int = 96
    continued: float = 0.0  # share of epochs that go on from what the last one grew, so that the sound learns to stay
    damage: bool = False  # to what they go on from, so that it learns to heal
    log_interval: int = 25  # epochs between progress pictures

    def __post_init__(self):
        if not 0.0 <= self.continued < 1.0:
            raise ValueError(f"continued must be a share from 0 to below 1, got {self.continued!r}")


RECIPES = {
    "notebook": Recipe(
        learning_rate=2e-4,
        active_cells_only=True,
        mel_weight=0.3,
        linear_weight=0.5,
        gram_weight=2.0,
        log_interval=100,
    ),
    "default": Recipe(
        learning_rate=1e-2,  # twice this diverged on the violin
        optimizer="muon",
        coordinates=(
            *(("sin", "f", octave) for octave in range(7)),
            *(("cos", "f", octave) for octave in range(3, 6)),
            ("sin", "t", 0),
            ("cos", "t", 0),
            ("sin", "t", 1),
            ("cos", "t", 1),
        ),
        stencil_gain=1 / 8,  # the sum of a Sobel stencil's positive weights is 4, of the Laplacian's 12
        cosine_decay=True,
        normalize_gradients=True,
        linear_weight=2.0,
        active_weight=0.3,  # with the next, or a sound that is mostly silence is learned as silence
        overflow_weight=1.0,
        magnitude_weight=20.0,
        continued=0.1,
    ),
}
RECIPES["regenerate"] = replace(RECIPES["default"], continued=0.3, damage=True)


def find_recipe(name):
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


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


def _active(target):
    return (target > ACTIVE_DB).to(target.dtype)


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


class Trainer:
    """Teaches one model one target, epoch by epoch.

    Args:
        target_mel, target_linear: [n_mels, T] and [n_linear, T] in dB, between -80 and 0.
        seed: of the initial weights and all that follows; on one machine the same seed and epochs give the same model.
        precision: of the training rollouts; the weights and what :meth:`grown` shows are float32.
    """

    def __init__(
        self, target_mel, target_linear, recipe, budget, *, seed=0, backend="auto", precision="fp32", device="cpu"
    ):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.recipe = recipe
        self.budget = budget
        self.model = DualSpecTNCA(
            n_mels=target_mel.shape[0],
            n_linear=target_linear.shape[0],
            backend=backend,
            precision=precision,
            coordinates=recipe.coordinates,
        ).to(device)
        with torch.no_grad():
            self.model.update_mlp[0].weight[:, self.model.num_channels :] *= recipe.stencil_gain
        self.perceptual_loss = PerceptualLoss(device).requires_grad_(False) if recipe.gram_weight else None
        self.optimizer = OPTIMIZERS[recipe.optimizer](self.model.parameters(), lr=recipe.learning_rate)
        self.target_mel = torch.as_tensor(target_mel, dtype=torch.float32, device=device)[None]
        self.target_linear = torch.as_tensor(target_linear, dtype=torch.float32, device=device)[None]
        self.initial_grids = self.model.seed(self.target_mel.shape[2])
        self.grown_grids, self.age = self.initial_grids, 0  # of the last epoch, and its steps since the seed
        self.epoch = 0
        self.seconds = 0.0  # of training alone: pictures and checkpoints do not count
        self.recent = []  # losses of the last epochs from the seed
        self.lowest_mean = math.inf  # of RECENT such losses in a row
        self.lowest_loss = math.inf
        self.best = {}  # what had been learned there, see _learned
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

    def grown(self):
        """What the model grows now, in float32 as on any machine: (mel_db [n_mels, T], linear_db [n_linear, T]) on the
        CPU."""
        model = copy.copy(self.model)
        model.precision = "fp32"
        return model.grow(self.target_mel.shape[2], self.recipe.num_steps)

    def _checkpoint_every(self):
        """The fewest replayed steps whose saved states fit the memory budget."""
        steps = self.recipe.num_steps
        if self.model.backend == "reference":
            return 4  # eager autograd keeps about 1 kB per cell and step; replaying costs it little
        state = sum(grid.nbytes for grid in self.initial_grids)
        longest = max(1, math.isqrt(steps))
        return next((k for k in range(1, longest) if (steps / k + k) * state <= STATES_BUDGET), longest)

    def loss(self, mel_db, linear_db):
        """The recipe's loss of two grown spectrograms in dB, [1, n_mels, T] and [1, n_linear, T]."""
        mel = self.recipe.mel_weight * self._grid_loss(mel_db, self.target_mel)
        linear = self.recipe.linear_weight * self._grid_loss(linear_db, self.target_linear)
        if self.perceptual_loss is not None:
            mask = self._mask(self.target_mel)
            gram = self.perceptual_loss((mel_db * mask)[:, None], (self.target_mel * mask)[:, None])
            mel = mel + self.recipe.gram_weight * gram
        return mel + linear

    def _grid_loss(self, grown, target):
        mask = self._mask(target)
        loss = F.l1_loss(grown * mask, target * mask)
        if self.recipe.active_weight:
            active = _active(target)
            distance = F.l1_loss(grown * active, target * active, reduction="sum")
            loss = loss + self.recipe.active_weight * distance / active.sum().clamp(min=1.0)
        if self.recipe.magnitude_weight:
            loss = loss + self.recipe.magnitude_weight * F.l1_loss(10.0 ** (grown / 40.0), 10.0 ** (target / 40.0))
        return loss

    def _mask(self, target):
        return _active(target) if self.recipe.active_cells_only else 1.0

    def train_epoch(self):
        """One gradient step -> {"epoch", "seconds", "learning_rate", "steps", "loss", "mel_l1_db", "linear_l1_db"}.

        ``steps`` is the age of what was judged: more than the recipe's where the epoch went on from the last one's end.
        The losses are those before the step; the last two are mean absolute errors over all cells.

        Where the loss is not finite, has become a multiple of its lowest value or has been climbing for long, the epoch
        starts from the seed or, if it did, training goes on from that lowest loss at half the learning rate. Raises
        TrainingDiverged when that has not helped.
        """
        started = time.perf_counter()
        continued = self.age > 0 and torch.rand((), generator=self.generator).item() < self.recipe.continued
        grown, loss, gradients, norms = self._differentiate(continued)
        while self._diverging(loss, norms, continued):
            if not continued:
                self._step_back(f"the loss became {loss:g} (gradient norm {norms.max().item():g})")
            continued = False
            grown, loss, gradients, norms = self._differentiate(False)
        if not continued:
            self.recent = [*self.recent, loss][-RECENT:]
            if len(self.recent) == RECENT:
                self.lowest_mean = min(self.lowest_mean, fmean(self.recent))
            if loss < self.lowest_loss:
                self.lowest_loss = loss
                self.best = {name: tensor.detach().clone() for name, tensor in self._learned().items()}
        self.grown_grids = tuple(grid.detach() for grid in grown)
        self.age = self.recipe.num_steps + (self.age if continued else 0)
        learning_rate = self.optimizer.param_groups[0]["lr"] = self.learning_rate
        if self.recipe.normalize_gradients:
            for gradient, norm in zip(gradients, norms, strict=True):
                gradient.div_(norm + 1e-8)
        self.optimizer.step()
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        mel_db, linear_db = (decode_db(grid) for grid in self.grown_grids)
        return {
            "epoch": self.epoch,
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate,
            "steps": self.age,
            "loss": loss,
            "mel_l1_db": (mel_db - self.target_mel).abs().mean().item(),
            "linear_l1_db": (linear_db - self.target_linear).abs().mean().item(),
        }

    def _differentiate(self, continued):
        """One rollout, forward and back, from the seed or ``continued`` -> (grown grids, loss, gradients, norms)."""
        grids = self.grown_grids if continued else self.initial_grids
        if continued and self.recipe.damage:
            grids = tuple(damaged(grid, self.generator) for grid in grids)
        grown = self.model.rollout(*grids, self.recipe.num_steps, checkpoint_every=self._checkpoint_every())
        total = self.loss(*(decode_db(grid) for grid in grown))
        if self.recipe.overflow_weight:
            overflow = sum((grid.abs() - OVERFLOW).clamp(min=0.0).mean() for grid in grown)
            total = total + self.recipe.overflow_weight * overflow
        self.optimizer.zero_grad()
        total.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return grown, total.item(), gradients, torch.stack(torch._foreach_norm(gradients))

    def _diverging(self, loss, norms, continued):
        if not (math.isfinite(loss) and loss <= DIVERGING * self.lowest_loss and torch.isfinite(norms).all()):
            return True
        return not continued and len(self.recent) == RECENT and fmean(self.recent) > CLIMBING * self.lowest_mean

    def _step_back(self, reason):
        self.recent = []
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
        """(tensors, numbers): all that :meth:`load_state_dict` needs to go on as if nothing had happened."""
        tensors = self._learned()
        tensors.update({f"best.{name}": tensor for name, tensor in self.best.items()})
        tensors["random_state"] = self.generator.get_state()
        if self.recipe.continued:
            tensors.update(zip(GROWN, self.grown_grids))
        return tensors, {name: getattr(self, name) for name in NUMBERS}

    def load_state_dict(self, tensors, numbers):
        self._load_learned(tensors)
        self.best = {name[len("best.") :]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        self.generator.set_state(tensors["random_state"])
        if self.recipe.continued:
            self.grown_grids = tuple(tensors[name].to(self.target_mel.device) for name in GROWN)
        for name in NUMBERS:
            setattr(self, name, numbers[name])

"""The trainer: teaches one model its targets by a recipe, epoch by epoch."""

import math
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from ..context import CODE_SIZE, Places
from ..model import DualSpecTNCA, decode_db
from ..sound.convention import on_cpu
from .capture import Captured
from .divergence import DivergenceGuard, TrainingDiverged
from .losses import RecipeLoss
from .optim import Soap

FINAL_LEARNING_RATE = 0.02  # share of the recipe's learning rate that is left where it decays
MAX_SETBACKS = 10  # after each the learning rate is half of what it was
STATES_BUDGET = 2 * 2**30  # bytes of saved states: 6 s of sound without replaying; a GPU gives half of what it has free
LIVING_BUDGET = 2 * 2**30  # bytes of what lives beside the epochs in memory: 600 sounds of 1 s; more goes to disk
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


def _in_file(grid):
    """A tensor in a file that goes with it, in the folder for temporary files (TMPDIR), and in memory as it is used."""
    with tempfile.NamedTemporaryFile(prefix="fastnca-") as file:
        os.posix_fallocate(file.fileno(), 0, grid.nbytes)  # raises where the disk is full
        kept = torch.from_file(file.name, shared=True, size=grid.numel(), dtype=grid.dtype).view_as(grid)
    return kept.copy_(grid)


def time_octaves(n_frames):
    """For ``context.Places``: as many as give the shortest wave about 8 frames, 0.1 s."""
    return max(1, math.floor(math.log2(n_frames / 8)) + 2)


class Lesson:
    """One sound while it is learned: its target, the parts that epochs see, and what lives beside them.

    Args:
        number: of the sound, in what is saved. code: the parameter that tells it apart, None for the only sound.
        on_disk: keep what lives in files and do not save it: a resumed run then begins with seeds in its place.
    """

    def __init__(self, number, target, seeds, window, generator, context=None, pitch_hz=None, code=None, on_disk=False):
        device = seeds[0].device
        self.number = number
        self.n_frames = target.n_frames
        self.target_levels = tuple(level[None].to(device) for level in (target.mel_db, target.linear_db))
        self.times = torch.linspace(-1.0, 1.0, self.n_frames, device=device)
        self.row_features = [grid.to(device) for grid in context.row_features(pitch_hz)] if context else None
        self.code = code
        self.seed_windows, self.living_windows = (Windows(self.n_frames, window, generator) for _ in range(2))
        self.on_disk = on_disk
        self.living_grids = tuple(map(_in_file, seeds)) if on_disk else seeds  # what lives beside the epochs from seeds
        self.ages = torch.zeros(self.n_frames, dtype=torch.long)  # steps since the seed of the living grids' frames
        self.errors = torch.full((2, self.n_frames), math.nan)  # of both grids' frames, as last judged

    def at(self, window):
        """What a rollout of these frames needs to know beside its grids: both targets and, with context, the frames'
        places, the bands' coordinates and the code."""
        known = [level[..., window] for level in self.target_levels]
        if self.row_features:
            known += [self.times[window], *self.row_features]
        return known if self.code is None else [*known, self.code]

    def living(self, window):
        return tuple(grid[..., window] for grid in self.living_grids)

    def keep(self, window, grids, age):
        """From now on these grids live in that window."""
        for living, grid in zip(self.living_grids, grids):
            living[..., window] = grid.detach()
        self.ages[window] = age

    def state_dict(self):
        """(tensors, numbers)"""
        tensors = {"errors": self.errors.clone()}
        if not self.on_disk:
            mel, linear = (grid.clone() for grid in self.living_grids)
            tensors |= {"living.mel": mel, "living.linear": linear, "ages": self.ages.clone()}
        waiting = [list(windows.waiting) for windows in (self.seed_windows, self.living_windows)]
        return tensors, {"waiting": waiting}

    def load_state_dict(self, tensors, numbers):
        device = self.living_grids[0].device
        self.errors = tensors["errors"].clone()
        if "ages" in tensors and not self.on_disk:
            self.living_grids = tuple(tensors[name].clone().to(device) for name in ("living.mel", "living.linear"))
            self.ages = tensors["ages"].clone()
        for windows, waiting in zip((self.seed_windows, self.living_windows), numbers["waiting"]):
            windows.waiting = list(waiting)


class Turns:
    """A share of the lessons, of which one has its turn in each epoch: in each sweep as often as it has windows.

    Args:
        generator: of all random choices in these lessons.
    """

    def __init__(self, lessons, generator):
        self.lessons = lessons
        self.generator = generator
        self.waiting = []  # places in ``lessons`` of this sweep's that are still to come
        self.now = None

    def next(self):
        """The lesson whose turn it is from now on, also as ``now``."""
        if not self.waiting:
            turns = [place for place, lesson in enumerate(self.lessons) for _ in range(lesson.seed_windows.per_sweep)]
            shuffled = len(self.lessons) > 1
            self.waiting = (
                [turns[i] for i in torch.randperm(len(turns), generator=self.generator)] if shuffled else turns
            )
        self.now = self.lessons[self.waiting.pop()]
        return self.now

    def chance(self, share):
        return torch.rand((), generator=self.generator).item() < share


@dataclass(frozen=True)
class _Attempt:
    """One rollout of an epoch: a window of a lesson, from seeds or, ``continued``, from what lived there."""

    turns: Turns
    lesson: Lesson
    window: slice
    age: int  # before the rollout
    continued: bool
    grids: tuple
    gradients: tuple  # of each parameter of the model and, with codes, of the code
    loss: float
    terms: dict
    norms: torch.Tensor  # of the gradients, before they were normalized
    errors: torch.Tensor  # [2, frames]: of both grids, in dB


class Trainer:
    """Teaches one model one sound or many.

    An epoch judges a part of one sound, or of ``batch`` sounds, and takes one gradient step. Many sounds share the rule
    and are told apart by a code for each, which is learned with it.

    Under torch.distributed the sounds of an epoch are spread over the processes: a sound with its code and what lives
    stays in one process, and the gradients of the rule are averaged in one all-reduce of all of them.

    Args:
        targets: DualSpectrograms, at least one; None for those whose turn is in another process.
        seed: of the initial weights and all that follows; on one machine the same seed and epochs give the same model.
            The caller's random state is left as it is.
        precision: of the training rollouts; the weights and what :meth:`grown` shows are float32.
        pitches_hz: of each target, for recipes with context; None for one that has none.
        instruments: of many targets, a number from 0 on for each; each is one of its own if not given. Those of one
            instrument share a code, which is learned in the process ``instrument % processes``.
        batch: sounds of an epoch, for many, each of another instrument. A multiple of the number of processes.
        start: (DualSpecTNCA, {instrument: code}) to go on from, a rule that has learned many sounds. frozen: learn the
            codes alone, and leave the rule of ``start`` as it is.
        rank, processes: of torch.distributed. longest: frames of the longest sound of all processes.

    Raises ValueError for numbers that do not go together and for many sounds by a recipe without context.
    """

    def __init__(
        self,
        targets,
        recipe,
        budget,
        *,
        seed=0,
        backend="auto",
        precision="fp32",
        device="cpu",
        pitches_hz=None,
        instruments=None,
        batch=1,
        start=None,
        frozen=False,
        rank=0,
        processes=1,
        longest=0,
    ):
        many = len(targets) > 1 or start is not None
        pitches_hz = pitches_hz or [None] * len(targets)
        if not targets or len(pitches_hz) != len(targets):
            raise ValueError(f"expected one pitch for each of at least one target, got {len(targets)} targets")
        if many and not recipe.context:
            raise ValueError(f"the recipe {recipe.name} has no context, so it can only learn one sound at a time")
        instruments = range(len(targets)) if instruments is None else instruments
        count = len(set(instruments))
        if not 1 <= batch <= count or batch % processes:
            raise ValueError(
                f"an epoch can learn from 1 to {count} sounds at once, each of an instrument of its own, and from a "
                f"multiple of the number of processes, {processes}; got {batch}"
            )
        own = [target for target in targets if target is not None]
        self.recipe = recipe
        self.budget = budget
        self.batch, self.rank, self.processes = batch, rank, processes
        places = start[0].places if start else None
        if recipe.context and not start:
            known = [math.log(pitch) for pitch in pitches_hz if pitch]
            places = Places(
                time_octaves=time_octaves(max(longest, *(target.n_frames for target in own))),
                pitch_hz=math.exp(fmean(known)) if known and many else pitches_hz[0],
                bands=own[0].scale.bands,
                code_size=CODE_SIZE if many else 0,
            )
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            self.model = DualSpecTNCA(backend=backend, precision=precision, context=places, growth=recipe.context)
            self.model.to(device)
            self.loss = RecipeLoss(recipe, device)
            codes = dict(enumerate(torch.randn(count, CODE_SIZE))) if many else {}
        if start:
            self.model.load_state_dict(start[0].state_dict())
            codes = start[1]
        else:
            with torch.no_grad():
                self.model.update_mlp[0].weight[:, self.model.num_channels :] *= recipe.stencil_gain
        self.codes = {
            n: nn.Parameter(code.detach().clone().to(device)) for n, code in codes.items() if n % processes == rank
        }
        self.turns = []
        cells = sum(target.n_frames for target in own) * (self.model.n_mels + self.model.n_linear)
        too_many = cells * self.model.num_channels * 4 > LIVING_BUDGET and torch.device(device).type == "cpu"
        for share in range(rank, batch, processes):
            generator = torch.Generator().manual_seed(seed + share)
            numbers = [number for number, instrument in enumerate(instruments) if instrument % batch == share]
            lessons = [
                Lesson(
                    number,
                    targets[number],
                    self._seeds(targets[number].n_frames, generator),
                    recipe.window,
                    generator,
                    self.model.context,
                    pitches_hz[number],
                    self.codes.get(instruments[number]),
                    on_disk=too_many,
                )
                for number in numbers
            ]
            self.turns.append(Turns(lessons, generator))
        self.lessons = sorted((lesson for turns in self.turns for lesson in turns.lessons), key=lambda it: it.number)
        if frozen:
            self.model.requires_grad_(False)
        self.parameters = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        self.rule = list(self.parameters.values())  # what of the rule is learned
        self.parameters |= {f"code.{instrument}": code for instrument, code in self.codes.items()}
        self.optimizer = _OPTIMIZERS[recipe.optimizer](self.parameters.values(), lr=recipe.learning_rate)
        self.graphs = {}  # of _differentiate, by the number of judgements and the width of the window
        self.epoch = 0
        self.seconds = 0.0  # of training alone: pictures and checkpoints do not count
        sweep = math.ceil(len(targets) / batch) if many else self.lessons[0].seed_windows.per_sweep
        self.guard = DivergenceGuard(sweep)
        self.best = {}  # what had been learned at the lowest losses, see _learned
        self.setbacks = 0  # how often training diverged and went on from there
        self.stopped = False  # by :meth:`stop`, which takes effect for all processes after an epoch
        self._wants_to_stop = False
        self._errors = {}  # of the sounds that have been judged, by number: mel and linear, means over all frames
        self._tail = 0.0  # seconds of the last epoch that are not counted yet

    def stop(self):
        """End training after the epoch in which all processes have learned of this; any thread and process may ask."""
        self._wants_to_stop = True

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

    def _checkpoint_every(self, grids):
        """The fewest replayed steps whose saved states fit the memory budget."""
        steps = self.recipe.num_steps
        if self.model.backend == "reference":
            return 4  # eager autograd keeps about 1 kB per cell and step; replaying costs it little
        state = sum(grid.nbytes for grid in grids)
        budget = torch.cuda.mem_get_info(grids[0].device)[0] // 2 if grids[0].is_cuda else STATES_BUDGET
        longest = max(1, math.isqrt(steps))
        return next((k for k in range(1, longest) if (steps / k + k) * state <= budget), longest)

    @on_cpu
    def train_epoch(self):
        """One gradient step -> {"epoch", "seconds", "learning_rate", "age", "mel_l1_db", "linear_l1_db", "loss"} and
        the terms of the loss.

        ``age`` is the number of steps since the seed of what was judged: more than the recipe's where the epoch went on
        from what lives. ``mel_l1_db`` and ``linear_l1_db`` are mean absolute errors over all cells of a sound, each
        frame's as it was last judged, as means over the sounds that have been judged. Errors and losses are those
        before the step.

        Where the loss is not finite, has become a multiple of the last ones or has been climbing for long, the epoch
        starts from seeds or, if it did, training goes on from the lowest losses at half the learning rate. Raises
        TrainingDiverged when that has not helped.
        """
        started = time.perf_counter()
        attempts = [self._from_living(turns) or self._from_seeds(turns) for turns in self.turns]
        gradients, sums = self._averaged(attempts, started)
        while sums["failed"] or self.guard.climbing():
            self._step_back(attempts)
            attempts = [self._from_seeds(turns) for turns in self.turns]
            gradients, sums = self._averaged(attempts, started)
        for attempt in attempts:
            if attempt.continued:
                age = attempt.lesson.ages[attempt.window] + self.recipe.num_steps
                attempt.lesson.keep(attempt.window, attempt.grids, age)
        if sums["from_seeds"] and self.guard.record(sums["seed_loss"] / sums["from_seeds"]):
            self.best = {name: tensor.detach().clone() for name, tensor in self._learned().items()}
        for attempt in attempts:
            if not attempt.continued and attempt.turns.chance(self.recipe.restart_share):
                attempt.lesson.keep(attempt.window, attempt.grids, self.recipe.num_steps)
        for parameter in self.parameters.values():
            parameter.grad = None
        for parameter, gradient in zip(self.rule, gradients):
            parameter.grad = gradient
        for attempt in attempts:
            if attempt.lesson.code is not None:
                attempt.lesson.code.grad = attempt.gradients[-1]
        learning_rate = self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.epoch += 1
        self.seconds += sums["seconds"] / self.processes
        self.stopped = sums["stop"] > 0
        self._tail = time.perf_counter() - self._averaged_at
        return {
            "epoch": self.epoch,
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate,
            "age": round(sums["age"] / self.batch),
            "mel_l1_db": sums["mel"] / sums["judged"],
            "linear_l1_db": sums["linear"] / sums["judged"],
            **{name: sums[name] / self.batch for name in ("loss", *attempts[0].terms)},
        }

    def _averaged(self, attempts, started):
        """The rule's gradients, as means over the attempts of all processes, and what else these need to know of each
        other, as sums."""
        for attempt in attempts:
            if not self._failed(attempt):
                attempt.lesson.errors[:, attempt.window] = attempt.errors
                self._errors[attempt.lesson.number] = attempt.lesson.errors.nanmean(dim=1).tolist()
        mel, linear = map(sum, zip(*self._errors.values())) if self._errors else (0.0, 0.0)
        from_seeds = [attempt.loss for attempt in attempts if not attempt.continued]
        self._averaged_at = time.perf_counter()
        sums = {
            "failed": sum(map(self._failed, attempts)),
            "stop": self._wants_to_stop,
            "seconds": self._averaged_at - started + self._tail,
            "from_seeds": len(from_seeds),
            "seed_loss": sum(from_seeds),
            "age": sum(attempt.age + self.recipe.num_steps for attempt in attempts),
            "judged": len(self._errors),
            "mel": mel,
            "linear": linear,
            "loss": sum(attempt.loss for attempt in attempts),
            **{name: sum(attempt.terms[name] for attempt in attempts) for name in attempts[0].terms},
        }
        gradients = [sum(parts) for parts in zip(*(attempt.gradients[: len(self.rule)] for attempt in attempts))]
        if self.processes > 1:
            numbers = torch.tensor([float(number) for number in sums.values()], device=gradients[0].device)
            flat = torch.cat([gradient.flatten() for gradient in gradients] + [numbers])
            try:
                torch.distributed.all_reduce(flat)
            except RuntimeError as error:
                raise RuntimeError("another process of the job has ended; start the job again with --resume") from error
            *parts, numbers = flat.split([gradient.numel() for gradient in gradients] + [len(sums)])
            gradients = [part.view_as(gradient) for part, gradient in zip(parts, gradients)]
            sums = dict(zip(sums, numbers.tolist()))
        if self.batch > 1:
            gradients = [gradient / self.batch for gradient in gradients]
        return gradients, sums

    def _seeds(self, n_frames, generator):
        """Initial grids: one seed each, or a lattice of seeds that lies elsewhere each time."""
        spacing = self.recipe.seed_spacing
        grids = self.model.seed(n_frames, at=spacing)
        if spacing is not None:
            shifts = torch.randint(spacing, (len(grids), 2), generator=generator).tolist()
            grids = tuple(grid.roll(shift, dims=(2, 3)) for grid, shift in zip(grids, shifts))
        return grids

    def _from_living(self, turns):
        """An attempt that goes on from what lives, or None for one from seeds: the first epoch, a share of the others,
        and where what lives is lost."""
        lesson = turns.next()
        if not (turns.chance(self.recipe.continue_share) and self.best):  # the first epoch is from seeds
            return None
        window = lesson.living_windows.next()
        grids = lesson.living(window)
        if turns.chance(self.recipe.damage_share):
            grids = tuple(damaged(grid, turns.generator) for grid in grids)
        age = int(lesson.ages[window].max())
        attempt = self._attempt(turns, window, grids, age)
        if self._failed(attempt):
            lesson.keep(window, self._seeds(lesson.living_windows.width, turns.generator), 0)
            return None
        return attempt

    def _from_seeds(self, turns):
        lesson = turns.now
        window = lesson.seed_windows.next()
        return self._attempt(turns, window, self._seeds(lesson.seed_windows.width, turns.generator))

    def _attempt(self, turns, window, grids, age=None):
        """Grows and judges the window's ``grids``: from seeds, or from what lives there and has that age."""
        lesson, continued = turns.now, age is not None
        judgements = self.recipe.judgements if continued else 1
        arguments = *grids, *lesson.at(window)
        key = judgements, grids[0].shape[3]
        work = self.graphs.get(key)
        if work is None:
            work = partial(self._differentiate, judgements, self._checkpoint_every(grids))
            if grids[0].is_cuda and self.model.backend == "triton":  # Python would take longer than the kernels
                work = self.graphs[key] = Captured(work, arguments)
        grids, gradients, measured = work(*arguments)
        numbers = torch.cat([value.flatten() for value in measured.values()]).cpu()  # waits for the GPU, once
        parts = dict(zip(measured, numbers.split([value.numel() for value in measured.values()])))
        norms, errors = parts.pop("norms"), parts.pop("errors").view(2, -1)
        loss, *terms = (part.item() for part in parts.values())
        terms = dict(zip(list(parts)[1:], terms))
        return _Attempt(turns, lesson, window, age or 0, continued, grids, gradients, loss, terms, norms, errors)

    def _differentiate(self, judgements, checkpoint_every, mel, linear, mel_target, linear_target, *place):
        """-> (the grown grids, the gradients, what was measured: the loss, its terms, the gradients' norms and both
        grids' errors by frame). ``place`` as :meth:`Lesson.at` gives it."""
        learned = list(self.rule)
        tables = None
        if place:
            times, *row_features = place[:3]
            code = None
            if len(place) > 3:
                code = place[3].detach().requires_grad_()
                learned.append(code)
            tables = self.model.context.tables(row_features, times, code)
        targets = mel_target, linear_target
        ages = sorted({math.ceil(self.recipe.num_steps * n / judgements) for n in range(judgements + 1)})
        grids, losses, terms = (mel, linear), [], []
        for before, age in pairwise(ages):
            grids = self.model.rollout(*grids, age - before, checkpoint_every=checkpoint_every, tables=tables)
            levels = tuple(decode_db(grid) for grid in grids)
            for judged, value in zip((losses, terms), self.loss(grids, levels, targets)):
                judged.append(value)
        loss = sum(losses) / len(losses)
        gradients = torch.autograd.grad(loss, learned)
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
        return self.guard.exploded(attempt.loss) or not bool(torch.isfinite(attempt.norms).all())

    def _step_back(self, attempts):
        worst = next(filter(self._failed, attempts), attempts[0])
        self.guard.step_back()
        if self.best:
            self._load_learned(self.best)
        if not self.best or self.setbacks == MAX_SETBACKS:
            reason = f"the loss became {worst.loss:g} (gradient norm {worst.norms.max().item():g})"
            again = f", as {self.setbacks} times before; try another seed" if self.setbacks else ""
            raise TrainingDiverged(f"{reason} in epoch {self.epoch + 1}{again}")
        self.setbacks += 1

    def _learned(self):
        """{name: tensor}: the weights, the codes and the optimizer's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"code.{instrument}": code for instrument, code in self.codes.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def _load_learned(self, tensors):
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name, _ in self.model.named_parameters()})
        for instrument, code in self.codes.items():
            code.copy_(tensors[f"code.{instrument}"])
        names = list(self.parameters)
        state = {index: {} for index in range(len(names))}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter = name.split(".", 2)
                if parameter in self.parameters:  # not one of another process
                    state[names.index(parameter)][key] = tensor.clone()  # or its next steps would change ``tensors``
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def state_dict(self):
        """(tensors, numbers): all that :meth:`load_state_dict` needs to go on as if nothing had happened.

        Tensors: the weights and the optimizer's state, now and at the lowest loss; the random state; what lives. It is
        what this process knows, and all of them together know all.
        """
        tensors = self._learned()
        tensors.update({f"best.{name}": tensor for name, tensor in self.best.items()})
        numbers = {"epoch": self.epoch, "seconds": self.seconds, "setbacks": self.setbacks}
        numbers |= {"guard": self.guard.state_dict(), "lessons": {}, "turns": {}}
        for share, turns in zip(range(self.rank, self.batch, self.processes), self.turns):
            tensors[f"random_state.{share}"] = turns.generator.get_state()
            numbers["turns"][str(share)] = list(turns.waiting)
        for lesson in self.lessons:
            own, numbers["lessons"][str(lesson.number)] = lesson.state_dict()
            tensors.update({f"lesson.{lesson.number}.{name}": tensor for name, tensor in own.items()})
        return tensors, numbers

    def load_state_dict(self, tensors, numbers):
        self._load_learned(tensors)
        self.best = {name[len("best.") :]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        for name in ("epoch", "seconds", "setbacks"):
            setattr(self, name, numbers[name])
        self.guard.load_state_dict(numbers["guard"])
        for share, turns in zip(range(self.rank, self.batch, self.processes), self.turns):
            turns.generator.set_state(tensors[f"random_state.{share}"])
            turns.waiting = list(numbers["turns"][str(share)])
        for lesson in self.lessons:
            prefix = f"lesson.{lesson.number}."
            own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            lesson.load_state_dict(own, numbers["lessons"][str(lesson.number)])
            if lesson.errors.isfinite().any():
                self._errors[lesson.number] = lesson.errors.nanmean(dim=1).tolist()

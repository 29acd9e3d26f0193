"""How alive a grown sound is: whether it grows from one cell, stays as it ages, and heals."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from .automaton.reference import alive
from .files import atomic_write
from .model import decode_db
from .sound.convention import HOP_LENGTH, SAMPLE_RATE
from .sound.files import load_audio
from .sound.pictures import LifePicture, save_life
from .sound.spectrogram import analyze
from .sound_model import SETTLING_STEPS, find_model_file
from .space import load_sound

AGES = (96, 192, 384, 1000, 10_000)  # steps
HEALING = (32, 96, 384)  # steps since the wound
PATIENCE = 4  # times the least number of steps that life may take to fill the grids
WOUNDS = (("hole", 0.05), ("hole", 0.11), ("hole", 0.25), ("hole", 0.5), ("time slice", 0.1), ("band", 0.1))
WOUND_SHOWN = 2  # of these
STAGES = (1 / 4, 1 / 2, 3 / 4)  # of the growth that the picture shows
ROLLOUT_STEPS = 16  # between two reports of progress


@dataclass(frozen=True, eq=False)
class Life:
    """What has been measured of one life, all in steps and dB. :meth:`to_dict` is what ``life.json`` holds.

    Errors are mean absolute level differences from the recording over all cells of a grid, None where they are not
    finite.

    Args:
        n_frames: of the grids.
        least_steps_to_full: what life needs at least to fill both grids from the seed.
        one_seed_steps_to_full: what it took; None where it did not in four times as many.
        one_seed_mel_l1_db, one_seed_linear_l1_db: the errors at that age, or None.
        mel_l1_db_at, linear_l1_db_at: {age: error}.
        wounded_at: the age at which the wounds were cut.
        wounds: of each its kind ("hole", "time slice", "band") and share of the area; mel_before and mel_wounded, the
            errors right before and after the cut; mel_healed, {steps since: error}, and mel_twin, the same of the
            undamaged twin at equal age. And all these of the linear grid.
        picture: what :func:`pictures.save_life` draws.
    """

    n_frames: int
    least_steps_to_full: int
    one_seed_steps_to_full: int | None
    one_seed_mel_l1_db: float | None
    one_seed_linear_l1_db: float | None
    mel_l1_db_at: dict
    linear_l1_db_at: dict
    wounded_at: int
    wounds: list
    picture: LifePicture = field(repr=False)

    def to_dict(self):
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "picture"}

    def save(self, folder):
        """Write ``life.json`` and ``life.png``, each atomically. Returns the paths of what was written."""
        path = Path(folder) / "life.json"
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())
        return [path, *save_life(Path(folder) / "life.png", self.picture)]


class _Course:
    """Lives of one sound, side by side, on their way: their grids [N, C, H, T], their age, and their errors."""

    def __init__(self, automaton, target, grids, on_step, age=0):
        self.automaton, self.grids, self.age, self.on_step = automaton, grids, age, on_step
        self.tables = automaton.tables(target.n_frames)
        self.target = [level.to(grid) for level, grid in zip((target.mel_db, target.linear_db), grids)]

    def go_on(self, age):
        """Live to that age."""
        while self.age < age:
            steps = min(ROLLOUT_STEPS, age - self.age)
            self.grids = self.automaton.rollout(*self.grids, steps, precision="fp32", tables=self.tables)
            self.age += steps
            self.on_step(steps * len(self.grids[0]), self.age)

    @property
    def full(self):
        """Whether life fills both grids; it does everywhere where there is no life mask."""
        return not self.automaton.life_mask or all(bool(alive(grid).all()) for grid in self.grids)

    def errors(self):
        """-> [(mel error, linear error)] in dB of each life."""
        pairs = zip(self.grids, self.target)
        errors = [(decode_db(grid) - target).abs().mean(dim=(1, 2)).tolist() for grid, target in pairs]
        return [tuple(error if math.isfinite(error) else None for error in pair) for pair in zip(*errors)]

    def levels(self, index=0):
        """-> (mel_db, linear_db) of one life, arrays [H, T] with NaN where nothing lives."""
        return tuple(
            torch.where(alive(grid)[:, 0] | (not self.automaton.life_mask), decode_db(grid), math.nan)[index]
            .cpu()
            .numpy()
            for grid in self.grids
        )


def wound(grid, kind, share):
    """Zero the middle of a grid [C, H, T] in place: a hole of that share of its area, as wide and as high as the grid
    in proportion, a time slice through all bands, or a band through all frames."""
    sides = {"hole": (math.sqrt(share),) * 2, "time slice": (1.0, share), "band": (share, 1.0)}[kind]
    for axis, side in zip((1, 2), sides):
        length = grid.shape[axis]
        size = max(1, round(side * length))
        grid = grid.narrow(axis, (length - size) // 2, size)
    grid.zero_()


def check_ages(until):
    """The ages to measure, up to ``until``. Raises ValueError where there would be none."""
    if until < AGES[0]:
        raise ValueError(f"until must be at least {AGES[0]} steps, got {until}")
    return tuple(age for age in AGES if age <= until)


@torch.no_grad()
def measure(model, target, ages=AGES, healing=HEALING, on_progress=None):
    """Grow a sound from one live cell in the middle of each grid, let it age, and wound it -> Life.

    Args:
        model: the SoundModel. target: the recording that it learned, a DualSpectrogram of the same length.
        ages: steps since the seed at which to measure the errors. healing: the same since the wounds.
        on_progress: called with (share done, what is done).

    Raises ValueError for another target.

    >>> life = fastnca.life.measure(fastnca.load("violin"), target, ages=(96, 384))
    >>> life.one_seed_steps_to_full, life.mel_l1_db_at[384]
    """
    automaton, n_frames = model.automaton, target.n_frames
    if n_frames != model.card.n_frames:
        raise ValueError(f"the target has {n_frames} frames, and the model learned {model.card.n_frames}")
    least = max(1, automaton.steps_to_fill(n_frames) - 1)  # a cell lives as soon as a neighbor's alpha is above 0
    oldest = max(ages, default=0)
    healing_cost = (1 + len(WOUNDS)) * max(healing)
    done, doing = 0, "growing"

    def on_step(steps, age):
        nonlocal done
        done += steps
        if on_progress:
            total = max(oldest, least + SETTLING_STEPS) + healing_cost
            on_progress(min(1.0, done / total), f"{doing}: step {age}")

    life = _Course(automaton, target, automaton.seed(n_frames), on_step)
    noted, pictures = {}, {}  # by age
    shown = {round(share * max(least, model.card.num_steps)) for share in STAGES}
    between = {round(2 ** (power / 2)) for power in range(30)}  # for the curve

    def live(until):
        """Go on to that age, noting on the way what the result or the picture is to tell."""
        for stop in sorted({*ages, *shown, *between, until}):
            if life.age < stop <= until:
                life.go_on(stop)
                noted[stop] = life.errors()[0]
                if stop in shown:
                    pictures[stop] = life.levels()

    while not life.full and life.age < PATIENCE * least:
        live(life.age + 1)
    full = life.age if life.full else None
    live(max(1, life.age))
    pictures[life.age] = life.levels()
    full_errors = noted[full] if full else (None, None)
    live(life.age + SETTLING_STEPS)

    doing = "healing"
    wounded_at = life.age
    grids = [grid.repeat(1 + len(WOUNDS), 1, 1, 1) for grid in life.grids]  # the first is the undamaged twin
    for index, (kind, share) in enumerate(WOUNDS, start=1):
        for grid in grids:
            wound(grid[index], kind, share)
    lives = _Course(automaton, target, grids, on_step, wounded_at)
    stages = {0: lives.errors()}
    wound_pictures = [("before", lives.levels(0)), ("wounded", lives.levels(1 + WOUND_SHOWN))]
    for steps in sorted(healing):
        lives.go_on(wounded_at + steps)
        stages[steps] = lives.errors()
        wound_pictures.append((f"{steps} steps later", lives.levels(1 + WOUND_SHOWN)))
    wound_pictures.append(("unwounded, as old", lives.levels(0)))
    wounds = [_wound_row(index, stages) for index in range(1, 1 + len(WOUNDS))]

    doing = "ageing"
    live(oldest)
    pictures[life.age] = life.levels()
    growth_pictures = [(f"step {age}", levels) for age, levels in sorted(pictures.items())]
    growth_pictures.append(("recording", (target.mel_db.numpy(), target.linear_db.numpy())))
    kind, share = WOUNDS[WOUND_SHOWN]
    return Life(
        n_frames,
        least,
        full,
        *full_errors,
        *({age: noted[age][index] for age in sorted(ages)} for index in (0, 1)),
        wounded_at,
        wounds,
        LifePicture(noted, full, wounded_at, growth_pictures, f"a {kind} of {100 * share:.0f} %", wound_pictures),
    )


def _wound_row(index, stages):
    """The entry of ``Life.wounds`` for life ``index``; ``stages`` is {steps since the wound: errors of all lives}."""
    kind, share = WOUNDS[index - 1]
    row = {"kind": kind, "share": share}
    for grid, name in enumerate(("mel", "linear")):
        since = {steps: (errors[index][grid], errors[0][grid]) for steps, errors in stages.items()}
        row[f"{name}_wounded"], row[f"{name}_before"] = since.pop(0)
        row[f"{name}_healed"] = {steps: healed for steps, (healed, _) in since.items()}
        row[f"{name}_twin"] = {steps: twin for steps, (_, twin) in since.items()}
    return row


def find_target(model_file, card, target=None):
    """The recording that a model learned -> DualSpectrogram.

    ``target`` is its wav file, ``target.wav`` beside the model file if not given. Raises OSError or ValueError where
    there is none, or one of another length.
    """
    path = Path(target or model_file.with_name("target.wav"))
    if not path.is_file():
        hint = "" if target else ", the recording that it was learned from; name it by --target"
        raise FileNotFoundError(f"no such file: {path}{hint}")
    length = card.n_frames * HOP_LENGTH
    samples, _ = load_audio(path, length / SAMPLE_RATE)
    if len(samples) < length:
        raise ValueError(
            f"{path} has {len(samples) // HOP_LENGTH} frames, and the model learned {card.n_frames}; "
            "name the recording that it was learned from by --target"
        )
    return analyze(samples[:length], card.scale.bands)


def examine(path, target=None, *, until=AGES[-1], backend="auto", on_progress=None):
    """Measure how alive a learned sound is -> (Life, the paths of what was written: life.json and life.png, beside the
    model file).

    Args:
        path: the folder that ``fastnca grow`` wrote, or a model file. target: see :func:`find_target`.
        until: the greatest age to measure, in steps. backend: see :func:`fastnca.load`. on_progress: see
            :func:`measure`.

    Raises ValueError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    ages = check_ages(until)
    model_file = find_model_file(path)
    model = load_sound(model_file, backend=backend, vocoder="griffinlim")  # nothing is decoded
    life = measure(model, find_target(model_file, model.card, target), ages, HEALING, on_progress)
    return life, life.save(model_file.parent)

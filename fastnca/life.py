"""How alive a grown sound is: how it grows from one cell, ages, and heals."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .automaton import reference
from .files import atomic_write
from .generate import grow_on
from .model import decode_db
from .sound.convention import HOP_LENGTH, SAMPLE_RATE
from .sound.files import load_audio
from .sound.pictures import save_life
from .sound.spectrogram import analyze
from .sound_model import SETTLING_STEPS, find_model_file, load

AGES = (96, 192, 384, 1000, 10_000)  # steps
HEALING = (32, 96, 384)  # steps after a wound
HOLES = (0.05, 0.11, 0.25, 0.5)  # shares of the area
SLICE = 0.1  # share of the frames, or of the bands, that a slice or a band takes
PATIENCE = 4  # times the least steps to fill: a growth that is not full by then never will be


@dataclass
class Wound:
    """A wound and how it heals: errors in dB, by grid ("mel", "linear") and, after the wound, by steps.

    kind: "hole", "time slice" or "band". share: of the area. twin: the same growth without the wound.
    """

    kind: str
    share: float
    before: dict
    wounded: dict
    healed: dict
    twin: dict


@dataclass
class Life:
    """What :func:`measure` found; errors are mean absolute distances from the target over all cells, in dB.

    steps_to_full: from one live cell in the middle of each grid until life is in every cell; None if it never was.
    at_full: {grid: error} then. at: {grid: {steps: error}} at ages. wounds: list of Wound. stages: grids to look at,
    [(title, (mel_db, linear_db))].
    """

    steps_to_full: int | None
    at_full: dict
    at: dict
    wounds: list
    stages: list = field(repr=False)

    def to_dict(self):
        """What life.json holds."""
        return {
            "one_seed_steps_to_full": self.steps_to_full,
            **{f"one_seed_{grid}_l1_db": self.at_full.get(grid) for grid in ("mel", "linear")},
            **{f"{grid}_l1_db_at": errors for grid, errors in self.at.items()},
            "wounds": [
                {"kind": wound.kind, "share": wound.share}
                | {f"{grid}_{when}": getattr(wound, when)[grid] for grid in self.at for when in _WHEN}
                for wound in self.wounds
            ],
        }


_WHEN = ("before", "wounded", "healed", "twin")


def boxes(height, width):
    """The wounds of a grid: [(kind, share of the area, rows, columns)], slices in its middle."""

    def middle(size, share):
        length = max(1, round(size * share))
        return slice((size - length) // 2, (size - length) // 2 + length)

    whole = slice(None)
    holes = [("hole", share, middle(height, share**0.5), middle(width, share**0.5)) for share in HOLES]
    return [
        *holes,
        ("time slice", SLICE, whole, middle(width, SLICE)),
        ("band", SLICE, middle(height, SLICE), whole),
    ]


@torch.no_grad()
def measure(model, target, ages=AGES, on_step=None):
    """Grows a sound from one cell and judges it at those ages, wounds it and lets it heal -> Life.

    Args:
        model: a SoundModel. target: the DualSpectrogram that it learned.
        ages: in steps. on_step: called with (steps done, steps in all), where the latter is an estimate.
    """
    automaton, plan = model.automaton, model.plan(target.n_frames)
    targets = dict(zip(("mel", "linear"), (target.mel_db, target.linear_db)))
    least = automaton.steps_to_fill(target.n_frames)
    cuts = boxes(*target.linear_db.shape)
    total = max(*ages, least + SETTLING_STEPS) + len(cuts) * max(HEALING)
    done = 0

    def errors(grids):
        pairs = zip(grids, targets.items())
        return {name: (decode_db(grid)[0].cpu() - level).abs().mean().item() for grid, (name, level) in pairs}

    def grow(grids, steps):
        nonlocal done
        while steps > 0:  # in parts, so that somebody can watch
            part = min(steps, 96)
            grids, steps, done = grow_on(automaton, plan, grids, part), steps - part, done + part
            if on_step:
                on_step(min(done, total), total)
        return grids

    def full(grids):
        return all(reference.alive(grid).all() for grid in grids)

    seeds = automaton.seed(plan.n_frames)
    grids, steps_to_full = grow(seeds, least), least
    while not full(grids) and steps_to_full < PATIENCE * least:
        grids, steps_to_full = grow(grids, 1), steps_to_full + 1
    grown = steps_to_full if full(grids) else None
    at_full = errors(grids) if grown else {}
    mature = grow(grids, SETTLING_STEPS)

    at = {name: {} for name in targets}
    age, grids = 0, seeds
    stages = []
    for step in sorted({*ages, least // 4, least // 2, steps_to_full} - {0}):
        grids, age = grow(grids, step - age), step
        if step in ages:
            for name, error in errors(grids).items():
                at[name][step] = error
        stages.append((f"{step} steps", automaton.levels(grids)))

    twins, twin, age = {}, mature, 0
    for step in HEALING:
        twin, age = grow(twin, step - age), step
        twins[step] = errors(twin)
    wounds = []
    for cut in range(len(cuts)):
        wounded = []
        for grid in mature:
            kind, share, rows, columns = boxes(*grid.shape[2:])[cut]
            wounded.append(grid.clone())
            wounded[-1][:, :, rows, columns] = 0.0
        healed, healing, age = {}, wounded, 0
        for step in HEALING:
            healing, age = grow(healing, step - age), step
            healed[step] = errors(healing)
            if kind == "hole" and share == 0.25 and step == HEALING[1]:
                stages += [("a wound", automaton.levels(wounded)), (f"{step} steps later", automaton.levels(healing))]
        by_step = [{name: {s: e[name] for s, e in found.items()} for name in targets} for found in (healed, twins)]
        wounds.append(Wound(kind, share, errors(mature), errors(wounded), *by_step))
    return Life(grown, at_full, at, wounds, stages)


def life(path, *, target=None, until=AGES[-1], backend="auto", on_step=None):
    """Measures the sound of a finished run and writes ``life.json`` and ``life.png`` beside its model -> Life.

    Args:
        path: the folder that ``fastnca grow`` wrote, or a model file.
        target: the recording, if it is not ``target.wav`` beside the model.
        until: leaves out the ages above it.

    Raises FileNotFoundError where there is no model or no recording, ValueError for another bad input.
    """
    model_file = find_model_file(path)
    recording = Path(target) if target else model_file.with_name("target.wav")
    if not recording.is_file():
        raise FileNotFoundError(f"no recording {recording} to compare with; name it with --target")
    ages = [age for age in AGES if age <= until]
    if not ages:
        raise ValueError(f"until must be at least {min(AGES)} steps, got {until}")
    model = load(model_file, backend=backend)
    samples, _ = load_audio(recording, duration=model.card.n_frames * HOP_LENGTH / SAMPLE_RATE)
    spectrogram = analyze(samples, model.card.scale.bands)
    if spectrogram.n_frames != model.card.n_frames:
        raise ValueError(
            f"{recording} has {spectrogram.n_frames} frames, and the sound was learned from {model.card.n_frames}"
        )
    found = measure(model, spectrogram, ages, on_step)
    with atomic_write(model_file.with_name("life.json")) as file:
        file.write((json.dumps(found.to_dict(), indent=2) + "\n").encode())
    stages = [(title, model.spectrogram(*levels)) for title, levels in found.stages]
    save_life(model_file.with_name("life.png"), found.at, [("target", spectrogram), *stages])
    return found

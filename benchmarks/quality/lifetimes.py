"""What becomes of grown sounds beyond what they were trained for: longer, older, damaged.

    python -m benchmarks.quality.lifetimes RUN... [--what lengths ages damage] [-o DIR]

RUN is a folder that ``fastnca grow`` wrote. Prints Markdown tables, and writes them to DIR as ``lifetimes.md`` and
``lifetimes.csv``. Sounds are decoded by Griffin-Lim.

- lengths: pitch (peak of the windowed spectrum, refined by a parabola through its neighbors in dB, of the first and
  the last half of the sounding part), time from the start to 6 dB and from 6 dB to the end below the loudest 23 ms,
  and the level in eight equal parts of the sound, in dB below that loudest moment.
- ages: distance of the grown grids from the target after more steps than were trained.
- damage: mean absolute error of the mel grid inside a block of cells, the middle third of both axes, that was zeroed in
  all channels of both grids: before, right after, and 96 steps later; the undamaged grid of that age beside it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import fastnca
from fastnca.model import TIMES, decode_db
from fastnca.sound import metrics
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import load_audio
from fastnca.sound.spectrogram import analyze

from .. import report

LENGTHS = (0.5, 1, 2, 4)
AGES = (96, 128, 192, 384, 1000)
BLOCK = 512  # samples, 23 ms


def read_run(folder):
    """(SoundModel, DualSpectrogram of its target) of a run's folder."""
    model = fastnca.load(folder, vocoder="griffinlim")
    return model, analyze(load_audio(folder / "target.wav")[0], model.card.scale.bands)


def peak_frequency(samples):
    """Hz of the strongest peak of the windowed spectrum of samples [n]."""
    level = np.log(np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * len(samples))) + 1e-12)
    index = 1 + np.argmax(level[1:-1])
    before, at, after = level[index - 1 : index + 2]
    offset = 0.5 * (before - after) / (before - 2 * at + after)
    return (index + offset) * SAMPLE_RATE / (4 * len(samples))


def describe(samples):
    """Pitches in Hz, times in s and levels in dB of samples [n], as cells of a row."""
    blocks = samples[: len(samples) // BLOCK * BLOCK].reshape(-1, BLOCK)
    level = 10 * np.log10((blocks**2).mean(axis=1) + 1e-12)
    loud = np.flatnonzero(level > level.max() - 6.0)
    start, end = loud[0] * BLOCK, (loud[-1] + 1) * BLOCK
    half = (start + end) // 2
    pitches = [peak_frequency(part) for part in (samples[start:half], samples[half:end])]
    levels = [10 * np.log10((part**2).mean() + 1e-12) - level.max() for part in np.array_split(samples, 8)]
    return {
        "pitch, Hz": "{:.1f} {:.1f}".format(*pitches),
        "-6 dB after, s": f"{start / SAMPLE_RATE:.2f}",
        "and before the end, s": f"{(len(samples) - end) / SAMPLE_RATE:.2f}",
        "levels, dB": " ".join(f"{level:.1f}" for level in levels),
    }


def lengths(name, model, target):
    yield {"run": name, "time": "target", "length": "1x", **describe(model.vocoder.decode(target))}
    for time in TIMES if model.automaton.knows_time else ("stretch",):
        for factor in LENGTHS:
            sound = model.grow(round(factor * target.n_frames), time=time)
            yield {"run": name, "time": time, "length": f"{factor}x", **describe(sound.samples)}


def ages(name, model, target):
    grids, age = model.automaton.seed(target.n_frames), 0
    for steps in AGES:
        grids, age = model.automaton.rollout(*grids, steps - age), steps
        result = metrics.grid_metrics(target.with_grids(*(decode_db(grid)[0] for grid in grids)), target)
        row = {"run": name, "steps": steps, **{key: f"{result[key]:.2f}" for key in ("mel_l1_db", "linear_l1_db")}}
        yield {**row, "largest hidden value": max(grid.abs().max().item() for grid in grids)}


def middle(grid):
    """The middle third of both axes of a grid [..., H, T], as a view."""
    rows, columns = (slice(size // 3, 2 * size // 3) for size in grid.shape[-2:])
    return grid[..., rows, columns]


def damage(name, model, target):
    whole = model.automaton.rollout(*model.automaton.seed(target.n_frames), model.card.num_steps)
    damaged = tuple(grid.clone() for grid in whole)
    for grid in damaged:
        middle(grid).zero_()
    healed, older = (model.automaton.rollout(*grids, 96) for grids in (damaged, whole))
    errors = [(decode_db(mel)[0].cpu() - target.mel_db).abs() for mel, _ in (whole, damaged, healed, older)]
    titles = ("before", "damaged", "96 steps later", "undamaged, 96 steps later")
    row = {"run": name, **{title: f"{middle(error).mean():.2f}" for title, error in zip(titles, errors, strict=True)}}
    outside = torch.ones_like(target.mel_db, dtype=torch.bool)
    middle(outside).fill_(False)
    yield {**row, "outside, 96 steps later": f"{errors[2][outside].mean():.2f}"}


TABLES = {"lengths": lengths, "ages": ages, "damage": damage}


def main(arguments=None):
    """-> {table: rows}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.lifetimes", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--what", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder for lifetimes.md and lifetimes.csv")
    options = parser.parse_args(arguments)
    runs = {folder.name: read_run(folder) for folder in options.runs}
    tables = {}
    with torch.no_grad():
        for what in options.what:
            tables[what] = [row for name, run in runs.items() for row in TABLES[what](name, *run)]
    text = "\n\n".join(f"**{what}**\n\n{report.table(rows)}" for what, rows in tables.items())
    text = f"{report.machine_line(report.machine())}\n\n{text}\n"
    if options.out:
        rows = [{"table": what, **row} for what, rows in tables.items() for row in rows]
        report.write(options.out, "lifetimes", text, rows)
    print(text)
    return tables


if __name__ == "__main__":
    main()

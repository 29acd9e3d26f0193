"""What becomes of finished runs beyond what they were trained for: longer, older, damaged.

    python -m benchmarks.alive RUN... [--what lengths ages damage]

RUN is a folder that ``fastnca grow`` wrote. Prints Markdown tables. Sounds are decoded by Griffin-Lim.

- lengths: pitch (peak of the windowed spectrum, refined by a parabola through its neighbours in dB, of the first and
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

from fastnca import audio, decode_db, load_model, metrics, vocoder
from fastnca.model import TIMES, frame_times
from fastnca.run import MODEL_FILE

LENGTHS = (0.5, 1, 2, 4)
AGES = (96, 128, 192, 384, 1000)


def read_run(folder):
    model, sound = load_model(folder / MODEL_FILE)
    target = audio.analyze(audio.load_audio(folder / "target.wav")[0], audio.SpectrogramConfig(**sound["spectrogram"]))
    return model, sound, target


def peak_frequency(samples):
    """Hz of the strongest peak of a windowed spectrum."""
    level = np.log(np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * len(samples))) + 1e-12)
    index = 1 + np.argmax(level[1:-1])
    before, at, after = level[index - 1 : index + 2]
    offset = 0.5 * (before - after) / (before - 2 * at + after)
    return (index + offset) * audio.SAMPLE_RATE / (4 * len(samples))


def describe(samples):
    """(pitches of the two halves in Hz, seconds to and after the level of -6 dB, eight levels in dB)."""
    frames = samples[: len(samples) // 512 * 512].reshape(-1, 512)
    level = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
    level -= level.max()
    loud = np.flatnonzero(level > -6.0)
    start, end = loud[0] * 512, (loud[-1] + 1) * 512
    half = (start + end) // 2
    pitches = [peak_frequency(part) for part in (samples[start:half], samples[half:end])]
    edges = start / audio.SAMPLE_RATE, (len(samples) - end) / audio.SAMPLE_RATE
    parts = [10 * np.log10((part**2).mean() + 1e-12) for part in np.array_split(samples, 8)]
    loudest = 10 * np.log10((frames**2).mean(axis=1).max())
    return pitches, edges, [part - loudest for part in parts]


def print_row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_head(*cells):
    print_row(*cells)
    print_row(*("---" for _ in cells))


def lengths(runs):
    print_head("run", "time", "length", "pitch, Hz", "-6 dB after, s", "and before the end, s", "levels, dB")
    decoder = vocoder.resolve_vocoder("griffinlim")
    for name, (model, sound, target) in runs.items():
        sounds = {("target", 1): target}
        for time in TIMES:
            for factor in LENGTHS:
                n_frames = round(factor * target.n_frames)
                times = frame_times(n_frames, target.n_frames, time)
                grids = model.grow(n_frames, sound["num_steps"], times)
                references = target.mel_ref_db, target.linear_ref_db
                sounds[time, factor] = audio.DualSpectrogram(*grids, *references, target.config)
        for (time, factor), grown in sounds.items():
            pitches, edges, levels = describe(np.asarray(decoder.decode(grown)))
            pitches, levels = ("{:.1f} {:.1f}".format(*pitches), " ".join(f"{level:.1f}" for level in levels))
            print_row(name, time, f"{factor}x", pitches, *(f"{edge:.2f}" for edge in edges), levels)


def ages(runs):
    print_head("run", "steps", "mel_l1_db", "linear_l1_db", "largest hidden value")
    for name, (model, _, target) in runs.items():
        grids, age = model.seed(target.n_frames), 0
        for steps in AGES:
            grids, age = model.rollout(*grids, steps - age), steps
            result = metrics.grid_metrics(*(decode_db(grid)[0] for grid in grids), target)
            largest = max(grid.abs().max().item() for grid in grids)
            print_row(name, steps, f"{result['mel_l1_db']:.2f}", f"{result['linear_l1_db']:.2f}", f"{largest:.3g}")


def damage(runs):
    print_head("run", "before", "damaged", "96 steps later", "undamaged, 96 steps later", "outside, 96 steps later")
    for name, (model, sound, target) in runs.items():

        def errors(grids, inside, target=target):
            error = (decode_db(grids[0])[0] - target.mel_db).abs()
            block = torch.zeros_like(error, dtype=torch.bool)
            block[tuple(slice(size // 3, 2 * size // 3) for size in error.shape)] = True
            return f"{error[block if inside else ~block].mean().item():.2f}"

        whole = model.rollout(*model.seed(target.n_frames), sound["num_steps"])
        damaged = tuple(grid.clone() for grid in whole)
        for grid in damaged:
            rows, columns = (slice(size // 3, 2 * size // 3) for size in grid.shape[2:])
            grid[:, :, rows, columns] = 0.0
        healed, older = model.rollout(*damaged, 96), model.rollout(*whole, 96)
        inside = [errors(grids, True) for grids in (whole, damaged, healed, older)]
        print_row(name, *inside, errors(healed, False))


WHAT = {"lengths": lengths, "ages": ages, "damage": damage}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    arguments = parser.parse_args()
    runs = {folder.name: read_run(folder) for folder in arguments.runs}
    with torch.no_grad():
        for what in arguments.what:
            print(f"\n{what}\n")
            WHAT[what](runs)


if __name__ == "__main__":
    main()

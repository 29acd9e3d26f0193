"""Left-out notes: ``python -m benchmarks.quality.instruments SPACE LEARNED LEFT_OUT -o DIR``, compared with the truth.

SPACE was learned from LEARNED by ``fastnca learn --instruments``: a folder with a folder for each instrument. LEFT_OUT
has folders of the same names, with notes that were not learned. Each of these is grown at its pitch, as the space has
it between the learned notes, see ``Space.mix``, and beside it librosa's ``pitch_shift`` of the learned recording whose
pitch is nearest.

Written to DIR: ``instruments.csv`` and ``instruments.md``, a row for each note, and the medians.

- cents: what pYIN hears in the wav, from what it hears in the recording; empty where it hears none
- mel, linear: mean absolute errors in dB from the recording's grids, over the common frames. neighbor: the errors of
  the learned note whose pitch is nearest, from its own recording. shifted: those of librosa's ``pitch_shift``
"""

import argparse
import statistics
import sys
from math import log2
from pathlib import Path

import librosa

import fastnca
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import load_audio
from fastnca.sound.pitch import find_pitch
from fastnca.sound.spectrogram import analyze

from .. import report
from .pitches import cents_between, errors


def measure(space, learned, recording):
    """The row of one note. learned: {name in the space: path of its recording} of its instrument."""
    notes = {name: space.members[name] for name in learned if space.members[name].pitch_hz}
    if not notes:
        raise ValueError(f"no note of the instrument of {recording} was learned with a pitch")
    seconds = next(iter(notes.values())).card.n_frames * 256 / SAMPLE_RATE
    samples, _ = load_audio(recording, seconds)
    hertz = find_pitch(samples)
    if hertz is None:
        raise ValueError(f"{recording} has no pitch")
    nearest = min(notes, key=lambda name: abs(log2(notes[name].pitch_hz / hertz)))
    neighbor, _ = load_audio(learned[nearest], seconds)
    semitones = 12 * log2(hertz / notes[nearest].pitch_hz)
    shifted = librosa.effects.pitch_shift(neighbor, sr=SAMPLE_RATE, n_steps=semitones)
    grown = space.mix({nearest: 1.0}, hertz).grow()
    target = analyze(samples)
    row = {"note": recording.stem, "Hz": hertz, "nearest": nearest, "semitones": semitones}
    row["cents"] = cents_between(find_pitch(grown.samples), hertz)
    row["shifted: cents"] = cents_between(find_pitch(shifted), hertz)
    found = {
        "": errors(grown.spectrogram, target),
        "neighbor: ": [space.members[nearest].metrics[f"{name}_l1_db"] for name in ("mel", "linear")],
        "shifted: ": errors(analyze(shifted), target),
    }
    for who, pair in found.items():
        row |= {f"{who}{name}, dB": error for name, error in zip(("mel", "linear"), pair)}
    return row


def summary(rows):
    """The rows as Markdown, and their medians."""
    medians = {}
    for name in rows[0]:
        values = [row[name] for row in rows if isinstance(row[name], float)]
        if name.endswith("cents"):
            medians[f"|{name}|"] = statistics.median(map(abs, values)) if values else None
        elif name.endswith("dB"):
            medians[name] = statistics.median(values)
    nearer = {}
    for name in ("mel", "linear"):
        count = sum(row[f"{name}, dB"] < row[f"shifted: {name}, dB"] for row in rows)
        nearer[f"nearer than the shifted note, {name}"] = f"{count} of {len(rows)}"
    return "\n\n".join([report.table(rows), "**Medians**", report.table([{**medians, **nearer}])]) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.instruments", description=__doc__.split("\n")[0]
    )
    parser.add_argument("space", help="folder that fastnca learn wrote")
    parser.add_argument("learned", type=Path, help="folder of instruments, folders of the notes that it learned")
    parser.add_argument("left_out", type=Path, help="folder of the same instruments, with other notes")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    options = parser.parse_args(arguments)
    space = fastnca.load(options.space, vocoder="griffinlim")
    facts, rows = report.machine_line(report.machine()), []
    for recording in sorted(path for path in options.left_out.glob("*/*") if path.is_file()):
        print(recording.stem, file=sys.stderr, flush=True)
        own = options.learned / recording.parent.name
        learned = {path.stem: path for path in own.iterdir() if path.stem in space}
        rows.append(measure(space, learned, recording))
        text = f"{facts}\n\n{summary(rows)}"
        report.write(options.out, "instruments", text, rows)
    print(text)


if __name__ == "__main__":
    main()

"""A sound grown at other pitches: ``python -m benchmarks.quality.pitches RUN... -o DIR`` asks a tracker what it hears.

A RUN is the folder of a sound with a pitch that ``fastnca grow`` wrote. It is grown from one cell at each of the
``--semitones`` from its own pitch, and at the pitch of each recording of ``--others``, notes of the same instrument.

Written to DIR: ``pitches.csv`` and ``pitches.md``, a row for each growth.

- cents: what pYIN hears in the wav, from the pitch that was asked for; empty where it hears none
- old partials: the level of the recording's partials, those that are none of the new pitch's, against that of the new
  pitch's, in dB; in the linear grid, over all frames. Beside it the same of librosa's ``pitch_shift`` of the recording.
- mel, linear: mean absolute errors in dB from the other recording's grids, and those of librosa's ``pitch_shift``
"""

import argparse
import math
import statistics
from pathlib import Path

import librosa
import numpy as np

import fastnca
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import load_audio
from fastnca.sound.pitch import find_pitch
from fastnca.sound.spectrogram import analyze, linear_centers

from .. import report

SEMITONES = (-7, -3, 3, 7)
ERRORS = ("mel, dB", "linear, dB")
PARTIALS = 8  # of the recording, which are looked for
APART_HZ = 2.5 * SAMPLE_RATE / 1024  # at which two partials do not meet in a bin's main lobe


def cents_between(found, asked):
    return None if found is None else 1200.0 * math.log2(found / asked)


def old_partials_db(spectrogram, old_hz, new_hz):
    """How loud the first partials of the old pitch still are beside those of the new; None where all of them meet."""
    partials = np.arange(1, PARTIALS + 1)
    old, new = (partials * hz for hz in (old_hz, new_hz))
    every_new = np.arange(1, SAMPLE_RATE / 2 // new_hz + 1) * new_hz
    old = [hz for hz in old if np.abs(every_new - hz).min() > APART_HZ and hz < SAMPLE_RATE / 2]
    if not old:
        return None
    power = (10.0 ** (spectrogram.linear_db.double() / 10.0)).mean(dim=1).numpy()
    centers = linear_centers().numpy()

    def level(hertz):
        return np.mean([power[np.abs(centers - hz).argmin()] for hz in hertz if hz < SAMPLE_RATE / 2])

    return 10.0 * math.log10(level(old) / level(new))


def errors(spectrogram, target):
    """Mean absolute errors (mel, linear) in dB, over the common frames."""
    n_frames = min(spectrogram.n_frames, target.n_frames)
    pairs = ((spectrogram.mel_db, target.mel_db), (spectrogram.linear_db, target.linear_db))
    return [(mine[:, :n_frames] - other[:, :n_frames]).abs().mean().item() for mine, other in pairs]


def measure(folder, semitones, others):
    """The rows of one run; ``others`` are paths of recordings."""
    model = fastnca.load(folder, vocoder="griffinlim")
    own_hz = model.automaton.places and model.automaton.places.pitch_hz
    if own_hz is None:
        raise ValueError(f"{folder} was learned without a pitch")
    recording, _ = load_audio(Path(folder) / "target.wav")
    asked = [(f"{shift:+g} semitones", own_hz * 2 ** (shift / 12), None) for shift in semitones]
    for path in others:
        samples, _ = load_audio(path, len(recording) / SAMPLE_RATE)
        asked.append((Path(path).stem, find_pitch(samples), samples))
    rows = []
    for name, hertz, samples in asked:
        if hertz is None:
            raise ValueError(f"{name} has no pitch")
        grown = model.grow(pitch_hz=hertz)
        shift = 12.0 * math.log2(hertz / own_hz)
        shifted = analyze(librosa.effects.pitch_shift(recording, sr=SAMPLE_RATE, n_steps=shift))
        row = {"run": Path(folder).name, "grown at": name, "Hz": hertz, "semitones": shift}
        row["cents"] = cents_between(find_pitch(grown.samples), hertz)
        row["old partials, dB"] = old_partials_db(grown.spectrogram, own_hz, hertz)
        row["pitch_shift: old partials, dB"] = old_partials_db(shifted, own_hz, hertz)
        if samples is not None:
            target = analyze(samples)
            row["mel, dB"], row["linear, dB"] = errors(grown.spectrogram, target)
            row["pitch_shift: mel, dB"], row["pitch_shift: linear, dB"] = errors(shifted, target)
        rows.append(row)
    return rows


def summary(rows):
    """Rows as Markdown, and the means of those that have a true recording."""
    parts = [report.table(rows)]
    true = [row for row in rows if "mel, dB" in row]
    if true:
        means = {name: statistics.fmean(row[name] for row in true) for name in true[0] if name.endswith(ERRORS)}
        parts.append("**Means over the true recordings**\n\n" + report.table([means]))
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.pitches", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that fastnca grow wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    parser.add_argument("--semitones", nargs="*", type=float, default=SEMITONES)
    parser.add_argument("--others", nargs="*", default=[], metavar="RECORDING", help="notes of the same instrument")
    options = parser.parse_args(arguments)
    rows = []
    for run in options.runs:
        rows += measure(run, options.semitones, options.others)
        report.write(options.out, "pitches", summary(rows), rows)
    print(summary(rows))


if __name__ == "__main__":
    main()

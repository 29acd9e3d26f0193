"""What lies between sounds of a space: ``python -m benchmarks.morph SPACE A:B... -o DIR`` measures ways from A to B.

Each way is seven sounds, for alpha = 0, 1/6, ... 1:

- learned: ``space.morph(A, B, alpha)``, grown from one cell
- crossfade: (1 - alpha) a + alpha b of the waveforms
- dB: the same of both grids in dB. magnitude: of both grids in linear amplitude
- transport: of each frame's power over the bins by one-dimensional optimal transport, which moves each quantile of the
  one to that of the other; the frame's level in dB (see Henderson and Solomon, arXiv 1906.06763). It starts from the
  linear grid as the decoder corrects it by the mel grid.

The ends of all are the learned sounds, and all grids are decoded by Griffin-Lim. A mixture has the length of the
learned morph, to which the ends are cut or filled with silence. Everything is then measured in the samples, at their
levels before a sound beyond full scale is made quieter.

Written to DIR: ``morph.csv``, a row for each pair and way; ``morph.md``, a table for each pair, medians, and how often
the learned way is the better one; for each pair with ``--pictures`` a PNG of the sounds half-way, and with ``--sounds``
their wav files. m is the sound half-way.

- smoothness: root mean square of the second differences over alpha, by the square of its step; linearity: root mean
  square of the distance from the straight line between the ends. Both are means over the features of timbre, in these
  units: octaves of the mean spectrum's centroid, spread and rolloff (95 % of the power), doublings of the attack time
  and of the temporal centroid, 6 dB of level, 10 dB of flatness. Lower is better; morph.csv has each feature's.
- balance: |d(m, A) - d(m, B)| / d(A, B), 0 for what is as near to A as to B. detour: (d(m, A) + d(m, B)) / d(A, B),
  1 for what lies on the way. d: mean absolute difference of the mel spectrograms in dB, down to 80 dB below the louder
  end, the shorter one filled with silence. A crossfade can be good at both.
- unevenness: standard deviation by mean of the distances d of the six steps
- own: ||m - (a A + b B)|| / ||m|| with the best a, b >= 0, in linear amplitude; near 0 for a superposition, but also
  for a morph of like sounds
- peaks: of m's spectrum, by the mean of A's and B's: about 1 for one sound, up to 2 for two. Those count that are at
  most 40 dB below the highest and stand out by 6 dB.
- attack: how far, in ms, m's attack time lies above (or, if negative, below) both ends'; 0 between them. It is the time
  from 20 % to 80 % of the highest level.
- cents: m's pitch by pYIN, from half-way between those of A and B; empty where one of the three has no steady one
- level, flatness: how far m lies above (below) both ends, in dB; 0 between them. Flatness is of the power in the frames
  within 40 dB of the loudest.
- one sound: m has at most 1.25 times the peaks of the end that has more, a steady pitch if both ends have one, and an
  attack at most 10 ms outside of the ends'
- sane: level from -10 to 1 and flatness at most 6, neither silence nor noise nor louder than both
"""

import argparse
import math
import statistics
import sys
from functools import cached_property
from pathlib import Path

import librosa
import numpy as np
from scipy.optimize import nnls
from scipy.signal import find_peaks, welch

import fastnca
from fastnca.sound.convention import DB_RANGE, HOP_LENGTH, POWER_FLOOR, SAMPLE_RATE
from fastnca.sound.files import write_wav
from fastnca.sound.pictures import save_picture
from fastnca.sound.pitch import find_pitch
from fastnca.sound.spectrogram import DualSpectrogram, Scale, analyze, from_db, linear_centers, mel_basis, to_magnitude
from fastnca.sound.vocoder import merge_magnitudes

from . import report

ALPHAS = tuple(step / 6 for step in range(7))
MIDDLE = 3
UNITS = {
    "centroid": "octave",
    "spread": "octave",
    "rolloff": "octave",
    "attack": "doubling",
    "temporal centroid": "doubling",
    "level": "6 dB",
    "flatness": "10 dB",
}
ROLLOFF = 0.95
ENVELOPE_FRAME, ENVELOPE_HOP = 512, 64
SHORTEST_ATTACK = 0.01  # in s; what is shorter the envelope does not tell apart
PEAK_WINDOW = 4096  # tells partials about 16 Hz apart from one another, the grids' window only 64 Hz
PEAK_RANGE_DB, PEAK_DB = 40.0, 6.0
MEDIANS = ("smoothness", "linearity", "balance", "detour", "unevenness", "own", "peaks")
COLUMNS = {
    **{name: (name, None) for name in ("way", *MEDIANS)},
    "attack, ms": ("attack, ms", "{:.0f}"),
    "cents": ("cents", "{:.0f}"),
    "cents, absolute": ("cents, absolute", "{:.0f}"),
    **{name: (name, None) for name in ("with a pitch", "level, dB", "flatness, dB", "one sound", "sane")},
}


def mixed(one, other, alpha):
    return (1.0 - alpha) * one + alpha * other


def fitted(array, size, silence=0.0):
    """An array [..., n] cut or filled to [..., size]."""
    return librosa.util.fix_length(np.asarray(array), size=size, axis=-1, constant_values=silence)


def mix_db(one, other, alpha, n_frames):
    grids = [
        mixed(*(fitted(grid, n_frames, -DB_RANGE) for grid in pair), alpha)
        for pair in ((one.mel_db, other.mel_db), (one.linear_db, other.linear_db))
    ]
    mel_ref_db = mixed(one.scale.mel_ref_db, other.scale.mel_ref_db, alpha)
    linear_ref_db = mixed(one.scale.linear_ref_db, other.scale.linear_ref_db, alpha)
    return DualSpectrogram(*grids, Scale(mel_ref_db, linear_ref_db, one.scale.bands))


def from_magnitudes(mel, linear, bands):
    """Linear amplitudes [80, T], [513, T] -> DualSpectrogram."""
    levels = [20.0 * np.log10(np.maximum(magnitude, 1e-20)) for magnitude in (mel, linear)]
    refs = [float(level.max()) for level in levels]
    return DualSpectrogram(
        *(np.clip(level - ref, -DB_RANGE, 0.0) for level, ref in zip(levels, refs)), Scale(*refs, bands)
    )


def mix_magnitudes(one, other, alpha, n_frames):
    ends = [
        (to_magnitude(end.mel_db, end.scale.mel_ref_db), to_magnitude(end.linear_db, end.scale.linear_ref_db))
        for end in (one, other)
    ]
    mixtures = [mixed(*(fitted(magnitude, n_frames) for magnitude in pair), alpha) for pair in zip(*ends)]
    return from_magnitudes(*mixtures, one.scale.bands)


def transport(one, other, alpha):
    """Power of two frames [bins] -> that of what lies between. A silent frame is the other one 80 dB below."""
    one, other = (frame if frame.any() else 1e-8 * rest for frame, rest in ((one, other), (other, one)))
    if not one.any():
        return one
    sums = np.cumsum(one), np.cumsum(other)
    shares = [total / total[-1] for total in sums]
    upper = np.union1d(*shares)  # between two of these borders all power goes from one bin to one other
    power = np.diff(upper, prepend=0.0)
    place = mixed(*(np.searchsorted(share, upper - power / 2) for share in shares), alpha)
    lower = place.astype(int)
    bins = len(one)
    moved = np.bincount(lower, power * (lower + 1 - place), bins + 1)
    moved += np.bincount(lower + 1, power * (place - lower), bins + 1)
    return moved[:bins] * sums[0][-1] ** (1.0 - alpha) * sums[1][-1] ** alpha


def mix_by_transport(one, other, alpha, n_frames):
    powers = [np.square(fitted(merge_magnitudes(end), n_frames), dtype=np.float64) for end in (one, other)]
    power = np.stack([transport(*frames, alpha) for frames in zip(powers[0].T, powers[1].T)], axis=1)
    mel = mel_basis(one.scale.bands).double().numpy() @ np.sqrt(power + POWER_FLOOR)
    return from_magnitudes(mel, np.sqrt(power), one.scale.bands)


MIXTURES = {"dB": mix_db, "magnitude": mix_magnitudes, "transport": mix_by_transport}


class Heard:
    """What is measured in one sound. samples: [n] at 22.05 kHz, a multiple of the hop."""

    def __init__(self, samples, bands):
        self.samples = np.asarray(samples, dtype=np.float32)
        self.spectrogram = analyze(self.samples, bands)

    @cached_property
    def magnitude(self):
        return to_magnitude(self.spectrogram.linear_db, self.spectrogram.scale.linear_ref_db).double().numpy()

    @cached_property
    def envelope(self):
        return librosa.feature.rms(y=self.samples, frame_length=ENVELOPE_FRAME, hop_length=ENVELOPE_HOP)[0]

    @cached_property
    def attack_seconds(self):
        level = self.envelope / self.envelope.max()
        high = np.argmax(level >= 0.8)
        low = np.flatnonzero(level[:high] <= 0.2)
        return max(SHORTEST_ATTACK, float(high - (low[-1] if len(low) else 0)) * ENVELOPE_HOP / SAMPLE_RATE)

    @cached_property
    def level_db(self):
        return 10.0 * math.log10(np.mean(np.square(self.samples, dtype=np.float64)))

    @cached_property
    def flatness_db(self):
        """Geometric by arithmetic mean of the power over the bins, in the mean over the frames."""
        power = from_db(self.spectrogram.linear_db, self.spectrogram.scale.linear_ref_db).double().square()
        power = power[:, power.sum(dim=0) > 1e-4 * power.sum(dim=0).max()]
        return (10.0 * (power.log10().mean(dim=0) - power.mean(dim=0).log10())).mean().item()

    @cached_property
    def features(self):
        """{feature: value in its unit}"""
        hertz = linear_centers().double().numpy()
        share = np.square(self.magnitude).sum(axis=1)
        share /= share.sum()
        centroid = (share * hertz).sum()
        energy = np.square(self.envelope, dtype=np.float64)
        seconds = (energy * np.arange(len(energy))).sum() / energy.sum() * ENVELOPE_HOP / SAMPLE_RATE
        return {
            "centroid": math.log2(centroid),
            "spread": 0.5 * math.log2((share * (hertz - centroid) ** 2).sum()),
            "rolloff": math.log2(max(hertz[1], hertz[np.argmax(np.cumsum(share) >= ROLLOFF)])),
            "attack": math.log2(self.attack_seconds),
            "temporal centroid": math.log2(seconds),
            "level": self.level_db / 6.0,
            "flatness": self.flatness_db / 10.0,
        }

    @cached_property
    def peaks(self):
        window = min(PEAK_WINDOW, len(self.samples))
        _, power = welch(self.samples, nperseg=window, noverlap=window * 3 // 4, nfft=PEAK_WINDOW, detrend=False)
        level = 10.0 * np.log10(np.maximum(power, 1e-30))
        return len(find_peaks(level, height=level.max() - PEAK_RANGE_DB, prominence=PEAK_DB)[0])

    @cached_property
    def pitch_hz(self):
        return find_pitch(self.samples)


def distances(sounds, pairs):
    """d of pairs of sounds, by their numbers. The first and the last sound are the ends."""
    scales = [sound.spectrogram.scale for sound in sounds]
    floor = max(scales[0].mel_ref_db, scales[-1].mel_ref_db) - DB_RANGE
    n_frames = max(sound.spectrogram.n_frames for sound in sounds)
    levels = [
        fitted((sound.spectrogram.mel_db + scale.mel_ref_db).clamp(min=floor), n_frames, floor)
        for sound, scale in zip(sounds, scales)
    ]
    return [float(np.abs(levels[one] - levels[other]).mean()) for one, other in pairs]


def curvature(values):
    """(smoothness, linearity) of a feature's values at ALPHAS."""
    values = np.asarray(values)
    second = np.diff(values, 2) / ALPHAS[1] ** 2
    straight = mixed(values[0], values[-1], np.array(ALPHAS))
    return tuple(math.sqrt(np.mean(np.square(deviation))) for deviation in (second, values - straight))


def own_share(middle, ends):
    n_frames = middle.magnitude.shape[1]
    columns = np.stack([fitted(end.magnitude, n_frames).ravel() for end in ends], axis=1)
    return float(nnls(columns, middle.magnitude.ravel())[1] / np.linalg.norm(middle.magnitude))


def outside(value, ends):
    """How far a value lies above both ends or, negative, below them."""
    return max(0.0, value - max(ends)) + min(0.0, value - min(ends))


def measure(sounds):
    """The row of one way: seven sounds that were Heard."""
    first, middle, last = ends_and_middle = sounds[0], sounds[MIDDLE], sounds[-1]
    ends = first, last
    curves = {name: curvature([sound.features[name] for sound in sounds]) for name in UNITS}
    whole, to_first, to_last, *steps = distances(
        sounds, [(0, -1), (MIDDLE, 0), (MIDDLE, -1), *zip(range(6), range(1, 7))]
    )
    pitches = [sound.pitch_hz for sound in ends_and_middle]
    attack = outside(middle.attack_seconds, [end.attack_seconds for end in ends])
    level = outside(middle.level_db, [end.level_db for end in ends])
    flatness = outside(middle.flatness_db, [end.flatness_db for end in ends])
    steady = middle.pitch_hz is not None or first.pitch_hz is None or last.pitch_hz is None
    return {
        "smoothness": statistics.fmean(smoothness for smoothness, _ in curves.values()),
        "linearity": statistics.fmean(linearity for _, linearity in curves.values()),
        "balance": abs(to_first - to_last) / whole,
        "detour": (to_first + to_last) / whole,
        "unevenness": statistics.pstdev(steps) / statistics.fmean(steps),
        "own": own_share(middle, ends),
        "peaks": middle.peaks / max(1.0, statistics.fmean(end.peaks for end in ends)),
        "attack, ms": 1000.0 * attack,
        "cents": 1200.0 * math.log2(pitches[1] / math.sqrt(pitches[0] * pitches[2])) if all(pitches) else None,
        "level, dB": level,
        "flatness, dB": flatness,
        "one sound": middle.peaks <= 1.25 * max(end.peaks for end in ends) and steady and abs(attack) <= 0.01,
        "sane": -10.0 <= level <= 1.0 and flatness <= 6.0,
        **{f"peaks of {name}": sound.peaks for name, sound in zip("AmB", ends_and_middle)},
        **{f"Hz of {name}": hertz for name, hertz in zip("AmB", pitches)},
        **{f"smoothness: {name}, {unit}": curves[name][0] for name, unit in UNITS.items()},
        **{f"linearity: {name}, {unit}": curves[name][1] for name, unit in UNITS.items()},
    }


def ways(space, first, second):
    """{way: its seven sounds, Heard}"""
    grown = [space.morph(first, second, alpha).grow() for alpha in ALPHAS]
    bands = grown[0].spectrogram.scale.bands
    learned = [Heard(sound.samples / sound.gain, bands) for sound in grown]
    ends = grown[0].spectrogram, grown[-1].spectrogram
    found = {"learned": learned, "crossfade": [], **{name: [] for name in MIXTURES}}
    for alpha, sound in list(zip(ALPHAS, grown))[1:-1]:
        n_frames = sound.spectrogram.n_frames
        waveforms = [fitted(end.samples, n_frames * HOP_LENGTH) for end in (learned[0], learned[-1])]
        found["crossfade"].append(Heard(mixed(*waveforms, alpha), bands))
        for name, mix in MIXTURES.items():
            found[name].append(Heard(space.vocoder.decode(mix(*ends, alpha, n_frames)), bands))
    return {name: sounds if name == "learned" else [learned[0], *sounds, learned[-1]] for name, sounds in found.items()}


def medians(rows):
    """A row for each way: medians over the pairs; how many of those whose ends have a pitch have one half-way, and how
    many are one sound, and sane."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        its = [row for row in rows if row["way"] == way]
        cents = [abs(row["cents"]) for row in its if row["cents"] is not None]
        found.append({"way": way, **{name: statistics.median(row[name] for row in its) for name in MEDIANS}})
        found[-1]["cents, absolute"] = statistics.median(cents) if cents else None
        found[-1]["with a pitch"] = f"{len(cents)} of {sum(bool(row['Hz of A'] and row['Hz of B']) for row in its)}"
        for name in ("one sound", "sane"):
            found[-1][name] = f"{sum(row[name] for row in its)} of {len(its)}"
    return found


def comparison(rows):
    """How often the learned way is better than each other one, and where it is not -> (rows, lines)."""
    learned = {row["pair"]: row for row in rows if row["way"] == "learned"}
    found, lines = [], []
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != "learned"):
        pairs = [(learned[row["pair"]], row) for row in rows if row["way"] == way]
        better = {
            "smoother": [mine["smoothness"] < other["smoothness"] for mine, other in pairs],
            "more linear": [mine["linearity"] < other["linearity"] for mine, other in pairs],
            "one sound where that is not": [mine["one sound"] and not other["one sound"] for mine, other in pairs],
            "not one sound where that is": [other["one sound"] and not mine["one sound"] for mine, other in pairs],
        }
        found.append({"learned, against": way, **{name: f"{sum(of)} of {len(of)}" for name, of in better.items()}})
        rougher = [mine["pair"] for (mine, _), smoother in zip(pairs, better["smoother"]) if not smoother]
        two = [mine["pair"] for (mine, _), worse in zip(pairs, better["not one sound where that is"]) if worse]
        lines += [f"- not smoother than {way}: {', '.join(rougher)}"] * bool(rougher)
        lines += [f"- not one sound where {way} is: {', '.join(two)}"] * bool(two)
    two = [pair for pair, row in learned.items() if not row["one sound"]]
    return found, lines + [f"- not one sound: {', '.join(two)}"] * bool(two)


def summary(rows):
    """Rows as Markdown."""
    better, lines = comparison(rows)
    parts = [
        "**Medians over the pairs**",
        report.table(medians(rows), COLUMNS),
        "**The learned way**",
        report.table(better),
    ]
    parts += ["\n".join(lines)] * bool(lines)
    for pair in dict.fromkeys(row["pair"] for row in rows):
        parts += [f"**{pair}**", report.table([row for row in rows if row["pair"] == pair], COLUMNS)]
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.morph", description=__doc__.split("\n")[0])
    parser.add_argument("space", help="folder that fastnca learn wrote, or the space file in it")
    parser.add_argument("pairs", nargs="+", metavar="A:B", help="names of two of its sounds")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    parser.add_argument("--pictures", action="store_true", help="draw the sounds half-way")
    parser.add_argument("--sounds", action="store_true", help="write the sounds half-way as wav files")
    options = parser.parse_args(arguments)
    space = fastnca.load(options.space, vocoder="griffinlim")
    if not isinstance(space, fastnca.Space):
        parser.error(f"{options.space} holds one sound: to morph takes a space of many")
    pairs = [pair.split(":") for pair in options.pairs]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(space):
            parser.error(f"a pair is two of {', '.join(space)}, with a colon between, got {':'.join(pair)}")
    machine = report.machine_line(report.machine())
    rows = []
    for number, (first, second) in enumerate(pairs, 1):
        print(f"{number} of {len(pairs)}: {first} to {second}", file=sys.stderr, flush=True)
        found = ways(space, first, second)
        rows += [{"pair": f"{first}:{second}", "way": way, **measure(sounds)} for way, sounds in found.items()]
        text = f"{machine}\n\n{summary(rows)}"
        report.write(options.out, "morph", text, rows)
        if options.pictures:
            titles = [(f"{way}, half-way", sounds[MIDDLE].spectrogram) for way, sounds in found.items()]
            save_picture(options.out / f"{first}-{second}.png", titles)
        for way, sounds in found.items() if options.sounds else ():
            write_wav(options.out / f"{first}-{second}-{way}.wav", sounds[MIDDLE].samples)
    print(text)


if __name__ == "__main__":
    main()

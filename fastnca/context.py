"""Context: what the rule tells every cell at every step about its place in the sound, beside its neighbors."""

import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch import nn

from .automaton.rule import HIDDEN1, perception
from .files import from_fields
from .sound.convention import DEFAULT_BANDS, MelBands
from .sound.spectrogram import linear_centers, mel_centers

WAVES_PER_PARTIAL = (0.5, 1, 2)  # of the coordinates between the partials of a pitched sound
CODE_SIZE = 16  # numbers that tell a sound apart from the others of its rule
CODE_GATES = 64  # of a code's layers: so many mixtures of the coordinates are made stronger or weaker by a sound's code


@dataclass(frozen=True)
class Places:
    """How a cell's place becomes numbers: the place itself, and sines and cosines of it.

    frequency_octaves: the bands, from -1 to 1, have waves at pi times 1, 2, ... 2^(frequency_octaves - 1).
    time_octaves: the frames, from -1 to 1, have waves at pi times 1/2, 1, ... 2^(time_octaves - 2).
    pitch_hz: of a pitched sound; where a band lies between its partials is then a coordinate too.
    bands: the mel bands, which tell where that is.
    code_size: numbers of the code that tells many sounds of one rule apart; 0 for the rule of one sound. With codes the
        pitch belongs to each sound, and pitch_hz is that of a sound that says none of its own.

    Raises ValueError for a number that is not positive.
    """

    frequency_octaves: int = 7
    time_octaves: int = 6
    pitch_hz: float | None = None
    bands: MelBands = DEFAULT_BANDS
    code_size: int = 0

    def __post_init__(self):
        for name, least in (("frequency_octaves", 1), ("time_octaves", 1), ("code_size", 0)):
            number = getattr(self, name)
            if not isinstance(number, numbers.Integral) or number < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
        if self.pitch_hz is not None:
            check_pitch(self.pitch_hz)

    @classmethod
    def from_dict(cls, fields):
        """From what ``dataclasses.asdict`` made of one, also after JSON."""
        return from_fields(cls, {**fields, "bands": from_fields(MelBands, fields["bands"])})


def check_pitch(hertz):
    """Raises ValueError unless ``hertz`` is a positive number."""
    if not (isinstance(hertz, numbers.Real) and math.isfinite(hertz) and hertz > 0):
        raise ValueError(f"a pitch must be a positive number of Hz, got {hertz!r}")


def _waves(place, cycles):
    """[length], in cycles of 2 pi -> [2 len(cycles), length]: sine and cosine of each multiple."""
    return [wave(2.0 * math.pi * cycle * place) for cycle in cycles for wave in (torch.sin, torch.cos)]


class Gates(nn.Module):
    """What a sound's code makes of a place: out (place(features) * code(c)), linear in the code and in the features.

    So for one code it is one more linear function of the features.
    """

    def __init__(self, n_features, code_size):
        super().__init__()
        self.place = nn.Linear(n_features, CODE_GATES)
        self.code = nn.Linear(code_size, CODE_GATES, bias=False)
        self.out = nn.Linear(CODE_GATES, HIDDEN1, bias=False)

    def forward(self, code):
        """code [S] -> (weight [128, F], bias [128]): the linear function of the features that it stands for."""
        out = self.out.weight * (self.code.weight @ code)
        return out @ self.place.weight, out @ self.place.bias


class Context(nn.Module):
    """The tables of context: linear functions of the coordinates of a place, and of the sound's code if it has one.

    Args:
        places: the coordinates, see :class:`Places`.
        n_mels, n_linear: bands of the grids.
    """

    def __init__(self, places, n_mels, n_linear):
        super().__init__()
        self.places = places
        self.n_bands = n_mels, n_linear
        for name, features in zip(("mel_features", "linear_features"), self.row_features(places.pitch_hz)):
            self.register_buffer(name, features, persistent=False)
        sizes = len(self.mel_features), len(self._column_features(torch.zeros(1)))
        self.rows, self.columns = (nn.Linear(size, HIDDEN1, bias=False) for size in sizes)
        for layer in (self.rows, self.columns):  # as the weights of what a cell perceives
            nn.init.uniform_(layer.weight, -(perception() ** -0.5), perception() ** -0.5)
        if places.code_size:
            self.row_gates, self.column_gates = (Gates(size, places.code_size) for size in sizes)

    def forward(self, times, pitch_hz=None, code=None):
        """The tables that the rule adds to its first layer.

        Args:
            times: [T], the place of each frame in the sound, from -1 to 1.
            pitch_hz: the pitch to grow at, for places with a pitch; that of the recording if not given.
            code: [code_size], for places with codes.

        Returns:
            (mel_rows [1, 128, n_mels], linear_rows [1, 128, n_linear], columns [1, 128, T]).

        Raises ValueError for a pitch that is not positive, or that the places do not know.
        """
        row_features = self.mel_features, self.linear_features
        if pitch_hz is not None:
            check_pitch(pitch_hz)
            if self.places.pitch_hz is None:
                raise ValueError("the sound was learned without a pitch: it cannot grow at another one")
            row_features = self.row_features(pitch_hz)
        return self.tables(row_features, times, code)

    def tables(self, row_features, times, code=None):
        """As :meth:`forward`, with what :meth:`row_features` gave for the pitch."""
        if (code is not None) != bool(self.places.code_size):
            raise ValueError("a rule of many sounds needs a sound's code, and a rule of one sound has none")
        weight = self.rows.weight
        *rows, columns = [features.to(weight) for features in (*row_features, self._column_features(times.to(weight)))]
        tables = [*(weight @ features for features in rows), self.columns.weight @ columns]
        if code is not None:
            gates = self.row_gates, self.row_gates, self.column_gates
            for index, (gate, features) in enumerate(zip(gates, (*rows, columns))):
                weight, bias = gate(code)
                tables[index] = tables[index] + weight @ features + bias[:, None]
        return tuple(table[None] for table in tables)

    @torch.no_grad()
    def with_code(self, code, pitch_hz, tonality):
        """The context of one sound of many, see ``DualSpecTNCA.with_code``.

        -> (Context without codes, bias [128] that the rule's first layer takes up)
        """
        one = Context(replace(self.places, code_size=0, pitch_hz=pitch_hz), *self.n_bands).to(self.rows.weight)
        bias = 0.0
        for name in ("rows", "columns"):
            layer, gates = getattr(one, name), getattr(self, f"{name[:-1]}_gates")
            weight, constant = gates(code)
            layer.weight.copy_((getattr(self, name).weight + weight)[:, : layer.in_features])
            bias = bias + constant
        if pitch_hz is not None:
            one.rows.weight[:, -2 * len(WAVES_PER_PARTIAL) :] *= tonality
        return one, bias

    def row_features(self, pitch_hz):
        """The coordinates of both grids' bands, [F, n_mels] and [F, n_linear], for a sound of that pitch; those of its
        partials, the last ones, are 0 without a pitch."""
        places = self.places
        grids = []
        for sign, n_bands, centers in zip((1.0, -1.0), self.n_bands, (mel_centers, linear_centers)):
            place = torch.linspace(-1.0, 1.0, n_bands)
            features = [torch.full_like(place, sign), place]
            features += _waves(place / 2, (2**octave for octave in range(places.frequency_octaves)))
            if pitch_hz is not None:
                features += _waves(centers(n_bands, places.bands) / pitch_hz, WAVES_PER_PARTIAL)
            elif places.pitch_hz is not None:
                features += [torch.zeros_like(place)] * (2 * len(WAVES_PER_PARTIAL))
            grids.append(torch.stack(features))
        return grids

    def _column_features(self, times):
        return torch.stack([times, *_waves(times / 4, (2**octave for octave in range(self.places.time_octaves)))])

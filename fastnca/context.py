"""Context: what the rule tells every cell at every step about its place in the sound, beside its neighbors."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import nn

from .automaton.rule import HIDDEN1, perception
from .files import from_fields
from .sound.convention import DEFAULT_BANDS, MelBands
from .sound.spectrogram import linear_centers, mel_centers

WAVES_PER_PARTIAL = (0.5, 1, 2)  # of the coordinates between the partials of a pitched sound


@dataclass(frozen=True)
class Places:
    """How a cell's place becomes numbers: the place itself, and sines and cosines of it.

    frequency_octaves: the bands, from -1 to 1, have waves at pi times 1, 2, ... 2^(frequency_octaves - 1).
    time_octaves: the frames, from -1 to 1, have waves at pi times 1/2, 1, ... 2^(time_octaves - 2).
    pitch_hz: of a pitched sound; where a band lies between its partials is then a coordinate too.
    bands: the mel bands, which tell where that is.

    Raises ValueError for a number that is not positive.
    """

    frequency_octaves: int = 7
    time_octaves: int = 6
    pitch_hz: float | None = None
    bands: MelBands = DEFAULT_BANDS

    def __post_init__(self):
        for name in ("frequency_octaves", "time_octaves"):
            octaves = getattr(self, name)
            if not isinstance(octaves, numbers.Integral) or octaves < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {octaves!r}")
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


class Context(nn.Module):
    """The tables of context: linear functions of the coordinates of a place.

    Args:
        places: the coordinates, see :class:`Places`.
        n_mels, n_linear: bands of the grids.
    """

    def __init__(self, places, n_mels, n_linear):
        super().__init__()
        self.places = places
        self.n_bands = n_mels, n_linear
        for name, features in zip(("mel_features", "linear_features"), self._row_features(places.pitch_hz)):
            self.register_buffer(name, features, persistent=False)
        self.rows = nn.Linear(len(self.mel_features), HIDDEN1, bias=False)
        self.columns = nn.Linear(len(self._column_features(torch.zeros(1))), HIDDEN1, bias=False)
        for layer in (self.rows, self.columns):  # as the weights of what a cell perceives
            nn.init.uniform_(layer.weight, -(perception() ** -0.5), perception() ** -0.5)

    def forward(self, times, pitch_hz=None):
        """The tables that the rule adds to its first layer.

        Args:
            times: [T], the place of each frame in the sound, from -1 to 1.
            pitch_hz: the pitch to grow at, for places with a pitch; that of the recording if not given.

        Returns:
            (mel_rows [1, 128, n_mels], linear_rows [1, 128, n_linear], columns [1, 128, T]).

        Raises ValueError for a pitch that is not positive, or that the places do not know.
        """
        row_features = self.mel_features, self.linear_features
        if pitch_hz is not None:
            check_pitch(pitch_hz)
            if self.places.pitch_hz is None:
                raise ValueError("the sound was learned without a pitch: it cannot grow at another one")
            row_features = self._row_features(pitch_hz)
        weight = self.rows.weight
        rows = [weight @ features.to(weight) for features in row_features]
        columns = self.columns.weight @ self._column_features(times.to(weight))
        return *(table[None] for table in rows), columns[None]

    def _row_features(self, pitch_hz):
        places = self.places
        grids = []
        for sign, n_bands, centers in zip((1.0, -1.0), self.n_bands, (mel_centers, linear_centers)):
            place = torch.linspace(-1.0, 1.0, n_bands)
            features = [torch.full_like(place, sign), place]
            features += _waves(place / 2, (2**octave for octave in range(places.frequency_octaves)))
            if places.pitch_hz is not None:
                features += _waves(centers(n_bands, places.bands) / pitch_hz, WAVES_PER_PARTIAL)
            grids.append(torch.stack(features))
        return grids

    def _column_features(self, times):
        return torch.stack([times, *_waves(times / 4, (2**octave for octave in range(self.places.time_octaves)))])

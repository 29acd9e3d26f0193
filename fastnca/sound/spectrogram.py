"""The dual spectrogram: two grids in decibels, and what they mean as sound."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .convention import (
    DB_RANGE,
    DEFAULT_BANDS,
    HOP_LENGTH,
    MEL_FLOOR,
    N_FFT,
    N_LINEAR,
    N_MELS,
    PADDING,
    POWER_FLOOR,
    SAMPLE_RATE,
    SILENCE,
    MelBands,
    as_samples,
    on_cpu,
)


@dataclass(frozen=True)
class Scale:
    """What the decibels of a pair of grids mean: all that a decoder has to know beside them.

    mel_ref_db, linear_ref_db: the level of 0 dB in each grid, in dB where magnitude 1 is 0 dB. bands: the mel bands.
    """

    mel_ref_db: float
    linear_ref_db: float
    bands: MelBands = DEFAULT_BANDS


@dataclass(frozen=True, eq=False)
class DualSpectrogram:
    """Both spectrograms of one sound, in dB below their own maximum, and their scale.

    mel_db: float32 tensor [80, T]; linear_db: float32 tensor [513, T]; both within [-80, 0], on the CPU.
    Arrays and tensors of any device are converted; another shape or a value that is not finite raises ValueError.
    """

    mel_db: torch.Tensor = field(repr=False)
    linear_db: torch.Tensor = field(repr=False)
    scale: Scale

    @on_cpu
    def __post_init__(self):
        for name, bands in (("mel_db", N_MELS), ("linear_db", N_LINEAR)):
            grid = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float32)
            if grid.ndim != 2 or grid.shape[0] != bands:
                raise ValueError(f"{name} must have shape [{bands}, T], got {list(grid.shape)}")
            if not torch.isfinite(grid).all():
                raise ValueError(f"{name} must be finite, got NaN or infinite values")
            object.__setattr__(self, name, grid)
        if self.mel_db.shape[1] != self.linear_db.shape[1]:
            raise ValueError(
                "mel_db and linear_db must have the same number of frames, "
                f"got {self.mel_db.shape[1]} and {self.linear_db.shape[1]}"
            )

    @property
    def n_frames(self):
        return self.mel_db.shape[1]

    def with_grids(self, mel_db, linear_db):
        """Other grids on the same scale, such as what has been grown to match these."""
        return replace(self, mel_db=mel_db, linear_db=linear_db)


@lru_cache
@on_cpu
def mel_basis(bands=DEFAULT_BANDS):
    """[80, 513] Slaney mel filters of librosa, the ones BigVGAN was trained with."""
    from librosa.filters import mel

    filters = mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=bands.fmin, fmax=bands.fmax)
    return torch.from_numpy(filters).float()


@on_cpu
def mel_centers(n_bands=N_MELS, bands=DEFAULT_BANDS):
    """[n_bands] in Hz: where the mel bands have their peaks."""
    from librosa import mel_frequencies

    return torch.from_numpy(mel_frequencies(n_mels=n_bands + 2, fmin=bands.fmin, fmax=bands.fmax)[1:-1]).float()


@on_cpu
def linear_centers(n_bands=N_LINEAR, bands=DEFAULT_BANDS):
    """[n_bands] in Hz, whatever the mel bands: from 0 to half of the sample rate."""
    return torch.linspace(0.0, SAMPLE_RATE / 2, n_bands)


def bands_between(centers, hertz):
    """The bands with these centers [n_bands] in Hz that lie in a range (low, high) of Hz -> slice. Of a range that lies
    between two bands it is the nearest band."""
    low, high = hertz
    found = torch.nonzero((centers >= low) & (centers <= high)).flatten().tolist()
    found = found or [(centers - (low + high) / 2).abs().argmin().item()]
    return slice(found[0], found[-1] + 1)


def stft(samples):
    """Tensor [n] -> complex tensor [513, n / 256]: BigVGAN's framing, see convention.py."""
    padded = F.pad(samples[None, None], (PADDING, PADDING), mode="reflect")[0, 0]
    window = torch.hann_window(N_FFT, dtype=samples.dtype)
    return torch.stft(padded, N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True)


def istft(spectrum):
    """Complex tensor [513, T] -> tensor [256 * T], the least-squares inverse of ``stft``.

    Griffin and Lim 1984, eq. 6: windowed overlap-add over summed squared windows, the padding cut off. torch.istft
    refuses a window that starts at zero without centering.
    """
    n_frames = spectrum.shape[1]
    frames = torch.fft.irfft(spectrum, n=N_FFT, dim=0)
    window = torch.hann_window(N_FFT, dtype=frames.dtype)[:, None]
    both = torch.stack([frames * window, (window**2).expand(-1, n_frames)])
    length = N_FFT + HOP_LENGTH * (n_frames - 1)
    both = F.fold(both, (1, length), (1, N_FFT), stride=(1, HOP_LENGTH))[:, 0, 0]
    signal, weight = both[:, PADDING : length - PADDING]
    return signal / weight


def _to_grid(magnitude):
    level = 20 * torch.log10(magnitude.clamp(min=1e-20))
    reference = level.max().item()
    return (level - reference).clamp(-DB_RANGE, 0.0), reference


@on_cpu
def analyze(samples, bands=DEFAULT_BANDS):
    """Sound -> DualSpectrogram with samples / 256 frames.

    samples: array or tensor [n], at least 1024 and a multiple of the hop, not silent.
    linear = |STFT|; mel = mel_basis @ sqrt(|STFT|^2 + 1e-9), as in ``bigvgan.meldataset.mel_spectrogram``. Both in dB
    (20 log10), minus their maximum (kept as the reference level), clipped to [-80, 0].

    Raises TypeError or ValueError for samples of another form, and ValueError for silence.
    """
    samples = as_samples(samples)
    if len(samples) % HOP_LENGTH:
        raise ValueError(f"samples must be a multiple of the hop, {HOP_LENGTH}, got {len(samples)}")
    if np.ptp(samples) < SILENCE:
        raise ValueError("samples must not be silent, got a peak-to-peak level below -120 dB")
    power = stft(torch.from_numpy(samples)).abs().square()
    mel_db, mel_ref_db = _to_grid(mel_basis(bands) @ (power + POWER_FLOOR).sqrt())
    linear_db, linear_ref_db = _to_grid(power.sqrt())
    return DualSpectrogram(mel_db, linear_db, Scale(mel_ref_db, linear_ref_db, bands))


@on_cpu
def from_db(level_db, ref_db):
    """Levels in dB and their reference level -> magnitudes, any shape. The lowest level, -80 dB, stays what it says:
    the most that a cell there can be."""
    return 10 ** ((torch.as_tensor(level_db, dtype=torch.float32) + ref_db) / 20)


@on_cpu
def to_magnitude(level_db, ref_db):
    """As :func:`from_db`, but a cell at -80 dB, "-80 or anything quieter", becomes 0: the inverse of :func:`analyze`.

    The lowest dB fades out. Decoded as -80 dB, the quiet cells of a decayed note add up to audible hiss.
    """
    return from_db(level_db, ref_db) * (torch.as_tensor(level_db) + DB_RANGE).clamp(0, 1)


@on_cpu
def mel_to_log(mel_db, mel_ref_db):
    """Mel grid in dB, any shape -> BigVGAN's input, ln(max(mel, 1e-5)): the inverse of ``analyze`` above -80 dB."""
    nats_per_db = math.log(10) / 20
    return ((torch.as_tensor(mel_db, dtype=torch.float32) + mel_ref_db) * nats_per_db).clamp(min=math.log(MEL_FLOOR))

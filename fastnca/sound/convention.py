"""The convention of every sound and spectrogram: BigVGAN's own at 22.05 kHz and 80 mel bands.

Both spectrograms share one framing: 1024-sample periodic Hann window, hop 256, 384 samples of reflected padding on
each side and no centering, so that n samples give exactly n / 256 frames. Levels are decibels below the spectrogram's
own maximum, from -DB_RANGE to 0.
"""

from dataclasses import dataclass
from functools import wraps

import numpy as np
import torch

SAMPLE_RATE = 22050
N_FFT = 1024
HOP_LENGTH = 256
PADDING = (N_FFT - HOP_LENGTH) // 2
N_MELS = 80
N_LINEAR = N_FFT // 2 + 1
BLOCK = 8 * HOP_LENGTH  # sounds are cut to a multiple of 8 frames

DB_RANGE = 80.0
ACTIVE_DB = -70.0  # cells above this level sound; the prototype's border between sound and silence

SILENCE = 1e-6  # peak-to-peak below -120 dB of full scale: under the 1e-9 power floor of the mel spectrogram
POWER_FLOOR = 1e-9  # added to |STFT|^2 by BigVGAN
MEL_FLOOR = 1e-5  # smallest mel magnitude that BigVGAN sees


@dataclass(frozen=True)
class MelBands:
    """The range in Hz that the 80 mel bands divide.

    The default is that of ``nvidia/bigvgan_v2_22khz_80band_256x``; ``nvidia/bigvgan_base_22khz_80band`` has 0..8000.
    Raises ValueError for a range that is empty or beyond half of the sample rate.
    """

    fmin: float = 0.0
    fmax: float = SAMPLE_RATE / 2

    def __post_init__(self):
        if not 0 <= self.fmin < self.fmax <= SAMPLE_RATE / 2:
            raise ValueError(
                f"fmin and fmax must satisfy 0 <= fmin < fmax <= {SAMPLE_RATE / 2:g} Hz, "
                f"got {self.fmin!r} and {self.fmax!r}"
            )


DEFAULT_BANDS = MelBands()


def on_cpu(function):
    """Decorates what makes tensors of its own, so that ``torch.set_default_device`` does not send them elsewhere."""

    @wraps(function)
    def run(*arguments, **options):
        with torch.device("cpu"):
            return function(*arguments, **options)

    return run


def as_samples(samples, name="samples", minimum=N_FFT):
    """Checks a sound at the public door: 1-D, floating point, finite, at least ``minimum`` samples -> float32 array.

    Raises TypeError for another type of numbers, ValueError for the rest.
    """
    array = samples.detach().cpu().numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} must be floating point with full scale 1, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {list(array.shape)}")
    if len(array) < minimum:
        raise ValueError(f"{name} must hold at least {minimum} samples, got {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return np.ascontiguousarray(array, dtype=np.float32)


def within_full_scale(samples):
    """(samples, gain): ``samples`` as they are with gain 1, or scaled down as a whole where their peak is above 1."""
    peak = float(np.abs(samples).max(initial=0.0))
    gain = 1 / peak if peak > 1 else 1.0
    return samples * np.float32(gain), gain

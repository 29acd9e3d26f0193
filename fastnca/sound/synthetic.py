"""A synthesized bowed string, the built-in sound."""

import math

import numpy as np

from .convention import BLOCK, SAMPLE_RATE

# Hz, quality factor, gain: typical of a violin's air mode, its two main corpus modes, two plate modes, the bridge hill.
BODY_RESONANCES = ((280, 12, 1.2), (460, 14, 1.6), (550, 14, 1.8), (820, 8, 0.9), (1250, 6, 0.8), (2500, 1.8, 1.6))


def _body_response(frequency):
    """Magnitude of the body's response at a frequency in Hz (array)."""
    frequency = np.maximum(frequency, 1.0)
    response = np.full_like(frequency, 0.25)
    for center, quality, gain in BODY_RESONANCES:
        response += gain / np.sqrt(1 + (quality * (frequency / center - center / frequency)) ** 2)
    return response / (1 + (frequency / 4500) ** 4) ** 0.5


def synthesize_bowed_string(duration=1.0, seed=0, frequency=440.0):
    """A bowed string: float32 array [n] at 22.05 kHz with a peak of 0.8, the same for the same arguments.

    duration: seconds, rounded up to a multiple of 8 frames (2048 samples); frequency: Hz, 40..4000.
    A sawtooth's harmonics (Helmholtz motion) bowed at 1/9 of the string, seen through body resonances, with vibrato,
    an attack that brightens, a sustained swell, a release, and bow noise.
    """
    if not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be a positive number of seconds, got {duration!r}")
    if not 40 <= frequency <= 4000:
        raise ValueError(f"frequency must be within 40..4000 Hz, got {frequency!r}")
    rng = np.random.default_rng(seed)
    count = math.ceil(max(1, round(duration * SAMPLE_RATE)) / BLOCK) * BLOCK
    seconds = count / SAMPLE_RATE
    time = np.arange(count) / SAMPLE_RATE
    attack, release = min(0.08, 0.2 * seconds), min(0.18, 0.25 * seconds)

    def wander(rate_hz, depth):  # slow random unevenness of the player
        knots = rng.standard_normal(int(seconds * rate_hz) + 2) * depth
        return np.interp(time * rate_hz, np.arange(len(knots)), knots)

    onset = np.clip((time - 0.15) / 0.3, 0, 1)  # the vibrato begins once the note stands
    cents = 22 * onset * np.sin(2 * np.pi * 5.6 * time + 0.4) + wander(8, 1.5)
    pitch = frequency * 2 ** (cents / 1200)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    fade_out = np.clip((seconds - time) / release, 0, 1) ** 2
    bow = (1 - np.exp(-3 * time / attack)) * (1 + 0.12 * np.sin(np.pi * time / seconds) + wander(6, 0.02)) * fade_out

    sound = np.zeros(count)
    for n in range(1, int(0.45 * SAMPLE_RATE / frequency) + 1):
        string = (0.1 + abs(np.sin(np.pi * n / 9))) / n
        brightening = 1 - np.exp(-time / (attack * (0.3 + 0.06 * n)))
        flutter = 1 + wander(12, 0.03)
        start = rng.uniform(0, 2 * np.pi)
        sound += string * _body_response(n * pitch) * brightening * flutter * np.sin(n * phase + start)
    sound *= bow

    noise = np.fft.rfft(rng.standard_normal(count))
    noise *= _body_response(np.fft.rfftfreq(count, 1 / SAMPLE_RATE))
    noise = np.fft.irfft(noise, count)
    scratch = 1 + 4 * np.exp(-time / 0.03)  # the bow bites at the start
    noise *= 0.006 * np.abs(sound).max() / noise.std() * scratch * bow
    sound += noise
    return (0.8 * sound / np.abs(sound).max()).astype(np.float32)

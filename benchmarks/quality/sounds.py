"""Sounds to learn: five synthesized ones, and recordings. All are arrays [n] at 22.05 kHz."""

from pathlib import Path

import numpy as np
import torch

from fastnca.sound.convention import HOP_LENGTH, SAMPLE_RATE
from fastnca.sound.files import load_audio
from fastnca.sound.synthetic import synthesize_bowed_string


def _time(seconds):
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def bowed(seconds):
    """A bowed string, the sound that is built into fastnca."""
    return synthesize_bowed_string(duration=seconds)


def percussion(seconds):
    """A struck bar: inharmonic partials that ring and a noisy attack."""
    t = _time(seconds)
    noise = np.random.default_rng(0).standard_normal(len(t))
    partials = enumerate((330.0, 911.0, 1782.0))
    ringing = sum(np.exp(-t * (3 + 2 * k)) * np.sin(2 * np.pi * f0 * t) for k, f0 in partials)
    return 0.25 * ringing + 0.3 * np.exp(-t * 60) * noise


def chord(seconds):
    """Three plucked notes that enter one after another."""
    t = _time(seconds)
    sound = np.zeros_like(t)
    for entry, f0 in enumerate((220.0, 277.18, 329.63)):
        age = t - 0.15 * entry * seconds
        for harmonic in range(1, 9):
            partial = np.sin(2 * np.pi * f0 * harmonic * age) / harmonic
            sound += 0.12 * partial * np.exp(-np.maximum(age, 0) * (1 + 0.5 * harmonic)) * (age > 0)
    return sound


def voice(seconds):
    """A sung vowel that glides to another, with vibrato: pulses through formants, harmonic by harmonic."""
    t = _time(seconds)
    place = np.linspace(0.0, 1.0, len(t))
    pitch = 180.0 * (1 + 0.02 * np.sin(2 * np.pi * 5.5 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    formants = [(700 - 400 * place, 90), (1200 + 1000 * place, 110), (2600 + 300 * place, 160)]
    sound = np.zeros_like(t)
    for harmonic in range(1, 50):
        frequency = harmonic * pitch
        gain = sum(1 / (1 + ((frequency - center) / width) ** 2) for center, width in formants)
        sound += gain / harmonic**0.5 * np.sin(harmonic * phase) * (frequency < 10000)
    envelope = np.minimum(1, np.minimum(t / 0.08, (seconds - t) / 0.15))
    return 0.15 * sound * envelope


def noise(seconds):
    """Wind: noise through a band that wanders."""
    t = _time(seconds)
    white = torch.from_numpy(np.random.default_rng(0).standard_normal(len(t)))
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(white, 1024, 256, window=window, return_complex=True)
    frequency = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[0], dtype=torch.float64)[:, None]
    center = 1200 + 900 * torch.sin(2 * torch.pi * torch.linspace(0, 1.5, spectrum.shape[1], dtype=torch.float64))
    spectrum *= torch.exp(-(((frequency - center) / 500) ** 2)) + 1e-3
    return 0.3 * torch.istft(spectrum, 1024, 256, window=window, length=len(t)).numpy()


SOUNDS = {sound.__name__: sound for sound in (bowed, percussion, chord, voice, noise)}


def load(sound, seconds):
    """The sound of that name, or the start of a recording -> (name, float32 array [n], n a multiple of the hop)."""
    if sound in SOUNDS:
        samples = np.asarray(SOUNDS[sound](seconds), dtype=np.float32)
        return sound, samples[: len(samples) // HOP_LENGTH * HOP_LENGTH]
    return Path(sound).stem, load_audio(sound, seconds)[0]

"""The pitch of a sound: found in a recording, and read from what people write."""

import re

import numpy as np

from .convention import SAMPLE_RATE

LOWEST_HZ, HIGHEST_HZ = 32.7, 2093.0  # C1 and C7, where pitch is looked for
PITCH_RANGE = 10.0, SAMPLE_RATE / 2  # in Hz, at which a sound may be grown
FRAME, HOP = 2048, 512
QUIET = 0.03  # of the loudest frame's level: quieter frames say nothing about pitch
VOICED = 0.8  # share of the other frames that must have a pitch
STEADY_CENTS = 60.0  # within which the middle 80 % of them must lie


def find_pitch(samples):
    """The pitch of a recording [n] at 22.05 kHz in Hz, or None where it has none that stays: drums, noise, chords, a
    glide. The tracker is librosa's pYIN (Mauch and Dixon 2014)."""
    from librosa import pyin
    from librosa.feature import rms

    samples = np.pad(samples, (0, max(0, FRAME - len(samples))))
    hertz, voiced, _ = pyin(
        samples, fmin=LOWEST_HZ, fmax=HIGHEST_HZ, sr=SAMPLE_RATE, frame_length=FRAME, hop_length=HOP
    )
    level = rms(y=samples, frame_length=FRAME, hop_length=HOP)[0]
    sounding = level > QUIET * level.max()
    found = hertz[sounding & voiced]
    if len(found) < VOICED * sounding.sum():
        return None
    pitch = float(np.median(found))
    low, high = np.percentile(1200.0 * np.log2(found / pitch), (10, 90))
    return pitch if high - low <= STEADY_CENTS else None


def read_pitch(text, recording_hz=None):
    """The pitch in Hz that somebody wrote: a note ("E4", "Bb3", "f#2"), a frequency ("330hz") or semitones from the
    recording ("+3", "-2.5").

    Raises ValueError for anything else, and for semitones where ``recording_hz`` is None.
    """
    text = text.strip()
    if match := re.fullmatch(r"([0-9]*\.?[0-9]+)\s*hz", text, re.IGNORECASE):
        hertz = float(match[1])
    elif re.fullmatch(r"[+-][0-9]*\.?[0-9]+", text):
        if recording_hz is None:
            raise ValueError(f"pitch {text!r} is relative to a recording that has no pitch; give a note or a frequency")
        hertz = recording_hz * 2.0 ** (float(text) / 12.0)
    elif re.fullmatch(r"[A-Ga-g][#b♯♭]?-?[0-9]", text):
        from librosa import note_to_hz

        hertz = float(note_to_hz(text[0].upper() + text[1:]))
    else:
        raise ValueError(f"pitch must be a note (E4), semitones (+3, -2) or a frequency (330hz), got {text!r}")
    low, high = PITCH_RANGE
    if not low <= hertz <= high:
        raise ValueError(f"pitch must be between {low:g} and {high:g} Hz, got {text!r}, {hertz:g} Hz")
    return hertz

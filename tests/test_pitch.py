"""The pitch of a recording, found and read."""

import numpy as np
import pytest

from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.pitch import find_pitch, read_pitch
from fastnca.sound.synthetic import synthesize_bowed_string

TIME = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE


def tone(hertz):
    """Samples [n] of three partials; ``hertz`` is a number or one for each sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, TIME.shape)) / SAMPLE_RATE
    return (sum(np.sin(n * phase) / n for n in (1, 2, 3)) / 3).astype(np.float32)


def test_the_bowed_string_is_an_a():
    assert find_pitch(synthesize_bowed_string(duration=0.3)) == pytest.approx(440.0, rel=0.003)


@pytest.mark.parametrize("hertz", [110.0, 1318.5])
def test_a_tone_has_its_pitch_and_silence_around_it_none(hertz):
    silence = np.zeros(SAMPLE_RATE // 4, dtype=np.float32)
    assert find_pitch(np.concatenate([silence, tone(hertz), silence])) == pytest.approx(hertz, rel=0.01)


def test_noise_has_none():
    assert find_pitch(np.random.default_rng(0).standard_normal(8192).astype(np.float32)) is None


def test_a_glide_has_none():
    assert find_pitch(tone(220.0 * 2.0 ** (TIME / TIME[-1]))) is None


def test_a_recording_shorter_than_a_frame():
    assert find_pitch(tone(880.0)[:1500]) == pytest.approx(880.0, rel=0.02)


@pytest.mark.parametrize(
    ("text", "hertz"),
    [
        ("A4", 440.0), ("E4", 329.63), ("Bb3", 233.08), ("f#2", 92.50), ("b3", 246.94), (" C5 ", 523.25),
        ("330hz", 330.0), ("329.6 Hz", 329.6), ("+12", 400.0), ("-12", 100.0), ("+0", 200.0), ("-2.5", 173.1),
    ],
)  # fmt: skip
def test_pitches_that_are_read(text, hertz):
    assert read_pitch(text, recording_hz=200.0) == pytest.approx(hertz, rel=1e-4)


def test_only_semitones_need_a_recording():
    assert read_pitch("A4") == pytest.approx(440.0)
    with pytest.raises(ValueError, match="pitch '\\+3' is relative to a recording that has no pitch"):
        read_pitch("+3")


@pytest.mark.parametrize("text", ["", "H4", "A", "440", "A44", "loud", "3", "1.2.3", "+", "- 3"])
def test_what_is_no_pitch(text):
    with pytest.raises(ValueError, match="pitch must be a note"):
        read_pitch(text, recording_hz=200.0)


@pytest.mark.parametrize("text", ["5hz", "20000hz", "+100", "C-2"])
def test_pitches_that_nobody_hears_are_refused(text):
    with pytest.raises(ValueError, match="pitch must be between 10 and 11025 Hz"):
        read_pitch(text, recording_hz=200.0)

"""Sound files in and out."""

import math
import numbers
import os
from dataclasses import dataclass

import numpy as np

from ..files import atomic_write
from .convention import BLOCK, N_FFT, SAMPLE_RATE, SILENCE, as_samples, within_full_scale


@dataclass(frozen=True)
class AudioInfo:
    """What ``load_audio`` found in a file and what it used; ``str(info)`` is one line for the user.

    duration: seconds in the file; used: seconds taken from its start (before rounding up to 8 frames).
    gain: 1.0, or the factor that brought a peak above full scale back to 1.
    """

    name: str
    sample_rate: int
    channels: int
    duration: float
    used: float
    gain: float = 1.0

    def __str__(self):
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        text = f"{self.name}: {self.duration:.1f} s at {self.sample_rate} Hz {channels}"
        if self.duration - self.used > 0.05:
            text += f"; using the first {self.used:.1f} s"
        if self.gain != 1.0:
            text += f"; peak {1 / self.gain:.3g} exceeds full scale, scaled to 1"
        return text


def _decode_file(path, seconds):
    """-> ([n, channels] float32, sample rate, seconds in the file), decoding little more than ``seconds``."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            count = file.frames if seconds is None else min(file.frames, math.ceil(seconds * file.samplerate))
            return file.read(count, dtype="float32", always_2d=True), file.samplerate, file.frames / file.samplerate
    except (RuntimeError, TypeError) as error:  # TypeError: headerless .raw
        decoded = _decode_with_audioread(path, seconds)
        if decoded is None:
            raise ValueError(
                f"{path} is not audio that soundfile or librosa can read; use a WAV, FLAC, OGG or MP3 file"
            ) from error
        return decoded


def _decode_with_audioread(path, seconds):
    """What librosa < 1.0 falls back on for AAC and the like; asked directly, as librosa's loader compiles for 20 s."""
    try:
        import audioread
    except ImportError:
        return None
    try:
        with audioread.audio_open(path) as file:
            rate, channels, total = file.samplerate, file.channels, file.duration
            missing = math.inf if seconds is None else math.ceil(seconds * rate) * channels * 2  # bytes of 16-bit PCM
            data = bytearray()
            for block in file:
                data += block
                if len(data) >= missing:
                    break
    except (EOFError, audioread.DecodeError):
        return None
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, channels).astype(np.float32) / 32768
    return samples, rate, max(total or 0.0, len(samples) / rate)


def load_audio(path, duration=None):
    """Reads the start of an audio file as 22.05 kHz mono.

    path: any file that soundfile or librosa reads, any sample rate and number of channels.
    duration: seconds to use, ``None`` for the whole file; a shorter file is used whole. The result is rounded up
        to a multiple of 8 frames (2048 samples), with the file's own samples while it has them, then with zeros.
        Only the part that is needed is decoded.

    Returns (float32 array [n], AudioInfo). A peak above 1 (possible in float files) is scaled to 1: ``AudioInfo.gain``.
    Raises FileNotFoundError, IsADirectoryError or PermissionError for an unreadable path, ValueError for what is not
    audio, has no samples, is silent, is not finite or is shorter than one window (1024 samples at 22.05 kHz).
    """
    path = os.fspath(path)
    wanted = None
    if duration is not None:
        if not isinstance(duration, numbers.Real) or isinstance(duration, bool):
            raise TypeError(f"duration must be a number of seconds, got {duration!r}")
        if not (math.isfinite(duration) and duration > 0):
            raise ValueError(f"duration must be a positive number of seconds, got {duration:g}")
        wanted = max(1, round(duration * SAMPLE_RATE))
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; give the path of one audio file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}; give the path of an audio file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read; check its permissions")

    # 0.1 s more than is kept, so that the resampling filter sees what follows the cut
    seconds = None if wanted is None else math.ceil(wanted / BLOCK) * BLOCK / SAMPLE_RATE + 0.1
    data, rate, total = _decode_file(path, seconds)
    if data.size == 0:
        raise ValueError(f"{path} holds no samples; use a recording of at least {N_FFT / SAMPLE_RATE:.3f} s")
    if not np.isfinite(data).all():
        raise ValueError(f"{path} holds NaN or infinite samples; export it again")
    samples = data.mean(axis=1)
    if rate != SAMPLE_RATE:
        import soxr  # librosa.resample calls it too, after compiling for 20 s

        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    if len(samples) < N_FFT:
        raise ValueError(
            f"{path} is too short: {len(samples)} samples at {SAMPLE_RATE} Hz, expected at least one window of {N_FFT} "
            f"({N_FFT / SAMPLE_RATE:.3f} s); use a longer recording"
        )

    used = len(samples) if wanted is None else min(wanted, len(samples))
    count = math.ceil(used / BLOCK) * BLOCK
    samples = samples[:count]
    if np.ptp(samples) < SILENCE:
        where = "" if used / SAMPLE_RATE > total - 0.05 else f" in its first {used / SAMPLE_RATE:.1f} s"
        raise ValueError(f"{path} is silent{where} (mixed to mono); use a recording with sound in it")
    samples, gain = within_full_scale(samples)
    samples = np.pad(samples, (0, count - len(samples)))
    info = AudioInfo(os.path.basename(path), rate, data.shape[1], total, used / SAMPLE_RATE, gain)
    return np.ascontiguousarray(samples, dtype=np.float32), info


def write_wav(path, samples):
    """Writes a mono 22.05 kHz WAV file atomically: the path holds the old file or the whole new one.

    24-bit PCM: plays everywhere, and a quiet sound keeps the 80 dB of the grids below its own peak (16 bits do not).
    Nothing is clipped: samples beyond full scale are scaled down as a whole. Returns the factor applied, 1.0 if none.
    Raises OSError where the file cannot be written.
    """
    import soundfile

    samples, gain = within_full_scale(as_samples(samples, minimum=0))
    path = os.fspath(path)
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise FileNotFoundError(f"no such folder: {folder}; create it before writing {path}")
    with atomic_write(path) as file:
        soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="PCM_24")
    return gain

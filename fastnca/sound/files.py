"""Sound files in and out."""

import io
import math
import numbers
import os
from dataclasses import dataclass

import numpy as np

from ..files import atomic_write
from .convention import BLOCK, N_FFT, SAMPLE_RATE, SILENCE, as_samples, within_full_scale

RATES = (1_000, 1_000_000)  # Hz: what lies outside is a damaged header
BLOCK_VALUES = 2**22  # decoded at once
UNKNOWN_FRAMES = 2**63 - 1  # what libsndfile says of a FLAC file from a pipe
QUIET_PEAK = 1e-3  # -60 dB of full scale
CANCELLED = 0.1  # of the level that independent channels would mix to
LOWEST_HZ = 20.0
RUMBLE = 1e-3  # of the sound's level: less than that below 20 Hz stays as it is
TOLD_RUMBLE_DB = -20.0  # white noise has -27


@dataclass(frozen=True)
class AudioInfo:
    """What ``load_audio`` found in a file and what it used; ``str(info)`` is one line for the user.

    duration: seconds that the file holds; used: seconds taken from its start (before rounding up to 8 frames).
    gain: 1.0, or the factor that brought a peak above full scale back to 1. notes: what the user should know of the
    file, each a clause.
    """

    name: str
    sample_rate: int
    channels: int
    duration: float
    used: float
    gain: float = 1.0
    notes: tuple = ()

    def __str__(self):
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        text = f"{self.name}: {self.duration:.1f} s at {self.sample_rate} Hz {channels}"
        if self.duration - self.used > 0.05:
            text += f"; using the first {self.used:.1f} s"
        if self.gain != 1.0:
            text += f"; peak {1 / self.gain:.3g} exceeds full scale, scaled to 1"
        return "; ".join((text, *self.notes))


@dataclass
class _Decoded:
    """The start of a file. samples: mono; powers: of each channel; frames: in the whole file; note: a clause on why
    they are fewer than the header says."""

    samples: np.ndarray
    powers: np.ndarray
    rate: int
    frames: int
    note: str | None = None


def _check_rate(path, rate):
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(
            f"{path} says that its sample rate is {rate} Hz, expected {RATES[0]} to {RATES[1]}: its header is damaged; "
            "export it again"
        )


def _decode_file(path, seconds):
    """-> _Decoded, decoding little more than ``seconds``, unless only the end can tell how long the file is."""
    import soundfile

    try:
        with _open_sound(path) as file:
            return _decode_sound(path, file, math.inf if seconds is None else math.ceil(seconds * file.samplerate))
    except (RuntimeError, TypeError) as error:  # TypeError: headerless .raw
        decoded = _decode_with_audioread(path, seconds)
        if decoded is None:
            reason = f" ({error.error_string})" if isinstance(error, soundfile.LibsndfileError) else ""
            raise ValueError(
                f"{path} is not audio that soundfile or librosa can read{reason}; use a WAV, FLAC, OGG or MP3 file"
            ) from error
        return decoded


def _open_sound(path):
    """The soundfile.SoundFile, also of a WAV file whose sizes are missing or lead astray."""
    import soundfile

    try:
        file = soundfile.SoundFile(os.fsencode(path))
        if file.frames:
            return file
    except soundfile.LibsndfileError:
        mended = _MendedWav.of(path)
        if mended is None:
            raise
        return soundfile.SoundFile(mended)
    mended = _MendedWav.of(path)
    return file if mended is None else soundfile.SoundFile(mended)


class _MendedWav(io.RawIOBase):
    """A WAV file reduced to its format and its samples, up to the end of the file whatever the header says: what a
    recorder that lost its power leaves, or a program that forgets the padding of chunks."""

    def __init__(self, file, head, offset):
        self.file, self.head, self.offset, self.position = file, head, offset, 0
        self.length = len(head) + os.fstat(file.fileno()).st_size - offset

    @classmethod
    def of(cls, path):
        """None where there is no format and no sample."""
        file = open(path, "rb")  # noqa: SIM115 (closed with what reads it)
        head = file.read(2**20)
        form, data = head.find(b"fmt "), head.find(b"data")
        after = head[data + 8 :]
        chunk_follows = after[:4].isalnum() and int.from_bytes(after[4:8], "little") <= len(after)
        if head[:4] != b"RIFF" or not 0 < form < data or not after or chunk_follows:
            file.close()
            return None
        size = int.from_bytes(head[form + 4 : form + 8], "little")
        unknown = b"\xff" * 4
        head = b"RIFF" + unknown + b"WAVE" + head[form : form + 8 + size] + b"data" + unknown
        return cls(file, head, data + 8)

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence])
        return self.position

    def readinto(self, buffer):
        part = self.head[self.position : self.position + len(buffer)]
        if not part:
            self.file.seek(self.position - len(self.head) + self.offset)
            part = self.file.read(len(buffer))
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def close(self):
        self.file.close()
        super().close()


def _decode_sound(path, file, count):
    import soundfile

    _check_rate(path, file.samplerate)
    samples, powers, frames, reason = _read(file, count)
    stated = file.frames
    if frames == count:
        try:
            file.seek(stated - 1)
            frames = stated
        except soundfile.LibsndfileError:  # the header's length is unknown or wrong
            with _open_sound(path) as again:
                *_, frames, reason = _read(again, math.inf, keep=False)
    note = None
    if reason or frames < stated < UNKNOWN_FRAMES:
        note = f"no more than {frames / file.samplerate:.1f} s can be decoded"
        note += f" ({reason})" if reason else f" of the {stated / file.samplerate:.1f} s in its header"
    return _Decoded(samples, powers, file.samplerate, frames, note)


def _read(file, count, keep=True):
    """Reads ``count`` frames, or all before the end or a place that cannot be decoded -> (mono samples, powers, how
    many frames, why not more)."""
    import soundfile

    file.seekable = lambda: False  # or it would seek after every block, which a file of unknown length does not allow
    buffer = np.empty((max(1, min(count, BLOCK_VALUES // file.channels)), file.channels), np.float32)
    parts, powers, frames, reason = [np.zeros(0, np.float32)], np.zeros(file.channels), 0, None
    while frames < count and reason is None:
        try:
            block = file.read(min(len(buffer), count - frames), out=buffer)
        except soundfile.LibsndfileError as error:
            reason = error.error_string.removeprefix("Error : ").rstrip(". ")
            block = buffer[: file.tell() - frames]
        if len(block) == 0:
            break
        frames += len(block)
        if keep:
            parts.append(block.mean(axis=1))
            powers += np.square(block, dtype=np.float64).sum(axis=0)
    return np.concatenate(parts), powers / max(1, frames), frames, reason


def _decode_with_audioread(path, seconds):
    """What librosa < 1.0 falls back on for AAC and the like; asked directly, as librosa's loader compiles for 20 s."""
    try:
        import audioread
    except ImportError:
        return None
    try:
        with audioread.audio_open(path) as file:
            rate, channels = file.samplerate, file.channels
            total = (file.duration or 0.0) if rate else 0.0
            missing = math.inf if seconds is None else math.ceil(seconds * rate) * channels * 2  # bytes of 16-bit PCM
            data = bytearray()
            for block in file:
                data += block
                if len(data) >= missing:
                    break
    except Exception:  # noqa: BLE001 (it lets through whatever its decoders raise for a damaged file)
        return None
    _check_rate(path, rate)
    if channels < 1:
        return None
    data = data[: len(data) // (2 * channels) * 2 * channels]
    block = np.frombuffer(data, dtype="<i2").reshape(-1, channels).astype(np.float32) / 32768
    powers = np.square(block).sum(axis=0) / max(1, len(block))
    return _Decoded(block.mean(axis=1), powers, rate, max(round(total * rate), len(block)))


def without_rumble(samples):
    """(samples, note): without what lies below 20 Hz, a constant offset above all; as they are where that is a
    thousandth of the sound or less. The note is a clause that says so where it was a tenth or more, else None.

    Nobody hears it, but as the loudest thing in the grids it would be what is learned, and decoded as a rumble.
    """
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    window = np.hanning(len(samples))  # so that a tone that is cut off does not count
    power = np.abs(np.fft.rfft(samples * window)) ** 2
    low, rest = power[hertz < LOWEST_HZ].sum(), max(power[hertz >= LOWEST_HZ].sum(), 1e-30)
    if low <= RUMBLE**2 * rest:
        return samples, None
    spectrum = np.fft.rfft(np.r_[samples, samples[::-1]])  # mirrored, as its end would jump to its start
    hertz = np.fft.rfftfreq(2 * len(samples), 1 / SAMPLE_RATE)
    spectrum *= np.clip(2 * hertz / LOWEST_HZ - 1, 0, 1)
    samples = np.fft.irfft(spectrum, 2 * len(samples))[: len(samples)].astype(np.float32)
    level = 10 * math.log10(low / rest)
    note = f"an offset or rumble below {LOWEST_HZ:.0f} Hz, {level:+.0f} dB beside the rest, was taken out"
    return samples, note if level > TOLD_RUMBLE_DB else None


def load_audio(path, duration=None):
    """Reads the start of an audio file as 22.05 kHz mono.

    path: any file that soundfile or librosa reads, any sample rate and number of channels.
    duration: seconds to use, ``None`` for the whole file; a shorter file is used whole. The result is rounded up
        to a multiple of 8 frames (2048 samples), with the file's own samples while it has them, then with zeros.
        Only the part that is needed is decoded.

    Returns (float32 array [n], AudioInfo). A peak above 1 (possible in float files) is scaled to 1: ``AudioInfo.gain``.
    Of a damaged file all that can be decoded before the damage is read. ``AudioInfo.notes`` says so, and what was done
    about an offset or a rumble below 20 Hz, channels that cancel each other, a very low level.

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
        wanted = max(1, round(min(duration, 1e9) * SAMPLE_RATE))
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; give the path of one audio file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}; give the path of an audio file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read; check its permissions")

    # 0.1 s more than is kept, so that the resampling filter sees what follows the cut
    seconds = None if wanted is None else math.ceil(wanted / BLOCK) * BLOCK / SAMPLE_RATE + 0.1
    decoded = _decode_file(path, seconds)
    samples, rate, total = decoded.samples, decoded.rate, decoded.frames / decoded.rate
    notes = [decoded.note]
    if len(samples) == 0:
        reason = f": {decoded.note}" if decoded.note else ""
        raise ValueError(f"{path} holds no samples{reason}; use a recording of at least {N_FFT / SAMPLE_RATE:.3f} s")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds NaN or infinite samples; export it again")
    apart = math.sqrt(decoded.powers.sum()) / len(decoded.powers)  # the level of a mix of independent channels
    cancelled = math.sqrt(np.square(samples, dtype=np.float64).mean()) < CANCELLED * apart
    if cancelled:
        notes.append("its channels nearly cancel each other in mono; give one of them as a file of its own")
    if rate != SAMPLE_RATE:
        import soxr  # librosa.resample calls it too, after compiling for 20 s

        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    if len(samples) < N_FFT:
        reason = f" ({decoded.note})" if decoded.note else ""
        raise ValueError(
            f"{path} is too short: {len(samples)} samples at {SAMPLE_RATE} Hz, expected at least one window of {N_FFT} "
            f"({N_FFT / SAMPLE_RATE:.3f} s); use a longer recording{reason}"
        )

    used = len(samples) if wanted is None else min(wanted, len(samples))
    count = math.ceil(used / BLOCK) * BLOCK
    samples = samples[:count]
    where = "" if used / SAMPLE_RATE > total - 0.05 else f" in its first {used / SAMPLE_RATE:.1f} s"
    advice = "its channels cancel each other: give one of them" if cancelled else "use a recording with sound in it"
    if np.ptp(samples) < SILENCE:
        raise ValueError(f"{path} is silent{where} (mixed to mono); {advice}")
    samples, note = without_rumble(samples)
    notes.append(note)
    if np.ptp(samples) < SILENCE:
        raise ValueError(f"{path} is silent{where} but for what lies below {LOWEST_HZ:.0f} Hz; {advice}")
    samples, gain = within_full_scale(samples)
    peak = float(np.abs(samples).max())
    if peak < QUIET_PEAK:
        notes.append(f"its peak is {20 * math.log10(peak):.0f} dB of full scale; make it louder to keep its details")
    samples = np.pad(samples, (0, count - len(samples)))
    notes = tuple(note for note in notes if note)
    info = AudioInfo(os.path.basename(path), rate, len(decoded.powers), total, used / SAMPLE_RATE, gain, notes)
    return np.ascontiguousarray(samples, dtype=np.float32), info


def check_wav_name(path):
    """Raises ValueError for a name that promises another format than WAV."""
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix.lower() not in ("", ".wav"):
        raise ValueError(f"{path} would hold WAV, not {suffix}; let its name end in .wav, and convert it afterwards")


def write_wav(path, samples):
    """Writes a mono 22.05 kHz WAV file atomically: the path holds the old file or the whole new one.

    24-bit PCM: plays everywhere, and a quiet sound keeps the 80 dB of the grids below its own peak (16 bits do not).
    Nothing is clipped: samples beyond full scale are scaled down as a whole. Returns the factor applied, 1.0 if none.
    Raises OSError where the file cannot be written, ValueError for a name that promises another format.
    """
    import soundfile

    check_wav_name(path)
    samples, gain = within_full_scale(as_samples(samples, minimum=0))
    wav = io.BytesIO()  # as soundfile does not say why it cannot write to a file
    soundfile.write(wav, samples, SAMPLE_RATE, format="WAV", subtype="PCM_24")
    with atomic_write(path) as file:
        file.write(wav.getbuffer())
    return gain

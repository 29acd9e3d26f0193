"""Sound in and out: files, the dual spectrogram in BigVGAN's own convention, a synthesised test note.

Both spectrograms share one framing (``stft``): 1024-sample periodic Hann window, hop 256, 384 samples of reflected
padding and no centring, so that n samples give exactly n / 256 frames.
"""

import math
import numbers
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .files import atomic_write

SAMPLE_RATE = 22050
N_FFT = 1024
HOP_LENGTH = 256
N_MELS = 80
N_LINEAR = N_FFT // 2 + 1
DB_RANGE = 80.0  # the grids hold -DB_RANGE..0 dB

BLOCK = 8 * HOP_LENGTH  # sounds are cut to a multiple of 8 frames
SILENCE = 1e-6  # peak-to-peak below -120 dB of full scale: under the 1e-9 power floor of the mel spectrogram
POWER_FLOOR = 1e-9  # added to |STFT|^2 by BigVGAN
MEL_FLOOR = 1e-5  # smallest mel magnitude that BigVGAN sees


@dataclass(frozen=True)
class SpectrogramConfig:
    """The spectrogram convention; the default is that of ``nvidia/bigvgan_v2_22khz_80band_256x``.

    ``fmin`` and ``fmax`` (Hz) bound the mel bands: 0..8000 for ``nvidia/bigvgan_base_22khz_80band``.
    """

    sample_rate: int = SAMPLE_RATE
    n_fft: int = N_FFT
    hop_length: int = HOP_LENGTH
    n_mels: int = N_MELS
    fmin: float = 0.0
    fmax: float = SAMPLE_RATE / 2

    def __post_init__(self):
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.hop_length > self.n_fft:
            raise ValueError(f"hop_length must not exceed n_fft = {self.n_fft}, got {self.hop_length}")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"fmin and fmax must satisfy 0 <= fmin < fmax <= {self.sample_rate / 2:g} Hz, "
                f"got {self.fmin!r} and {self.fmax!r}"
            )

    @property
    def n_linear(self):
        return self.n_fft // 2 + 1

    @property
    def padding(self):
        """Reflected samples on each side of the sound."""
        return (self.n_fft - self.hop_length) // 2


DEFAULT_CONFIG = SpectrogramConfig()


@dataclass(frozen=True, eq=False)
class DualSpectrogram:
    """Both spectrograms of one sound, in dB below their own maximum.

    mel_db: float32 tensor [n_mels, T]; linear_db: float32 tensor [n_linear, T]; both within [-80, 0], on the CPU.
    Arrays and tensors of any device are converted; another shape or a value that is not finite raises ValueError.
    mel_ref_db, linear_ref_db: the levels (dB, magnitude 1 = 0 dB) that were subtracted to put the maximum at 0 dB.
    """

    mel_db: torch.Tensor
    linear_db: torch.Tensor
    mel_ref_db: float
    linear_ref_db: float
    config: SpectrogramConfig

    def __post_init__(self):
        for name, bins in (("mel_db", self.config.n_mels), ("linear_db", self.config.n_linear)):
            grid = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float32)
            if grid.ndim != 2 or grid.shape[0] != bins:
                raise ValueError(f"{name} must have shape [{bins}, T], got {list(grid.shape)}")
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


def as_samples(samples, name="samples", minimum=N_FFT):
    """Checks a sound at the public door: 1-D, floating point, finite, at least ``minimum`` samples -> float32 array."""
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
    peak = float(np.abs(samples).max())
    gain = 1 / peak if peak > 1 else 1.0
    samples = np.pad(samples * np.float32(gain), (0, count - len(samples)))
    info = AudioInfo(os.path.basename(path), rate, data.shape[1], total, used / SAMPLE_RATE, gain)
    return np.ascontiguousarray(samples, dtype=np.float32), info


def write_wav(path, samples):
    """Writes a mono 22.05 kHz WAV file atomically: the path holds the old file or the whole new one.

    24-bit PCM: plays everywhere, and a quiet sound keeps the 80 dB of the grids below its own peak (16 bits do not).
    Nothing is clipped: samples beyond full scale are scaled down as a whole. Returns the factor applied, 1.0 if none.
    Raises OSError where the file cannot be written.
    """
    import soundfile

    samples = as_samples(samples, minimum=0)
    peak = float(np.abs(samples).max(initial=0.0))
    gain = 1 / peak if peak > 1 else 1.0
    path = os.fspath(path)
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise FileNotFoundError(f"no such folder: {folder}; create it before writing {path}")
    with atomic_write(path) as file:
        soundfile.write(file, samples * np.float32(gain), SAMPLE_RATE, format="WAV", subtype="PCM_24")
    return gain


@lru_cache
def mel_basis(config):
    """[n_mels, n_linear] Slaney mel filters of librosa, the ones BigVGAN was trained with."""
    from librosa.filters import mel

    filters = mel(sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax)
    return torch.from_numpy(filters).float()


def stft(samples, config):
    """Tensor [n] -> complex tensor [n_linear, n / hop]: BigVGAN's framing, see the module's docstring."""
    padded = F.pad(samples[None, None], (config.padding, config.padding), mode="reflect")[0, 0]
    window = torch.hann_window(config.n_fft, dtype=samples.dtype)
    return torch.stft(padded, config.n_fft, config.hop_length, window=window, center=False, return_complex=True)


def istft(spectrum, config):
    """Complex tensor [n_linear, T] -> tensor [T * hop], the least-squares inverse of ``stft``.

    Griffin and Lim 1984, eq. 6: windowed overlap-add over summed squared windows, the padding cut off. torch.istft
    refuses a window that starts at zero without centring.
    """
    n_frames = spectrum.shape[1]
    frames = torch.fft.irfft(spectrum, n=config.n_fft, dim=0)
    window = torch.hann_window(config.n_fft, dtype=frames.dtype)[:, None]
    both = torch.stack([frames * window, (window**2).expand(-1, n_frames)])
    length = config.n_fft + config.hop_length * (n_frames - 1)
    both = F.fold(both, (1, length), (1, config.n_fft), stride=(1, config.hop_length))[:, 0, 0]
    signal, weight = both[:, config.padding : length - config.padding]
    return signal / weight


def _to_grid(magnitude):
    level = 20 * torch.log10(magnitude.clamp(min=1e-20))
    reference = level.max().item()
    return (level - reference).clamp(-DB_RANGE, 0.0), reference


def analyze(samples, config=DEFAULT_CONFIG):
    """Sound -> DualSpectrogram with samples / 256 frames.

    samples: array or tensor [n], at least 1024 and a multiple of the hop, not silent.
    linear = |STFT|; mel = mel_basis @ sqrt(|STFT|^2 + 1e-9), as in ``bigvgan.meldataset.mel_spectrogram``. Both in dB
    (20 log10), minus their maximum (kept as the reference level), clipped to [-80, 0].
    """
    samples = as_samples(samples, minimum=config.n_fft)
    if len(samples) % config.hop_length:
        raise ValueError(f"samples must be a multiple of the hop, {config.hop_length}, got {len(samples)}")
    if np.ptp(samples) < SILENCE:
        raise ValueError("samples must not be silent, got a peak-to-peak level below -120 dB")
    power = stft(torch.from_numpy(samples), config).abs().square()
    mel_db, mel_ref_db = _to_grid(mel_basis(config) @ (power + POWER_FLOOR).sqrt())
    linear_db, linear_ref_db = _to_grid(power.sqrt())
    return DualSpectrogram(mel_db, linear_db, mel_ref_db, linear_ref_db, config)


def from_db(level_db, ref_db):
    """dB below a reference level -> magnitude, any shape."""
    return 10 ** ((torch.as_tensor(level_db, dtype=torch.float32) + ref_db) / 20)


def to_magnitude(level_db, ref_db):
    """Grid in dB and its reference level -> magnitude, any shape: the inverse of ``analyze``.

    A cell at -80 dB means "-80 or anything quieter" and becomes 0 (the lowest dB fades): decoded as -80 dB, the quiet
    cells of a decayed note add up to audible hiss.
    """
    return from_db(level_db, ref_db) * (torch.as_tensor(level_db) + DB_RANGE).clamp(0, 1)


def mel_to_log(mel_db, mel_ref_db):
    """Mel grid in dB, any shape -> BigVGAN's input, ln(max(mel, 1e-5)): the inverse of ``analyze`` above -80 dB."""
    nats_per_db = math.log(10) / 20
    return ((torch.as_tensor(mel_db, dtype=torch.float32) + mel_ref_db) * nats_per_db).clamp(min=math.log(MEL_FLOOR))


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

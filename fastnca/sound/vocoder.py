"""From a pair of grids to sound.

Magnitudes come from both grids: the linear one, corrected by the mel one (``merge_magnitudes``). Phase comes from
Griffin-Lim alone (``griffinlim``, needs no weights), or from BigVGAN's waveform with a few Griffin-Lim iterations to
join the two (``bigvgan``).
"""

import math
from dataclasses import dataclass

import torch

from .bigvgan import DEFAULT_BIGVGAN, find_bigvgan, load_bigvgan, mel_bands, vocode_mel
from .convention import DB_RANGE, DEFAULT_BANDS, N_LINEAR, POWER_FLOOR, MelBands, on_cpu
from .spectrogram import from_db, istft, mel_basis, stft, to_magnitude

VOCODERS = ("auto", "bigvgan", "griffinlim")
MOMENTUM = 0.99  # of Griffin-Lim, Perraudin's choice
MERGE_DB = 4.0  # see docs/experiments.md
MERGE_ITERATIONS = 30
JOIN_ITERATIONS = 32  # from a plausible phase the first few do most of the work


@on_cpu
def griffin_lim(magnitude, n_iter=200, phase=None, seed=0):
    """Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013) in the framing of ``spectrogram.analyze``.

    magnitude: [513, T], T >= 2, not in dB. phase: [513, T] in radians to start from; without it, random phases
    from ``seed``. Returns a float32 array of 256 * T samples.
    """
    magnitude = torch.as_tensor(magnitude, dtype=torch.float32)
    if magnitude.ndim != 2 or magnitude.shape[0] != N_LINEAR or magnitude.shape[1] < 2:
        raise ValueError(f"magnitude must have shape [{N_LINEAR}, T] with T >= 2, got {list(magnitude.shape)}")
    if not (torch.isfinite(magnitude).all() and (magnitude >= 0).all()):
        raise ValueError("magnitude must be finite and not negative (is it in dB?)")
    if phase is None:
        generator = torch.Generator().manual_seed(seed)
        phase = 2 * math.pi * torch.rand(magnitude.shape, generator=generator)
    elif phase.shape != magnitude.shape:
        raise ValueError(f"phase must have shape {list(magnitude.shape)}, got {list(phase.shape)}")
    spectrum = torch.polar(magnitude, torch.as_tensor(phase, dtype=torch.float32))
    previous = 0
    for _ in range(n_iter):
        consistent = stft(istft(spectrum))
        # Perraudin's step c + a (c - c_old) up to a factor, which the normalization below removes
        leading = consistent - MOMENTUM / (1 + MOMENTUM) * previous
        spectrum = magnitude * leading / (leading.abs() + 1e-16)
        previous = consistent
    return istft(spectrum).numpy()


@on_cpu
def merge_magnitudes(spectrogram):
    """Linear magnitudes [513, T] of a DualSpectrogram, corrected by its mel grid.

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung 2001), on the levels in dB, find levels
    whose mel projection equals the mel grid. What they change by more than MERGE_DB the linear grid does not know, and
    it is taken over; of a smaller change only half, the mean of two estimates that are about as good.

    A cell at -80 dB stands for anything from there down to 0, so only what contradicts the other grid is changed: the
    target's own grids come out as they went in. Bins outside every mel band stay as they are.
    """
    scale = spectrogram.scale
    basis = mel_basis(scale.bands)
    coverage = basis.sum(dim=0)[:, None]
    level = spectrogram.linear_db
    mel_low = to_magnitude(spectrogram.mel_db, scale.mel_ref_db)
    mel_high = from_db(spectrogram.mel_db, scale.mel_ref_db)
    for _ in range(MERGE_ITERATIONS):
        low, high = to_magnitude(level, scale.linear_ref_db), from_db(level, scale.linear_ref_db)
        too_quiet = (mel_low / (basis @ (high.square() + POWER_FLOOR).sqrt())).clamp(min=1)
        too_loud = (mel_high / (basis @ low).clamp(min=1e-30)).clamp(max=1)
        gain = torch.where(coverage > 0, basis.T @ (too_quiet * too_loud) / coverage.clamp(min=1e-30), 1.0)
        level = (level + 20 * torch.log10(gain)).clamp(min=-DB_RANGE)
    change = level - spectrogram.linear_db
    change = change * (1 - 0.5 / (1 + (change / MERGE_DB) ** 4))
    return to_magnitude(spectrogram.linear_db + change, scale.linear_ref_db)


@torch.no_grad()
def decode_joined(model, spectrogram):
    """Phase of BigVGAN's waveform, merged magnitudes of both grids, a few Griffin-Lim iterations to join them."""
    phase = stft(torch.from_numpy(vocode_mel(model, spectrogram))).angle()
    return griffin_lim(merge_magnitudes(spectrogram), JOIN_ITERATIONS, phase=phase)


@dataclass(frozen=True, eq=False)
class Vocoder:
    """A resolved choice. ``name``: "bigvgan" or "griffinlim"; ``bands``: the mel bands that its grids must have;
    ``hint``: one line for the user, or ``None``."""

    name: str
    bands: MelBands
    model: torch.nn.Module | None = None
    hint: str | None = None

    @on_cpu
    def decode(self, spectrogram):
        """DualSpectrogram -> float32 array of 256 * T samples; deterministic. The peak may lie above full scale."""
        self.check(spectrogram.scale.bands)
        if self.model is None:
            return griffin_lim(merge_magnitudes(spectrogram))
        return decode_joined(self.model, spectrogram)

    def check(self, bands):
        """Raises ValueError if this vocoder cannot decode grids of those mel bands; Griffin-Lim takes any."""
        if self.model is not None and bands != self.bands:
            raise ValueError(
                f"this BigVGAN's mel bands lie in {self.bands.fmin:g}..{self.bands.fmax:g} Hz and the grids' in "
                f"{bands.fmin:g}..{bands.fmax:g} Hz; take the one that the grids were made for, or griffinlim"
            )


@on_cpu
def resolve_vocoder(choice="auto", bigvgan=None):
    """Finds and loads what decoding will need, so that a bad choice fails before any training.

    choice: "auto" (BigVGAN where its weights are at hand, else Griffin-Lim and a hint; never the network), "bigvgan"
    (downloads it if need be) or "griffinlim". bigvgan: folder or hub name, ``None`` for the default one.

    Returns a Vocoder. Raises ValueError for an unknown choice, and what ``load_bigvgan`` raises.
    """
    if choice not in VOCODERS:
        raise ValueError(f"vocoder must be one of {', '.join(VOCODERS)}, got {choice!r}")
    name = bigvgan or DEFAULT_BIGVGAN
    if choice == "griffinlim":
        return Vocoder("griffinlim", DEFAULT_BANDS)
    if choice == "auto" and find_bigvgan(name) is None:
        hint = f"{name} is not in the local cache, so Griffin-Lim decodes the sound; --vocoder bigvgan downloads it"
        return Vocoder("griffinlim", DEFAULT_BANDS, hint=hint)
    model = load_bigvgan(name, download=choice == "bigvgan")
    return Vocoder("bigvgan", mel_bands(model.h), model)

"""From a pair of grids to sound.

Magnitudes come from both grids: the linear one, corrected by the mel one (``merge_magnitudes``). Phase comes from
Griffin-Lim alone (``griffinlim``, needs no weights), or from BigVGAN's waveform with a few Griffin-Lim iterations to
join the two (``bigvgan``).
"""

import contextlib
import io
import json
import math
import os
import re
import warnings
from dataclasses import dataclass

import torch

from .audio import (
    DB_RANGE,
    DEFAULT_CONFIG,
    HOP_LENGTH,
    N_FFT,
    N_MELS,
    POWER_FLOOR,
    SAMPLE_RATE,
    SpectrogramConfig,
    from_db,
    istft,
    mel_basis,
    mel_to_log,
    stft,
    to_magnitude,
)

DEFAULT_BIGVGAN = "nvidia/bigvgan_v2_22khz_80band_256x"
VOCODERS = ("auto", "bigvgan", "griffinlim")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "bigvgan_generator.pt"
MERGE_DB = 4.0  # see docs/recipes.md
JOIN_ITERATIONS = 32  # from a plausible phase the first few do most of the work


def griffin_lim(magnitude, n_iter=200, momentum=0.99, phase=None, seed=0, config=DEFAULT_CONFIG):
    """Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013) in the framing of ``audio.analyze``.

    magnitude: [513, T], T >= 2, not in dB. phase: [513, T] in radians to start from; without it, random phases
    from ``seed``. Returns a float32 array of 256 * T samples.
    """
    magnitude = torch.as_tensor(magnitude, dtype=torch.float32)
    if magnitude.ndim != 2 or magnitude.shape[0] != config.n_linear or magnitude.shape[1] < 2:
        raise ValueError(f"magnitude must have shape [{config.n_linear}, T] with T >= 2, got {list(magnitude.shape)}")
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
        consistent = stft(istft(spectrum, config), config)
        # Perraudin's step c + a (c - c_old) up to a factor, which the normalisation below removes
        leading = consistent - momentum / (1 + momentum) * previous
        spectrum = magnitude * leading / (leading.abs() + 1e-16)
        previous = consistent
    return istft(spectrum, config).numpy()


def merge_magnitudes(dual, n_iter=30):
    """Linear magnitudes [513, T] of a DualSpectrogram, corrected by its mel grid.

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung 2001), on the levels in dB, find levels
    whose mel projection equals the mel grid. What they change by more than MERGE_DB the linear grid does not know, and
    it is taken over; of a smaller change only half, the mean of two estimates that are about as good.

    A cell at -80 dB stands for anything from there down to 0, so only what contradicts the other grid is changed: the
    target's own grids come out as they went in. Bins outside every mel band stay as they are.
    """
    basis = mel_basis(dual.config)
    coverage = basis.sum(dim=0)[:, None]
    level = dual.linear_db
    mel_low, mel_high = to_magnitude(dual.mel_db, dual.mel_ref_db), from_db(dual.mel_db, dual.mel_ref_db)
    for _ in range(n_iter):
        low, high = to_magnitude(level, dual.linear_ref_db), from_db(level, dual.linear_ref_db)
        too_quiet = (mel_low / (basis @ (high.square() + POWER_FLOOR).sqrt())).clamp(min=1)
        too_loud = (mel_high / (basis @ low).clamp(min=1e-30)).clamp(max=1)
        gain = torch.where(coverage > 0, basis.T @ (too_quiet * too_loud) / coverage.clamp(min=1e-30), 1.0)
        level = (level + 20 * torch.log10(gain)).clamp(min=-DB_RANGE)
    change = level - dual.linear_db
    change = change * (1 - 0.5 / (1 + (change / MERGE_DB) ** 4))
    return to_magnitude(dual.linear_db + change, dual.linear_ref_db)


def spectrogram_config(h, where="BigVGAN configuration"):
    """A BigVGAN configuration (dict) -> SpectrogramConfig with its mel bands.

    Raises ValueError, naming ``where``, if its bands, rate or framing differ from this package's.
    """
    if not isinstance(h, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(h).__name__}")
    expected = {
        "num_mels": N_MELS,
        "sampling_rate": SAMPLE_RATE,
        "n_fft": N_FFT,
        "hop_size": HOP_LENGTH,
        "win_size": N_FFT,
    }
    wrong = [f"{key} {value}, found {h.get(key)}" for key, value in expected.items() if h.get(key) != value]
    if wrong:
        raise ValueError(f"{where} does not fit: expected {'; '.join(wrong)}; use a 22 kHz, 80-band BigVGAN")
    try:
        upsampling = math.prod(h["upsample_rates"])
        fmin = float(h["fmin"])
        fmax = SAMPLE_RATE / 2 if h["fmax"] is None else float(h["fmax"])
        config = SpectrogramConfig(fmin=fmin, fmax=fmax)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has no valid upsample_rates, fmin and fmax: {error!r}") from error
    if upsampling != HOP_LENGTH:
        raise ValueError(f"{where} does not fit: expected upsample_rates with product {HOP_LENGTH}, found {upsampling}")
    return config


def _is_hub_name(name):
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def find_bigvgan(name_or_dir):
    """Paths (config.json, bigvgan_generator.pt) in a local folder or the hub's cache, ``None`` if not cached.

    Never uses the network. Raises FileNotFoundError for a folder without those files and for what is neither a folder
    nor a hub name ("owner/name").
    """
    name_or_dir = os.fspath(name_or_dir)
    if os.path.isdir(name_or_dir):
        paths = tuple(os.path.join(name_or_dir, file) for file in (CONFIG_FILE, WEIGHTS_FILE))
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"no {os.path.basename(path)} in {name_or_dir}; "
                    f"a BigVGAN folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        return paths
    if not _is_hub_name(name_or_dir):
        raise FileNotFoundError(
            f"no such BigVGAN folder: {name_or_dir}; give a folder or a hub name such as {DEFAULT_BIGVGAN}"
        )
    from huggingface_hub import try_to_load_from_cache

    paths = tuple(try_to_load_from_cache(name_or_dir, file) for file in (CONFIG_FILE, WEIGHTS_FILE))
    return paths if all(isinstance(path, str) for path in paths) else None


def _download(name):
    from huggingface_hub import hf_hub_download

    try:  # shows its own progress bar on stderr
        return tuple(hf_hub_download(name, file) for file in (CONFIG_FILE, WEIGHTS_FILE))
    except Exception as error:  # requests, httpx or the hub's own, depending on its version
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"could not download BigVGAN {name} ({reason or type(error).__name__}); check the name and the network, "
            "or give a local folder"
        ) from error


def _import_bigvgan():
    """bigvgan's generator module, without its ``matplotlib.use("Agg")`` changing the user's backend."""
    from unittest import mock

    import matplotlib

    with mock.patch.object(matplotlib, "use"):
        import bigvgan.bigvgan as module
    return module


def load_bigvgan(name_or_dir=DEFAULT_BIGVGAN, download=False):
    """A BigVGAN generator for inference, on the CPU; ``model.h`` is its configuration.

    name_or_dir: local folder with ``config.json`` and ``bigvgan_generator.pt``, or a hub name. The hub is asked only
    with ``download=True`` and only for what is not in its cache. (``BigVGAN.from_pretrained`` of bigvgan 2.4.1 breaks
    with huggingface_hub >= 1.0.)

    Raises FileNotFoundError if the files are not there, OSError if a download fails, ValueError if bands, rate or
    framing do not fit or a file is damaged.
    """
    paths = find_bigvgan(name_or_dir)
    if paths is None and download:
        paths = _download(name_or_dir)
    if paths is None:
        raise FileNotFoundError(f"BigVGAN {name_or_dir} is not in the local cache; download it or give a local folder")
    config_path, weights_path = paths
    try:
        with open(config_path, encoding="utf-8") as file:
            h = json.load(file)
    except ValueError as error:
        raise ValueError(f"{config_path} is not valid JSON: {error}") from error
    spectrogram_config(h, config_path)
    try:
        state = torch.load(weights_path, map_location="cpu", weights_only=True)["generator"]
    except OSError:
        raise
    except Exception as error:  # damaged zip, foreign pickle or another structure: torch has no common type for these
        raise ValueError(f"{weights_path} is not a BigVGAN generator file (damaged or foreign): {error!r}") from error

    module = _import_bigvgan()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*weight_norm.*")  # bigvgan uses torch's old form
        try:
            model = module.BigVGAN(module.AttrDict(h))
            if not any(key.endswith("weight_g") for key in state):
                model.remove_weight_norm()
            model.load_state_dict(state)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{weights_path} does not fit its {CONFIG_FILE}: {reason}") from error
        model.remove_weight_norm()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def vocode_mel(model, dual):
    """BigVGAN alone on the mel grid: float32 array of 256 * T samples."""
    return model(mel_to_log(dual.mel_db, dual.mel_ref_db)[None])[0, 0].numpy()


@torch.no_grad()
def decode_joined(model, dual, n_iter=JOIN_ITERATIONS):
    """Phase of BigVGAN's waveform, merged magnitudes of both grids, ``n_iter`` Griffin-Lim iterations to join them."""
    phase = stft(torch.from_numpy(vocode_mel(model, dual)), dual.config).angle()
    return griffin_lim(merge_magnitudes(dual), n_iter, phase=phase, config=dual.config)


@dataclass(frozen=True, eq=False)
class Vocoder:
    """A resolved choice. ``name``: "bigvgan" or "griffinlim"; ``config``: the convention its mel grid must follow;
    ``hint``: one line for the user, or ``None``."""

    name: str
    config: SpectrogramConfig
    model: torch.nn.Module | None = None
    hint: str | None = None

    def decode(self, dual):
        """DualSpectrogram -> float32 array of 256 * T samples; deterministic."""
        self.check(dual.config)
        if self.model is None:
            return griffin_lim(merge_magnitudes(dual), config=dual.config)
        return decode_joined(self.model, dual)

    def check(self, config):
        """Raises ValueError if this vocoder cannot decode grids of that convention; Griffin-Lim takes any."""
        if self.model is not None and config != self.config:
            raise ValueError(
                f"this BigVGAN's mel bands lie in {self.config.fmin:g}..{self.config.fmax:g} Hz and the grids' in "
                f"{config.fmin:g}..{config.fmax:g} Hz; take the one that the grids were made for, or griffinlim"
            )


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
        return Vocoder("griffinlim", DEFAULT_CONFIG)
    if choice == "auto" and find_bigvgan(name) is None:
        hint = f"{name} is not in the local cache, so Griffin-Lim decodes the sound; --vocoder bigvgan downloads it"
        return Vocoder("griffinlim", DEFAULT_CONFIG, hint=hint)
    model = load_bigvgan(name, download=choice == "bigvgan")
    return Vocoder("bigvgan", spectrogram_config(model.h), model)

"""BigVGAN: its weights from a folder or the hub, its configuration, its waveform of a mel grid."""

import contextlib
import io
import json
import math
import os
import re
import warnings

import torch

from .convention import HOP_LENGTH, N_FFT, N_MELS, SAMPLE_RATE, MelBands
from .spectrogram import mel_to_log

DEFAULT_BIGVGAN = "nvidia/bigvgan_v2_22khz_80band_256x"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "bigvgan_generator.pt"


def mel_bands(config, where="BigVGAN configuration"):
    """A BigVGAN configuration (dict) -> its MelBands.

    Raises ValueError, naming ``where``, if its bands, rate or framing differ from this package's.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(config).__name__}")
    expected = {
        "num_mels": N_MELS,
        "sampling_rate": SAMPLE_RATE,
        "n_fft": N_FFT,
        "hop_size": HOP_LENGTH,
        "win_size": N_FFT,
    }
    wrong = [f"{key} {value}, found {config.get(key)}" for key, value in expected.items() if config.get(key) != value]
    if wrong:
        raise ValueError(f"{where} does not fit: expected {'; '.join(wrong)}; use a 22 kHz, 80-band BigVGAN")
    try:
        upsampling = math.prod(config["upsample_rates"])
        fmin = float(config["fmin"])
        fmax = SAMPLE_RATE / 2 if config["fmax"] is None else float(config["fmax"])
        bands = MelBands(fmin, fmax)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has no valid upsample_rates, fmin and fmax: {error!r}") from error
    if upsampling != HOP_LENGTH:
        raise ValueError(f"{where} does not fit: expected upsample_rates with product {HOP_LENGTH}, found {upsampling}")
    return bands


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
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{config_path} is not valid JSON: {error}") from error
    mel_bands(config, config_path)
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
            model = module.BigVGAN(module.AttrDict(config))
            if not any(key.endswith("weight_g") for key in state):
                model.remove_weight_norm()
            model.load_state_dict(state)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{weights_path} does not fit its {CONFIG_FILE}: {reason}") from error
        model.remove_weight_norm()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def vocode_mel(model, spectrogram):
    """BigVGAN alone on the mel grid of a DualSpectrogram: float32 array of 256 * T samples."""
    return model(mel_to_log(spectrogram.mel_db, spectrogram.scale.mel_ref_db)[None])[0, 0].numpy()

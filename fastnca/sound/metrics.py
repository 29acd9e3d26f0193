"""How close a sound, or a grown pair of grids, is to its target."""

import math

import numpy as np
import torch

from .convention import ACTIVE_DB, DB_RANGE, HOP_LENGTH, N_FFT, as_samples, on_cpu

FLOOR_DB = -200.0  # stands for minus infinity, which JSON cannot hold


def _decibel(ratio):
    return max(FLOOR_DB, 20 * math.log10(max(ratio, 1e-300)))


def _rms(samples):
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _magnitude(samples):
    return torch.stft(
        torch.from_numpy(samples).double(),
        N_FFT,
        HOP_LENGTH,
        window=torch.hann_window(N_FFT, dtype=torch.float64),
        center=True,
        pad_mode="constant",
        return_complex=True,
    ).abs()


@on_cpu
def compare(reference, generated):
    """Metrics of a generated sound against its reference, both [n] at 22.05 kHz with at least 2048 samples.

    S, G: magnitudes of the centred STFT (1024 / 256, Hann, zero padding) over the frames both sounds have.

    - ``spectral_convergence_db``: 20 log10(||S - G|| / ||S||), Frobenius norms (Arik et al. 2018); lower is better
    - ``log_spectral_distance_db``: mean over frames of the root mean square over bins of the level difference,
      levels in dB below the peak of S, clipped at -80
    - ``multi_resolution_stft``: ``auraloss.freq.MultiResolutionSTFTLoss`` with its defaults (Yamamoto et al. 2019)
    - ``rms_target``, ``rms_generated``: over the common samples; ``loudness_error_db``: their ratio, generated / target

    Every value is a finite float, so the result is valid JSON: dB values stop at -200 (identical sounds, no output).
    Raises TypeError or ValueError for sounds of the wrong form, and for a silent reference.
    """
    from auraloss.freq import MultiResolutionSTFTLoss, SpectralConvergenceLoss

    reference = as_samples(reference, "reference", minimum=2 * N_FFT)  # the largest window of auraloss
    generated = as_samples(generated, "generated", minimum=2 * N_FFT)
    common = min(len(reference), len(generated))
    s, g = _magnitude(reference), _magnitude(generated)
    frames = min(s.shape[1], g.shape[1])
    s, g = s[:, :frames], g[:, :frames]
    reference, generated = reference[:common], generated[:common]
    rms_target, rms_generated = _rms(reference), _rms(generated)
    if rms_target == 0:
        raise ValueError("reference must not be silent")

    levels = [20 * torch.log10((x / s.max()).clamp(min=10 ** (-DB_RANGE / 20))) for x in (s, g)]
    pair = [torch.from_numpy(x)[None, None] for x in (generated, reference)]
    return {
        "spectral_convergence_db": _decibel(SpectralConvergenceLoss()(g, s).item()),
        "log_spectral_distance_db": (levels[0] - levels[1]).square().mean(dim=0).sqrt().mean().item(),
        "multi_resolution_stft": MultiResolutionSTFTLoss()(*pair).item(),
        "rms_target": rms_target,
        "rms_generated": rms_generated,
        "loudness_error_db": _decibel(rms_generated / rms_target),
    }


def grid_metrics(grown, target):
    """Mean absolute level differences (dB) between two DualSpectrograms of the same shapes.

    Returns ``mel_l1_db`` and ``linear_l1_db`` over all cells, ``mel_l1_db_active`` and ``linear_l1_db_active`` over
    cells whose target is above -70 dB (``None`` where there is no such cell). Raises ValueError for other shapes.
    """
    result = {}
    for name in ("mel", "linear"):
        grid, wanted = (getattr(spectrogram, f"{name}_db") for spectrogram in (grown, target))
        if grid.shape != wanted.shape:
            raise ValueError(f"{name}_db must have shape {list(wanted.shape)}, got {list(grid.shape)}")
        error = (grid - wanted).abs()
        active = error[wanted > ACTIVE_DB]
        result[f"{name}_l1_db"] = error.mean().item()
        result[f"{name}_l1_db_active"] = active.mean().item() if len(active) else None
    return result

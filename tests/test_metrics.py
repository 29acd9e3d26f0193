import json

import numpy as np
import pytest
import torch

from fastnca.sound.metrics import compare, grid_metrics
from fastnca.sound.spectrogram import analyze
from fastnca.sound.synthetic import synthesize_bowed_string


@pytest.fixture(scope="module")
def note():
    return synthesize_bowed_string(0.5)


def magnitudes(sound):
    """[513, T] centred STFT straight from the definition."""
    padded = np.pad(sound.astype(np.float64), 512)
    window = np.sin(np.pi * np.arange(1024) / 1024) ** 2
    return np.stack(
        [np.abs(np.fft.rfft(padded[i : i + 1024] * window)) for i in range(0, len(padded) - 1023, 256)], axis=1
    )


def test_definitions(note):
    generated = (0.7 * note + 0.01 * np.random.default_rng(0).standard_normal(len(note))).astype(np.float32)[:-1500]
    result = compare(note, generated)
    s, g = magnitudes(note), magnitudes(generated)
    s, g = s[:, : g.shape[1]], g[:, : s.shape[1]]
    convergence = 20 * np.log10(np.linalg.norm(s - g) / np.linalg.norm(s))
    level_s, level_g = (np.maximum(20 * np.log10(x / s.max()), -80) for x in (s, g))
    distance = np.sqrt(((level_s - level_g) ** 2).mean(axis=0)).mean()
    assert result["spectral_convergence_db"] == pytest.approx(convergence, abs=1e-4)
    assert result["log_spectral_distance_db"] == pytest.approx(distance, abs=1e-4)
    rms = [np.sqrt(np.mean(x[: len(generated)].astype(np.float64) ** 2)) for x in (note, generated)]
    assert [result["rms_target"], result["rms_generated"]] == pytest.approx(rms)
    assert result["loudness_error_db"] == pytest.approx(20 * np.log10(rms[1] / rms[0]))


def test_half_amplitude(note):
    result = compare(note, 0.5 * note)
    assert result["spectral_convergence_db"] == pytest.approx(-6.0206, abs=1e-3)
    assert result["loudness_error_db"] == pytest.approx(-6.0206, abs=1e-3)


def test_multi_resolution_stft_is_auraloss(note):
    from auraloss.freq import MultiResolutionSTFTLoss

    other = synthesize_bowed_string(0.5, seed=1)
    wanted = MultiResolutionSTFTLoss()(torch.from_numpy(other)[None, None], torch.from_numpy(note)[None, None])
    assert compare(note, other)["multi_resolution_stft"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_extremes_are_valid_json(note, gain):
    result = json.loads(json.dumps(compare(note, gain * note), allow_nan=False))
    assert all(isinstance(value, float) for value in result.values())
    if gain:
        assert result["spectral_convergence_db"] == -200
        assert result["log_spectral_distance_db"] == result["multi_resolution_stft"] == result["loudness_error_db"] == 0
    else:
        assert result["loudness_error_db"] == -200
        assert result["spectral_convergence_db"] == 0


@pytest.mark.parametrize(
    ("reference", "generated", "error", "words"),
    [
        (np.zeros(4096, np.float32), np.ones(4096, np.float32), ValueError, "reference must not be silent"),
        (np.ones(4096, np.float32), np.ones(2000, np.float32), ValueError, "generated must hold at least 2048"),
        (np.ones(4096, np.float32), np.full(4096, np.inf), ValueError, "generated must be finite"),
        (np.ones((1, 4096), np.float32), np.ones(4096), ValueError, r"reference must have shape \[n\]"),
        (np.ones(4096, np.int16), np.ones(4096), TypeError, "reference must be floating point"),
    ],
)
def test_compare_rejects(reference, generated, error, words):
    with pytest.raises(error, match=words):
        compare(reference, generated)


def test_grid_metrics(note):
    target = analyze(note)
    quiet = target.mel_db <= -70
    grown_mel = torch.where(quiet, target.mel_db + 10, target.mel_db - 2)
    result = grid_metrics(target.with_grids(grown_mel, target.linear_db), target)
    share = quiet.float().mean().item()
    assert 0 < share < 1
    assert result == {
        "mel_l1_db": pytest.approx(10 * share + 2 * (1 - share), rel=1e-4),
        "mel_l1_db_active": pytest.approx(2.0, rel=1e-4),
        "linear_l1_db": 0.0,
        "linear_l1_db_active": 0.0,
    }


def test_grid_metrics_without_active_cells(note):
    target = analyze(note)
    target.mel_db.fill_(-80.0)
    assert grid_metrics(target, target)["mel_l1_db_active"] is None


def test_grid_metrics_rejects_another_shape(note):
    target = analyze(note)
    shorter = target.with_grids(target.mel_db[:, :8], target.linear_db[:, :8])
    with pytest.raises(ValueError, match=r"mel_db must have shape \[80, 48\], got \[80, 8\]"):
        grid_metrics(shorter, target)

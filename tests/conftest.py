import os

import numpy as np
import pytest
import torch

from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import write_wav
from fastnca.sound.spectrogram import DualSpectrogram, Scale

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: it must not be before this


def pytest_xdist_setupnodes(config, specs):
    """The processes that run the tests share the cores, and so do theirs."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(specs))))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that reached for the hub would hang or pass for the wrong reason."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def num_threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(num_threads):
    """For grids that are too small to share."""
    num_threads(1)


@pytest.fixture
def unwritten_memory_is_nan():
    """New memory holds NaN, so that what a kernel leaves unwritten cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    grid = torch.zeros(2)
    assert all(x.isnan().all() for x in (torch.empty(2), torch.empty_like(grid), grid.new_empty(2)))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def note(tmp_path):
    """A short wav file of a decaying tone with two partials: 8 frames."""
    t = np.arange(2048) / SAMPLE_RATE
    samples = (0.5 * np.sin(2 * np.pi * 441 * t) + 0.2 * np.sin(2 * np.pi * 882 * t)) * np.exp(-5 * t)
    path = tmp_path / "note.wav"
    write_wav(path, samples)
    return path


@pytest.fixture
def target():
    """A sound of 8 frames with two bright bands."""
    grids = []
    for bands in (80, 513):
        grid = torch.full((bands, 8), -75.0)
        grid[bands // 8 : bands // 4] = -10.0
        grid[bands // 2, 4:] = -30.0
        grids.append(grid)
    return DualSpectrogram(*grids, Scale(0.0, 0.0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs, made once: (the note, the run's folder)."""
    from commands import grow

    folder = tmp_path_factory.mktemp("finished")
    t = np.arange(2048) / SAMPLE_RATE
    write_wav(folder / "note.wav", 0.5 * np.sin(2 * np.pi * 441 * t))
    result = grow(folder / "note.wav", folder / "run", "--epochs", 3)
    assert result.exit_code == 0, result.stderr
    return folder / "note.wav", folder / "run"

"""A place for what other libraries compile, where they would find none."""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path


def lend_cache_folder():
    """Give numba, Triton and matplotlib a temporary folder where neither librosa's own nor the home can be written to.

    numba refuses to import librosa without one. Must be called before any of them is imported.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    librosa = Path(find_spec("librosa").origin).parent
    folders = [librosa / "core" / "__pycache__", home / "numba"]
    if "NUMBA_CACHE_DIR" in os.environ:
        folders.insert(0, Path(os.environ["NUMBA_CACHE_DIR"]))
    if any(_writable(folder) for folder in folders):
        return
    folder = tempfile.mkdtemp(prefix="fastnca-caches-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = folder
    for name in ("TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(name, folder)


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

"""The check of a GPU in Triton's interpreter, at a tiny size: that it runs, judges and writes, not what it measures."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.speed import gpu
from fastnca.automaton import triton

if not triton.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the check itself is the test of a GPU")


def run(*arguments, interpret=True):
    """In a process of its own, which decides at its start whether Triton interprets."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.gpu", *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
        cwd=Path(benchmarks.__file__).parent.parent,
        capture_output=True,
        text=True,
    )


def read(folder):
    """{section: its rows} of the CSV file."""
    sections = {}
    with open(folder / "gpu.csv", newline="") as file:
        for row in csv.DictReader(file):
            sections.setdefault(row["section"], []).append(row)
    return sections


def test_every_section_passes_or_says_that_it_needs_a_gpu(tmp_path):
    done = run("--quick", "-o", tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    sections = read(tmp_path)
    assert list(sections) == [section.__name__ for section in gpu.SECTIONS]
    silent = {name for name, rows in sections.items() if rows[0]["note"] == "needs a GPU"}
    assert silent == {"graphs", "memory", "peaks", "epoch"}
    assert {row["precision"] for row in sections["parity"]} == set(triton.PRECISIONS)
    assert [row["per step"] for row in sections["launches"]] == ["1", "3"]
    assert all(float(row["ms"]) > 0 for name in ("forward", "training") for row in sections[name])
    assert [row["run"] for row in sections["learning"]] == ["reference"]
    text = (tmp_path / "gpu.md").read_text()
    assert "All checks passed." in text and "needs a GPU" in text and text in done.stdout
    assert all(f"of 13: {name} ..." in done.stderr for name in sections)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("-o", tmp_path, interpret=False)
    assert done.returncode != 0
    assert "cannot run here: it runs on GPU tensors, not on cpu" in done.stderr and "TRITON_INTERPRET=1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def broken(size, found):
    """A section with an error in it"""
    raise RuntimeError("no such kernel")


def killed(size, found):
    """A section that ends its process"""
    os._exit(3)


def wrong(size, found):
    """A section with a wrong result"""
    return [{"precision": "fp32", "error": 0.5, "passed": False}, {"precision": "bf16", "error": 1e-9, "passed": True}]


def told(size, found):
    """A section that knows those before it"""
    return [{"sections": ", ".join(found)}]


def test_an_error_ends_its_section_and_no_other(tmp_path, capsys, monkeypatch):
    # Spawned processes import this module by its name for the sections.
    monkeypatch.setattr(gpu, "SECTIONS", (broken, killed, wrong, told))
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    results = gpu.main(["--quick", "-o", str(tmp_path)])
    assert not gpu.passed(results)
    sections = results["sections"]
    assert "RuntimeError: no such kernel" in sections["broken"]["error"]
    assert "BrokenProcessPool" in sections["killed"]["error"]
    assert sections["told"]["rows"] == [{"sections": "broken, killed, wrong"}]
    text = (tmp_path / "gpu.md").read_text()
    assert "Some checks failed." in text and "no such kernel" in text
    assert "| fp32 | 0.5 | **NO** |" in text and "| bf16 | 1e-09 | yes |" in text
    progress = capsys.readouterr().err
    assert "1 of 4: broken ... error" in progress and "3 of 4: wrong ... 1 failed" in progress


def test_the_first_sections_survive_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", (wrong, told))
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    write = gpu._write

    def write_once(folder, results):
        write(folder, results)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_write", write_once)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--quick", "-o", str(tmp_path)])
    assert list(read(tmp_path)) == ["wrong"]
    assert "The run is not complete." in (tmp_path / "gpu.md").read_text()

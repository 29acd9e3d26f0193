"""The benchmarks at a tiny size: that they run, agree and write, not what they measure."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import cpu, curves, implementations, recipes, workers
from fastnca import training

pytestmark = pytest.mark.skipif(
    implementations.why_not("cpu-fp32") is not None, reason="fastnca was installed without its extension"
)


def test_the_runner_writes_its_tables(tmp_path, capsys):
    sections = ["forward", "training", "checkpoints", "widths", "threads", "parity"]
    arguments = [*sections, "--quick", "--implementations", "cpu-bf16", "--threads", "1", "-o", str(tmp_path)]
    results = cpu.main(arguments)
    assert multiprocessing.active_children() == []
    assert list(results["sections"]) == sections
    for name, row in {row["name"]: row for row in results["sections"]["training"]}.items():
        assert row["p50"] > 0 and row["difference"] <= cpu.TOLERANCE.get(name, cpu.DEFAULT_TOLERANCE)
    rows = {row["name"]: row for row in results["sections"]["forward"]}
    assert 0 < rows["cpu-fp32"]["share"] <= 1.2
    assert rows["cpu-fp32"]["times_cpu-fp32"] == 1.0
    assert ("cpu-bf16" in rows) == (implementations.why_not("cpu-bf16") is None)
    assert [row["width"] for row in results["sections"]["widths"] if row["name"] == "cpu-fp32"] == [8, 16]
    assert {row["capability"] for row in results["sections"]["parity"]} >= {None, "baseline"}
    assert all(row["flips"] == 0.0 for row in results["sections"]["parity"] if row["name"] != "cpu-bf16")
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["sections"]["forward"] == results["sections"]["forward"]
    text = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| fastnca fp32 |" in text and results["about"]["commit"] in text and "python -m benchmarks.cpu" in text


def test_a_different_result_is_not_timed(monkeypatch):
    options = cpu.parse(["--quick", "--implementations", "eager", "--threads", "1"])
    monkeypatch.setattr(cpu, "DEFAULT_TOLERANCE", -1.0)
    with cpu.Bench(options) as bench, pytest.raises(AssertionError, match="does not compute the reference's forward"):
        cpu.forward(bench)


def test_unknown_sections_are_named(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["forwards"])
    assert "unknown section forwards" in capsys.readouterr().err


def test_a_workers_error_comes_back():
    with workers.Worker("cpu-fp32", 1) as worker, pytest.raises(workers.WorkerFailed, match="KeyError: 'nothing'"):
        worker.call("nothing")


def test_interleave_takes_turns_and_stops_the_slow():
    order = []

    def call(name, seconds):
        order.append(name)
        return {"seconds": [seconds], "cores": 1.0, "bytes": None}

    calls = {"slow": lambda: call("slow", 5.0), "fast": lambda: call("fast", 1.0)}
    summary = workers.interleave(calls, budget=4.0, rounds=3)
    assert order == ["slow", "fast", "fast", "fast"]
    assert summary["slow"]["count"] == 1 and summary["fast"]["count"] == 3
    assert summary["fast"]["p20"] == summary["fast"]["p50"] == summary["fast"]["p80"] == 1.0


def test_peak_memory_is_seen():
    idle = workers.reset_peak()
    if idle is None:
        pytest.skip("the system cannot reset a process's peak")
    block = bytearray(64 * 2**20)
    del block
    assert 60e6 < workers.resident_bytes(peak=True) - idle < 100e6


def test_curves_overlay(tmp_path, monkeypatch):
    monkeypatch.setitem(curves.RECIPES, "default", replace(curves.RECIPES["default"], num_steps=4))
    arguments = ["-o", str(tmp_path), "--epochs", "3", "--duration", "0.09", "--frames", "3", "--control"]
    results = curves.main(arguments)
    assert results["reference"]["final_loss_ratio"] == 1.0
    assert abs(results["cpu fp32"]["final_loss_ratio"] - 1.0) < 0.02
    assert curves.CONTROL in results
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "curves.json").read_text())["losses"]["reference"]) == 3


def test_curves_are_told_apart():
    expected = np.linspace(10.0, 5.0, 100)
    worse = expected.copy()
    worse[40:] *= 1.1
    result = curves.compare(worse, expected)
    assert result["epochs_within_1_percent"] == 40
    assert abs(result["final_loss_ratio"] - 1.1) < 1e-6 and abs(result["max_deviation"] - 0.1) < 0.01


def test_recipes_are_compared_and_finished_runs_kept(tmp_path, monkeypatch, capsys):
    for name, recipe in training.RECIPES.items():
        monkeypatch.setitem(training.RECIPES, name, replace(recipe, num_steps=4, learning_rate=1e-4))
    monkeypatch.setattr(recipes, "AGES", (6,))
    chosen = ["default", "default,linear_weight=0", "notebook"]
    arguments = ["voice", "--duration", "0.1", "--epochs", "1", "-o", str(tmp_path), "--recipes", *chosen]
    recipes.main(arguments)
    first = (tmp_path / "recipes.csv").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(recipes, "grow", None)
        recipes.main(arguments)
    assert (tmp_path / "recipes.csv").read_text() == first
    rows = json.loads((tmp_path / "recipes.json").read_text())
    assert [row["recipe"] for row in rows] == chosen
    assert all(row["epochs"] == 1 and "mel_l1_db@6" in row and row["commit"] for row in rows)
    assert rows[0]["ceiling/spectral_convergence_db"] < rows[0]["grown/spectral_convergence_db"]
    ratio = rows[0]["mel_l1_db"] / rows[2]["mel_l1_db"]
    assert f"| `default` | 1 | {ratio:.3g} ({ratio:.3g}) |" in (tmp_path / "recipes.md").read_text()
    assert (tmp_path / "voice_0.png").stat().st_size > 1000


def test_a_recipe_that_diverges_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Trainer, "loss", lambda self, mel_db, linear_db: float("nan") * mel_db.sum())
    recipes.main(["voice", "--duration", "0.1", "--epochs", "1", "-o", str(tmp_path), "--recipes", "notebook"])
    (row,) = json.loads((tmp_path / "recipes.json").read_text())
    assert "the loss became nan" in row["diverged"]
    assert "| `notebook` | 1 | 1 |" in (tmp_path / "recipes.md").read_text()


def test_changed_recipes_are_read():
    changed = recipes.find_recipe('default,continued=0.3,optimizer="adam",linear_weight=3')
    assert changed.continued == 0.3 and changed.optimizer == "adam" and changed.linear_weight == 3
    with pytest.raises(ValueError, match="no field 'learning'"):
        recipes.find_recipe("default,learning=1")
    with pytest.raises(ValueError, match="adam is not JSON"):
        recipes.find_recipe("default,optimizer=adam")

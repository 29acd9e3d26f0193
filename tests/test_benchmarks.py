"""The benchmarks at a tiny size: that they run, agree and write, not what they measure."""

import csv
import multiprocessing
import time

import numpy as np
import pytest
import torch

import fastnca
from benchmarks import implementations, morph, report
from benchmarks.quality import curves, pitches, recipes, sounds
from benchmarks.speed import cpu, workers
from fastnca.sound.convention import HOP_LENGTH, SAMPLE_RATE
from fastnca.sound.files import write_wav
from fastnca.sound.spectrogram import analyze

pytestmark = pytest.mark.skipif(
    implementations.why_not("cpu-fp32") is not None, reason="fastnca was installed without its extension"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Grids this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_cpu_benchmark_writes_its_tables(tmp_path, capsys):
    names = ["forward", "training", "checkpoints", "widths", "threads", "parity"]
    arguments = [*names, "--quick", "--implementations", "cpu-bf16", "--threads", "1", "-o", str(tmp_path)]
    sections = cpu.main(arguments)
    assert multiprocessing.active_children() == []
    assert list(sections) == names
    assert all(row["p50"] > 0 and row["difference"] <= cpu.TOLERANCE[row["name"]] for row in sections["training"])
    rows = {row["name"]: row for row in sections["forward"]}
    assert 0 < rows["cpu-fp32"]["share_of_peak"] <= 1.2
    assert rows["cpu-fp32"]["over_fp32"] == 1.0
    assert ("cpu-bf16" in rows) == (implementations.why_not("cpu-bf16") is None)
    assert [row["width"] for row in sections["widths"] if row["name"] == "cpu-fp32"] == [8, 16]
    assert {row["capability"] for row in sections["parity"]} >= {None, "baseline"}
    assert all(row["flipped"] == 0.0 for row in sections["parity"] if row["name"] != "cpu-bf16")
    written = read_csv(tmp_path / "cpu.csv")
    assert [row["section"] for row in written] == [name for name in names for _ in sections[name]]
    assert float(written[0]["p50"]) == pytest.approx(sections["forward"][0]["p50"], rel=1e-5)
    text = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| fastnca fp32 |" in text and report.machine()["commit"] in text
    assert "python -m benchmarks.speed.cpu forward" in text


def test_a_different_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(cpu.TOLERANCE, "cpu-fp32", -1.0)
    expected = pytest.raises(AssertionError, match="fastnca fp32 does not compute the reference's forward")
    with cpu.Bench(cpu.QUICK, 1, ["eager", "cpu-fp32"]) as bench, expected:
        cpu.forward(bench)


def test_unknown_sections_are_named(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["forwards"])
    assert "unknown section forwards" in capsys.readouterr().err


def test_a_workers_error_comes_back():
    with workers.Worker("cpu-fp32", 1) as worker, pytest.raises(KeyError, match="nothing"):
        worker.measure("nothing")


def test_turns_are_taken_and_the_slow_stop():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return name

    calls = {"slow": lambda: call("slow", 0.2), "fast": lambda: call("fast", 0.0)}
    turns = workers.take_turns(calls, budget=0.1, rounds=3)
    assert order == ["slow", "fast", "fast", "fast"]
    assert turns == {"slow": ["slow"], "fast": ["fast"] * 3}


def test_turns_are_summarized():
    turns = [workers.Turn([1.0, 2.0], 1.0, 10), workers.Turn([3.0], 3.0, 20), workers.Turn([4.0])]
    summary = workers.summarize(turns)
    assert summary == {"p20": pytest.approx(1.6), "p50": 2.5, "p80": pytest.approx(3.4), "count": 4} | {
        "cores": 2.0,
        "memory": 20,
    }
    assert report.quantiles([1.0]) == {"p20": 1.0, "p50": 1.0, "p80": 1.0, "count": 1}


def test_peak_memory_is_seen():
    idle = workers.reset_peak()
    if idle is None:
        pytest.skip("the system cannot reset a process's peak")
    block = bytearray(64 * 2**20)
    del block
    assert 60e6 < workers.resident_bytes(peak=True) - idle < 100e6


def test_flipped_cells_are_counted_once_per_cell():
    expected = [torch.ones(1, 16, 2, 5), torch.full((1, 16, 6, 5), 2.0)]
    grids = [grid.clone() for grid in expected]
    grids[0][0, :, 0, 0] += 1.0  # all channels of one cell
    grids[1][0, 3, 2, 2] += 1e-4
    share, error = implementations.flipped_cells(grids, expected)
    assert share == 1 / 40 and error == pytest.approx(0.5e-4, rel=1e-2)


def test_tables_leave_out_empty_columns_and_csv_keeps_six_digits(tmp_path):
    rows = [{"name": "a", "seconds": 0.0123456789, "note": None}, {"name": "b", "passed": False}]
    assert report.table(rows) == (
        "| name | seconds | passed |\n| --- | ---: | ---: |\n| a | 0.0123 |  |\n| b |  | **NO** |"
    )
    columns = {"seconds": ("time", report.duration), "other": ("other", None)}
    assert report.table(rows, columns).splitlines()[-2:] == ["| 12.3 ms |", "|  |"]
    report.write(tmp_path / "new", "results", "text\n", rows)
    assert (tmp_path / "new" / "results.csv").read_text() == "name,seconds,note,passed\na,0.0123457,,\nb,,,False\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["results.csv", "results.md"]


def test_curves_overlay(tmp_path):
    arguments = ["bowed", "-o", str(tmp_path), "--epochs", "3", "--duration", "0.09", "--control"]
    rows = {row["run"]: row for row in curves.main([*arguments, "--recipe", "default,num_steps=4"])}
    assert rows["reference"]["final_loss_ratio"] == 1.0
    assert abs(rows["cpu fp32"]["final_loss_ratio"] - 1.0) < 0.02
    assert curves.CONTROL in rows
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert [row["epoch"] for row in read_csv(tmp_path / "curves.csv")] == ["1", "2", "3"]
    assert "| cpu fp32 |" in (tmp_path / "curves.md").read_text()


def test_curves_are_told_apart():
    expected = np.linspace(10.0, 5.0, 100)
    worse = expected.copy()
    worse[40:] *= 1.1
    result = curves.compare(worse, expected)
    assert result["epochs_within_1_percent"] == 40
    assert abs(result["final_loss_ratio"] - 1.1) < 1e-6 and abs(result["max_deviation"] - 0.1) < 0.01


def test_recipes_are_compared_and_finished_runs_kept(tmp_path, monkeypatch):
    chosen = ["default,linear_weight=0,num_steps=4", "notebook"]
    monkeypatch.setattr(recipes, "AGES", (6,))
    monkeypatch.setattr(recipes, "HEALED", ((0.11, 2), (0.5, 3)))
    arguments = ["voice", "--duration", "0.1", "--epochs", "1", "-o", str(tmp_path), "--recipes"]
    recipes.main([*arguments, *chosen])
    first = (tmp_path / "recipes.csv").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(recipes, "grow", None)
        recipes.main([*arguments, *chosen])
    assert (tmp_path / "recipes.csv").read_text() == first
    rows = read_csv(tmp_path / "recipes.csv")
    assert [row["recipe"] for row in rows] == chosen
    assert all(row["epochs"] == "1" and row["mel_l1_db@6"] and row["commit"] for row in rows)
    error = {way: float(rows[0][f"{way}/spectral_convergence_db"]) for way in recipes.DECODED}
    assert error["ceiling"] < error["grown"]
    ratio = float(rows[0]["mel_l1_db"]) / float(rows[1]["mel_l1_db"])
    assert f"| `{chosen[0]}` | 1 | {ratio:.3g} ({ratio:.3g}) |" in (tmp_path / "recipes.md").read_text()
    assert (tmp_path / "voice_0.png").stat().st_size > 1000


def test_a_recipe_that_diverges_is_a_row(tmp_path):
    recipe = "notebook,learning_rate=1e30,num_steps=4"
    recipes.main(["voice", "--duration", "0.1", "--epochs", "20", "-o", str(tmp_path), "--recipes", recipe])
    (row,) = read_csv(tmp_path / "recipes.csv")
    assert "the loss became nan" in row["diverged"]
    assert f"| `{recipe}` | 1 | 1 |" in (tmp_path / "recipes.md").read_text()


def test_changed_recipes_are_read():
    text = 'default,continue_share=0.3,optimizer="adam",linear_weight=3'
    changed = recipes.read_recipe(text)
    assert changed.continue_share == 0.3 and changed.optimizer == "adam" and changed.linear_weight == 3
    assert changed.name == text
    with pytest.raises(ValueError, match="no field 'learning'"):
        recipes.read_recipe("default,learning=1")
    with pytest.raises(ValueError, match="adam is not JSON"):
        recipes.read_recipe("default,optimizer=adam")


@pytest.mark.parametrize("name", sounds.SOUNDS)
def test_synthesized_sounds_can_be_learned(name):
    _, samples = sounds.load(name, 0.5)
    assert analyze(samples).n_frames in (43, 48)  # a bowed string is rounded up to eight frames
    assert 0.1 < np.abs(samples).max() < 1.2


def harmonics(hertz, n_frames=43):
    t = np.arange(n_frames * HOP_LENGTH) / SAMPLE_RATE
    return 0.1 * sum(np.sin(2 * np.pi * hertz * n * t) / n for n in range(1, 12))


def test_what_is_left_of_an_old_pitch():
    old, new = 440.0, 440.0 * 2 ** (3 / 12)
    assert pitches.old_partials_db(analyze(harmonics(old)), old, new) > 20.0
    assert pitches.old_partials_db(analyze(harmonics(new)), old, new) < -20.0
    both = analyze(harmonics(old) + harmonics(new))
    assert pitches.old_partials_db(both, old, new) == pytest.approx(0.0, abs=3.0)
    assert pitches.old_partials_db(both, old, old / 2) is None  # an octave below, every old partial is a new one


def test_a_run_is_grown_at_other_pitches(tmp_path, capsys):
    write_wav(tmp_path / "other.wav", harmonics(523.25))
    fastnca.grow(harmonics(440.0), tmp_path / "run", epochs=1, vocoder="griffinlim")
    others = ["--others", str(tmp_path / "other.wav")]
    pitches.main([str(tmp_path / "run"), "--semitones", "-3", *others, "-o", str(tmp_path / "out")])
    down, other = read_csv(tmp_path / "out" / "pitches.csv")
    assert down["grown at"] == "-3 semitones" and float(down["Hz"]) == pytest.approx(370.0, rel=0.01)
    assert other["grown at"] == "other" and float(other["semitones"]) == pytest.approx(3.0, abs=0.2)
    assert down["mel, dB"] == "" and float(other["mel, dB"]) > 0 and float(other["pitch_shift: mel, dB"]) > 0
    assert (tmp_path / "out" / "pitches.md").read_text() in capsys.readouterr().out

    fastnca.grow(np.random.default_rng(0).standard_normal(8192), tmp_path / "noise", epochs=1, vocoder="griffinlim")
    with pytest.raises(ValueError, match="noise was learned without a pitch"):
        pitches.measure(tmp_path / "noise", [3], [])


def test_power_is_moved_by_transport():
    one, other = np.zeros(64), np.zeros(64)
    one[[10, 20]] = 3.0, 1.0
    other[[20, 50]] = 0.03, 0.01
    half = morph.transport(one, other, 0.5)
    assert np.flatnonzero(half > 1e-12).tolist() == [15, 35]
    np.testing.assert_allclose(half[[15, 35]], [0.3, 0.1])
    for alpha, end in ((0.0, one), (1.0, other)):
        np.testing.assert_allclose(morph.transport(one, other, alpha), end, atol=1e-12)
    powers = np.random.default_rng(0).random((2, 64))
    assert morph.transport(*powers, 0.3).sum() == pytest.approx(np.prod(powers.sum(axis=1) ** (0.7, 0.3)))
    np.testing.assert_allclose(morph.transport(one, np.zeros(64), 0.5), 1e-4 * one, atol=1e-12)
    assert not morph.transport(np.zeros(64), np.zeros(64), 0.5).any()


def test_mixtures_begin_and_end_with_the_ends():
    ends = analyze(harmonics(440.0, 24)), analyze(0.1 * harmonics(300.0, 16))
    for mix in morph.MIXTURES.values():
        for alpha, end in ((0.0, ends[0]), (1.0, ends[1])):
            mixture = mix(*ends, alpha, end.n_frames)
            for name in ("mel", "linear"):
                grids = (getattr(each, f"{name}_db") + getattr(each.scale, f"{name}_ref_db") for each in (mixture, end))
                assert (next(grids) - next(grids)).abs().mean() < 1.0, name


def test_one_sound_is_told_from_two():
    first, between, last = (harmonics(hertz) for hertz in (300.0, 300.0 * 1.4**0.5, 420.0))
    alphas = np.array(morph.ALPHAS)

    def measured(way):
        return morph.measure([morph.Heard(samples, analyze(first).scale.bands) for samples in way])

    glide = measured([harmonics(300.0 * 1.4**alpha) for alpha in alphas])
    assert glide["one sound"] and glide["sane"] and glide["own"] > 0.5 and abs(glide["cents"]) < 15
    assert glide["peaks"] == pytest.approx(1.0, abs=0.1)
    assert glide["linearity: centroid, octave"] < 0.02 and glide["unevenness"] < 0.3
    fade = measured([(1 - alpha) * first + alpha * last for alpha in alphas])
    assert not fade["one sound"] and fade["sane"] and fade["own"] < 0.1 and fade["peaks"] > 1.5
    assert fade["detour"] == pytest.approx(1.0, abs=0.1)
    jump = measured([first] * 3 + [between] + [last] * 3)
    assert jump["one sound"] and jump["smoothness"] > 2 * glide["smoothness"]
    assert jump["unevenness"] > 2 * glide["unevenness"]
    silence = measured([first] * 3 + [1e-3 * between] + [last] * 3)
    assert not silence["sane"] and silence["level, dB"] == pytest.approx(-60.0, abs=1.0)
    noise = measured([first] * 3 + [0.1 * np.random.default_rng(0).standard_normal(len(first))] + [last] * 3)
    assert not noise["sane"] and not noise["one sound"] and noise["cents"] is None


def test_curves_bend():
    alphas = np.array(morph.ALPHAS)
    assert morph.curvature(3.0 - 2.0 * alphas) == pytest.approx((0.0, 0.0), abs=1e-9)
    smoothness, linearity = morph.curvature(alphas**2)
    assert smoothness == pytest.approx(2.0)
    assert linearity == pytest.approx(np.sqrt(np.mean((alphas - alphas**2) ** 2)))


def test_ways_between_sounds_are_measured(tmp_path, capsys):
    write_wav(tmp_path / "low.wav", harmonics(220.0, 8))
    write_wav(tmp_path / "high.wav", harmonics(300.0, 16))
    paths, out = [tmp_path / "low.wav", tmp_path / "high.wav"], tmp_path / "out"
    fastnca.learn(paths, tmp_path / "space", epochs=2, vocoder="griffinlim", precision="fp32", pitch="none")
    morph.main([str(tmp_path / "space"), "low:high", "-o", str(out), "--sounds", "--pictures"])
    rows = read_csv(out / "morph.csv")
    ways = ["learned", "crossfade", "dB", "magnitude", "transport"]
    assert [(row["pair"], row["way"]) for row in rows] == [("low:high", way) for way in ways]
    assert all(float(row["smoothness"]) > 0 and float(row["detour"]) > 0.99 for row in rows)
    text = (out / "morph.md").read_text()
    assert text in capsys.readouterr().out and "**low:high**" in text and "| crossfade | " in text
    names = {"morph.csv", "morph.md", "low-high.png", *(f"low-high-{way}.wav" for way in ways)}
    assert {path.name for path in out.iterdir()} == names
    for wrong in ("low", "low:none", "low:low"):
        with pytest.raises(SystemExit):
            morph.main([str(tmp_path / "space"), wrong, "-o", str(out)])
        assert f"a pair is two of low, high, with a colon between, got {wrong}" in capsys.readouterr().err


def test_the_learned_way_is_compared():
    rows = [
        {"pair": "a:b", "way": "learned", "smoothness": 1.0, "linearity": 1.0, "one sound": True},
        {"pair": "a:b", "way": "dB", "smoothness": 2.0, "linearity": 0.5, "one sound": False},
        {"pair": "c:d", "way": "learned", "smoothness": 3.0, "linearity": 1.0, "one sound": False},
        {"pair": "c:d", "way": "dB", "smoothness": 2.0, "linearity": 2.0, "one sound": True},
    ]
    (row,), lines = morph.comparison(rows)
    assert list(row.values()) == ["dB", *["1 of 2"] * 4]
    assert lines == ["- not smoother than dB: c:d", "- not one sound where dB is: c:d", "- not one sound: c:d"]

"""fastnca life: growth from one cell, age and wounds in numbers and a picture."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastnca
from fastnca import life
from fastnca.cli import app
from fastnca.context import Places
from fastnca.sound.spectrogram import Scale
from fastnca.sound.vocoder import resolve_vocoder
from fastnca.sound_model import SoundCard, SoundModel


def make_model(growth=True):
    """An automaton that has learned nothing yet; with growth life spreads, and every living cell counts its age."""
    automaton = fastnca.DualSpecTNCA(context=Places() if growth else None, growth=growth)
    with torch.no_grad():
        automaton.update_mlp[-1].bias[0] = -1e-3
    card = SoundCard(Scale(0.0, 0.0), 8, 8, "griffinlim", None, "default", 1)
    return SoundModel(automaton, card, resolve_vocoder("griffinlim", None))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(life, "HEALING", (2, 4))
    monkeypatch.setattr(life, "HOLES", (0.11, 0.25))


def test_a_life_in_numbers(target, short):
    steps = []
    found = life.measure(make_model(), target, (3, 6), on_step=lambda done, total: steps.append((done, total)))
    assert found.steps_to_full == 256  # the linear grid, from its middle
    assert set(found.at) == {"mel", "linear"} and list(found.at["mel"]) == [3, 6]
    assert all(0.0 < error < 80.0 for errors in found.at.values() for error in errors.values())
    assert [(wound.kind, wound.share) for wound in found.wounds] == [
        ("hole", 0.11), ("hole", 0.25), ("time slice", 0.1), ("band", 0.1)
    ]  # fmt: skip
    for wound in found.wounds:
        assert wound.wounded != wound.before
        assert list(wound.healed["mel"]) == list(wound.twin["linear"]) == [2, 4]
    assert all(done <= total for done, total in steps) and steps == sorted(steps)


def test_errors_are_those_of_the_grown_grids(target, short):
    model = make_model()
    found = life.measure(model, target, (3,))
    grids = model.automaton.rollout(*model.automaton.seed(8), 3)
    for grid, name in zip(grids, ("mel", "linear")):
        error = (fastnca.decode_db(grid)[0] - getattr(target, f"{name}_db")).abs().mean().item()
        assert found.at[name][3] == pytest.approx(error, rel=1e-6)


def test_without_growth_everything_lives_at_once(target, short):
    assert life.measure(make_model(growth=False), target, (3,)).steps_to_full == 1


def test_life_that_never_fills_is_told(target, short, monkeypatch):
    monkeypatch.setattr(life, "PATIENCE", 1)
    model = make_model()
    with torch.no_grad():
        model.automaton.update_mlp[-1].bias[1] = -1.0
    found = life.measure(model, target, (3,))
    assert found.steps_to_full is None and found.to_dict()["one_seed_mel_l1_db"] is None


def test_wounds_lie_in_the_middle():
    for kind, share, rows, columns in life.boxes(80, 60):
        grid = torch.zeros(80, 60)
        grid[rows, columns] = 1.0
        assert grid.mean() == pytest.approx(share, rel=0.06)
        if kind == "hole":
            assert torch.equal(grid.flip(0, 1), grid) or abs(grid.flip(0, 1) - grid).sum() < 150


def test_the_command(target, short, tmp_path, monkeypatch):
    monkeypatch.setattr(life, "AGES", (3, 6))
    model = make_model()
    model.save(tmp_path / "model.safetensors")
    model.decode(target.mel_db, target.linear_db).save(tmp_path / "target.wav")

    def run(*options):
        return CliRunner().invoke(app, ["life", str(tmp_path), *options])

    result = run("--until", "5")
    assert result.exit_code == 0, result.stderr
    assert "full 256 steps after one live cell" in result.stdout and "time slice, 10%" in result.stdout
    numbers = json.loads((tmp_path / "life.json").read_text())
    assert numbers["one_seed_steps_to_full"] == 256 and list(numbers["linear_l1_db_at"]) == ["3"]
    assert set(numbers["wounds"][0]) == {
        "kind", "share", *(f"{g}_{w}" for g in ("mel", "linear") for w in ("before", "wounded", "healed", "twin"))
    }  # fmt: skip
    with Image.open(tmp_path / "life.png") as picture:
        assert min(picture.size) > 500
    assert "until must be at least 3 steps, got 2" in run("--until", "2").stderr
    (tmp_path / "target.wav").unlink()
    assert "no recording" in run().stderr and run().exit_code == 2

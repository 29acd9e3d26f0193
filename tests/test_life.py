"""How alive a sound is: growing from one cell, ageing and healing, and the command that tells it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastnca import life
from fastnca.cli import app
from fastnca.context import Places
from fastnca.model import DualSpecTNCA
from fastnca.sound.convention import MelBands
from fastnca.sound.files import write_wav
from fastnca.sound.spectrogram import Scale
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.sound.vocoder import resolve_vocoder
from fastnca.sound_model import SoundCard, SoundModel

VERSION_2 = Path(__file__).parent / "data" / "model_version_2.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


def sound_model(n_frames=8, **options):
    card = SoundCard(Scale(0.0, 0.0, MelBands()), n_frames, 8, "griffinlim", None, "default", 1)
    return SoundModel(DualSpecTNCA(**options), card, resolve_vocoder("griffinlim", None))


def growing():
    """Life spreads by one cell a step, and the value stays at 0, or -40 dB."""
    return sound_model(context=Places(), growth=True)


def life_cli(*arguments):
    return CliRunner().invoke(app, ["life", *(str(argument) for argument in arguments)])


def test_life_from_one_cell_fills_the_grids(target):
    progress = []
    measured = life.measure(
        growing(), target, ages=(2, 300), healing=(2, 4), on_progress=lambda *done: progress.append(done)
    )
    # From the middle of 513 bands to the first there are 256; the last step is that of a cell whose neighbor lives.
    assert measured.one_seed_steps_to_full == measured.least_steps_to_full == 255
    assert measured.wounded_at == 255 + 32
    error = (target.mel_db + 40.0).abs().mean().item()
    assert measured.one_seed_mel_l1_db == pytest.approx(error)
    assert measured.mel_l1_db_at == {2: pytest.approx(error), 300: pytest.approx(error)}
    shares = [share for share, _ in progress]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0, abs=0.01)
    titles = [title for title, _ in measured.picture.growth]
    assert titles == ["step 64", "step 128", "step 191", "step 255", "step 300", "recording"]
    mel, linear = measured.picture.growth[0][1]
    assert not torch.from_numpy(mel).isnan().any() and torch.from_numpy(linear).isnan().any()


def test_life_that_does_not_spread_is_told(target, monkeypatch):
    model = growing()
    torch.nn.init.constant_(model.automaton.update_mlp[-1].bias, 0.0)
    monkeypatch.setattr(life, "PATIENCE", 0.01)
    measured = life.measure(model, target, ages=(), healing=(1,))
    assert measured.one_seed_steps_to_full is None and measured.one_seed_mel_l1_db is None
    assert len(measured.wounds) == 6


def test_wounds_are_errors_beside_the_undamaged_twin(target):
    """Without growth, and with a rule that changes nothing but the value: +0.1 a step everywhere."""
    model = sound_model()
    model.automaton.update_mlp[-1].bias.data[0] = 0.1
    measured = life.measure(model, target, ages=(1, 37), healing=(2, 4))
    assert measured.one_seed_steps_to_full == 1 and measured.wounded_at == 33
    assert [(row["kind"], row["share"]) for row in measured.wounds] == list(life.WOUNDS)

    def level(steps):
        return torch.tanh(torch.tensor(0.1 * steps)) * 40 - 40

    for row in measured.wounds:
        assert row["mel_before"] == pytest.approx((target.mel_db - level(33)).abs().mean().item(), rel=1e-4)
        assert row["mel_twin"][4] == pytest.approx((target.mel_db - level(37)).abs().mean().item(), rel=1e-4)
        assert row["mel_twin"][4] == pytest.approx(measured.mel_l1_db_at[37])
        assert set(row["linear_healed"]) == {2, 4} and row["linear_wounded"] < row["linear_before"]


@pytest.mark.parametrize(
    ("kind", "share", "rows", "columns"),
    [("hole", 0.25, 40, 10), ("time slice", 0.1, 80, 2), ("band", 0.1, 8, 20), ("hole", 1e-9, 1, 1)],
)
def test_a_wound_is_in_the_middle(kind, share, rows, columns):
    grid = torch.ones(3, 80, 20)
    life.wound(grid, kind, share)
    assert (grid == grid[0]).all() and (grid == 0).sum() == 3 * rows * columns
    top, left = (80 - rows) // 2, (20 - columns) // 2
    assert (grid[:, top : top + rows, left : left + columns] == 0).all()


def test_a_life_that_explodes_is_null(target):
    model = sound_model(life_mask=False)
    model.automaton.update_mlp[-1].bias.data[0] = float("nan")
    measured = life.measure(model, target, ages=(2,), healing=(1,))
    assert measured.mel_l1_db_at == {2: None}
    json.dumps(measured.to_dict(), allow_nan=False)


def test_command(note, tmp_path, monkeypatch):
    """On a run's folder, and without growth."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(note, run / "target.wav")
    sound_model().save(run / "model.safetensors")
    monkeypatch.setattr(life, "AGES", (4, 8, 500_000))
    monkeypatch.setattr(life, "HEALING", (1, 2))
    result = life_cli(run, "--until", 8)
    assert result.exit_code == 0, result.stderr
    told = json.loads((run / "life.json").read_text())
    assert list(told["mel_l1_db_at"]) == list(told["linear_l1_db_at"]) == ["4", "8"]
    assert told["one_seed_steps_to_full"] == 1
    for words in ("fills both grids in 1 steps", "8 steps", "time slice, 10 %", "none"):
        assert words in result.stdout
    with Image.open(run / "life.png") as picture:
        assert picture.format == "PNG"


def test_command_on_a_model_of_version_2(tmp_path, monkeypatch):
    """A model file alone, and a recording that is named."""
    write_wav(tmp_path / "recording.wav", synthesize_bowed_string(duration=1.1))
    shutil.copy(VERSION_2, tmp_path / "old.safetensors")
    monkeypatch.setattr(life, "AGES", (2,))
    monkeypatch.setattr(life, "HEALING", (1,))
    monkeypatch.setattr(life, "SETTLING_STEPS", 1)
    monkeypatch.setattr("fastnca.sound.pictures._draw_life", None)
    with pytest.warns(UserWarning, match="life.png could not be drawn"):
        result = life_cli(tmp_path / "old.safetensors", "--target", tmp_path / "recording.wav", "--until", 2)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == f"written: {tmp_path / 'life.json'}"
    assert json.loads((tmp_path / "life.json").read_text())["n_frames"] == 88


def test_bad_input_is_told_before_any_growth(note, tmp_path, monkeypatch):
    monkeypatch.setattr(life, "measure", None)
    sound_model(n_frames=16).save(tmp_path / "model.safetensors")
    for options, words in (
        ((), "target.wav, the recording that it was learned from; name it by --target"),
        (("--target", tmp_path / "none.wav"), "no such file"),
        (("--target", note), "has 8 frames, and the model learned 16"),
        (("--until", 3), "until must be at least 96 steps, got 3"),
    ):
        result = life_cli(tmp_path, *options)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("fastnca: ")
    assert not (tmp_path / "life.json").exists()

"""A growth and its events, settings, and the package from Python: fastnca.grow and fastnca.load."""

import csv
import doctest
import json
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastnca
from fastnca import caches, run, sound_model
from fastnca import growth as events
from fastnca.growth import Checkpoint, CheckpointDue, Done, EpochDone, Growth, PictureDue, TrainingDone
from fastnca.settings import DEFAULT_MINUTES, RunSettings
from fastnca.sound.files import load_audio
from fastnca.sound_model import SETTLING_STEPS
from fastnca.training.recipes import RECIPES
from fastnca.training.trainer import Budget

TINY = replace(RECIPES["default"], name="tiny", num_steps=2, picture_every_epochs=2)
OPTIONS = {"recipe": TINY, "vocoder": "griffinlim", "pitch": "none"}


def make_growth(note, epochs=5, **given):
    settings = RunSettings.merge({**OPTIONS, "epochs": epochs, **given})
    return Growth(load_audio(note)[0], settings, checkpoint_every_epochs=2)


def test_pitch_is_found_read_or_none(note):
    for pitch, hertz in (("auto", 441.0), ("none", None), ("E4", 329.63)):
        growth = make_growth(note, pitch=pitch)
        assert growth.trainer.model.places.pitch_hz == (hertz and pytest.approx(hertz, rel=0.01))
    with pytest.raises(ValueError, match="pitch must be a note"):
        make_growth(note, pitch="high")


class TestEvents:
    def test_come_in_order(self, note):
        growth = make_growth(note)
        seen = list(growth.events())
        assert [type(event) for event in seen] == [
            EpochDone,
            *(EpochDone, PictureDue, CheckpointDue),
            EpochDone,
            *(EpochDone, PictureDue, CheckpointDue),
            EpochDone,
            *(TrainingDone, Done),
        ]
        assert [event.epoch for event in seen if isinstance(event, CheckpointDue)] == [2, 4]
        assert [event.progress for event in seen if isinstance(event, EpochDone)] == [0.2, 0.4, 0.6, 0.8, 1.0]
        assert seen[-2] == TrainingDone(5, stopped=False)
        sound = seen[-1].result
        assert sound.metrics["epochs"] == 5 and len(sound.samples) == 2048
        model = growth.model()
        assert sound.metrics["steps"] == model.automaton.steps_to_fill(8) + SETTLING_STEPS
        assert sound.metrics["pitch_hz"] is None
        assert torch.equal(sound.spectrogram.mel_db, model.automaton.grow(8, sound.metrics["steps"])[0])

    def test_a_setback_is_one(self, note):
        growth = make_growth(note, recipe=replace(TINY, continue_share=0.0))
        seen = growth.events()
        next(seen)
        with torch.no_grad():
            growth.trainer.model.update_mlp[0].weight.fill_(torch.nan)
        assert next(seen) == events.Setback(2)
        assert isinstance(next(seen), EpochDone)

    def test_stop_ends_after_the_epoch(self, note):
        growth = make_growth(note, epochs=1000)
        seen = []
        for event in growth.events():
            seen.append(event)
            if isinstance(event, EpochDone):
                growth.stop()
        assert seen[-2] == TrainingDone(1, stopped=True) and seen[-1].result.metrics["epochs"] == 1

    def test_another_thread_may_pause_look_and_stop(self, note):
        growth = make_growth(note, epochs=100000)
        seen, some = [], threading.Event()

        def take():
            for event in growth.events():
                seen.append(event)
                some.set()

        thread = threading.Thread(target=take)
        thread.start()
        try:
            assert some.wait(60)
            for _ in range(3):
                assert torch.isfinite(growth.grown().mel_db).all()
            growth.pause()
            some.clear()
            some.wait(1.0)  # the present epoch may still end
            held = growth.trainer.epoch
            first = growth.grown()
            thread.join(0.5)
            assert thread.is_alive() and growth.trainer.epoch == held
            assert torch.equal(first.linear_db, growth.grown().linear_db)
            growth.go_on()
            while growth.trainer.epoch == held and thread.is_alive():
                thread.join(0.01)
            assert growth.trainer.epoch > held
            growth.pause()
        finally:
            growth.stop()  # out of a pause, too
            thread.join(60)
        assert isinstance(seen[-1], Done) and seen[-2].stopped

    def test_what_it_shows_is_not_what_training_changes_next(self, note):
        growth = make_growth(note)
        seen = growth.events()
        next(seen)
        model = growth.model()
        kept = [parameter.clone() for parameter in model.automaton.parameters()]
        next(seen)
        assert all(torch.equal(*pair) for pair in zip(kept, model.automaton.parameters(), strict=True))
        assert not torch.equal(kept[4], growth.model().automaton.update_mlp[-1].weight)


class TestSettings:
    def test_defaults(self):
        settings = RunSettings.merge({name: None for name in ("recipe", "epochs", "minutes", "seed")})
        assert settings == RunSettings(minutes=DEFAULT_MINUTES) and settings.recipe == RECIPES["default"]

    def test_what_is_given_goes_before_what_is_stored(self):
        stored = RunSettings(epochs=7, seed=3, vocoder="griffinlim")
        assert RunSettings.merge({}, stored) == stored
        assert RunSettings.merge({"vocoder": "auto", "seed": 3}, stored) == replace(stored, vocoder="auto")
        assert RunSettings.merge({"minutes": 2.0}, stored) == replace(stored, epochs=None, minutes=2.0)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"seed": 4}, "started with seed 0, which cannot become 4"),
            ({"pitch": "A4"}, "started with pitch 'auto', which cannot become 'A4'"),
            ({"duration": 1.0}, "started with duration 3.0, which cannot become 1.0"),
            ({"recipe": "notebook"}, "started with recipe 'default', which cannot become 'notebook'"),
            ({"recipe": replace(RECIPES["default"], num_steps=3)}, "recipe 'default', which cannot become another"),
            ({"epochs": 0}, "epochs must be at least 1"),
        ],
    )
    def test_what_a_run_cannot_change(self, given, words):
        with pytest.raises(ValueError, match=words):
            RunSettings.merge(given, RunSettings(epochs=7))

    def test_come_back_from_json(self):
        settings = RunSettings(recipe=TINY, epochs=4, bigvgan="some/where")
        assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


class TestFromPython:
    def test_without_a_folder_nothing_is_written(self, note, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        rows = []
        sound = fastnca.grow(note, epochs=2, on_event=rows.append, **OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == [note.name]
        assert isinstance(rows[0], EpochDone) and rows[-1].result is sound
        assert sound.samples.shape == (2048,) and sound.spectrogram.n_frames == 8
        assert sound.metrics["epochs"] == 2 and sound.metrics["recipe"] == "tiny"
        assert torch.equal(torch.get_rng_state(), state)
        sound.save(tmp_path / "out.wav")
        assert load_audio(tmp_path / "out.wav")[0].shape == (2048,)

    def test_samples_are_a_sound_too(self, note):
        from_file, from_samples = (fastnca.grow(each, epochs=1, **OPTIONS) for each in (note, load_audio(note)[0]))
        assert torch.equal(from_file.spectrogram.mel_db, from_samples.spectrogram.mel_db)

    def test_a_recipe_of_ones_own_resumes_from_its_checkpoint(self, note, tmp_path):
        whole = fastnca.grow(note, epochs=4, **OPTIONS)
        growth, folder = run.prepare(note, tmp_path / "run", epochs=4, **OPTIONS)
        for event in folder.record(growth):
            if isinstance(event, EpochDone) and event.row["epoch"] == 2:
                growth.stop()
        resumed = fastnca.grow(note, tmp_path / "run", resume=True)
        assert resumed.metrics["epochs"] == 4 and resumed.metrics["recipe"] == "tiny"
        assert torch.equal(resumed.spectrogram.mel_db, whole.spectrogram.mel_db)
        assert Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors").settings.recipe == TINY
        with open(tmp_path / "run" / "losses.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
        terms = ["mel_level", "mel_active", "mel_magnitude", "linear_level", "linear_active", "linear_magnitude"]
        for row in rows:
            total = sum(float(row[name]) for name in [*terms, "overflow"])
            assert total == pytest.approx(float(row["loss"]), rel=1e-5)

    def test_load_takes_the_folder_and_the_file_anywhere(self, note, tmp_path):
        grown = fastnca.grow(note, tmp_path / "run", epochs=2, **OPTIONS)
        (tmp_path / "elsewhere").mkdir()
        alone = tmp_path / "elsewhere" / "my sound.safetensors"
        shutil.move(tmp_path / "run" / "model.safetensors", alone)
        shutil.copy(alone, tmp_path / "run" / "model.safetensors")
        for path in (tmp_path / "run", alone, str(alone)):
            model = fastnca.load(path)
            assert torch.equal(model.grow().spectrogram.mel_db, grown.spectrogram.mel_db)
        longer = model.grow(n_frames=16, num_steps=3, time="sustain")
        assert longer.samples.shape == (4096,) and longer.model is model

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [({"n_frames": 7}, "frames must be at least 8"), ({"num_steps": -1}, "steps must be at least 0")],
    )
    def test_wrong_growths(self, note, arguments, words):
        sound = fastnca.grow(note, epochs=1, **OPTIONS)
        with pytest.raises(ValueError, match=words):
            sound.model.grow(**arguments)

    def test_resume_needs_a_folder(self, note):
        with pytest.raises(ValueError, match="need out, the folder of the run"):
            fastnca.grow(note, resume=True)

    def test_a_checkpoint_of_before_is_refused(self, note, tmp_path):
        from safetensors.torch import save_file

        header = {"fastnca": json.dumps({"format": "fastnca-checkpoint-4"})}
        save_file({"x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors", header)
        with pytest.raises(ValueError, match="format fastnca-checkpoint-4, and can no longer be read"):
            fastnca.grow(note, tmp_path, resume=True)


def test_libraries_get_a_folder_for_what_they_compile_where_there_is_none(tmp_path, monkeypatch):
    names = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and back to what it was after the test
    (tmp_path / "file").touch()  # in which there can be no folder, not even for root
    monkeypatch.setattr(caches, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / "file/librosa/__init__.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    caches.lend_cache_folder()
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    caches.lend_cache_folder()
    assert os.path.isdir(os.environ["NUMBA_CACHE_DIR"]) and os.environ["MPLCONFIGDIR"] == "mine"
    assert os.environ["TRITON_CACHE_DIR"] == os.environ["NUMBA_CACHE_DIR"]


@pytest.mark.parametrize(
    "documented",
    [run.grow, sound_model.load, sound_model.SoundModel.grow, sound_model.save_model, fastnca.DualSpecTNCA.rollout],
    ids=lambda documented: documented.__qualname__,
)
def test_the_examples_of_the_docstrings_run(documented, note, tmp_path, monkeypatch):
    """On a recording of 8 frames, a run of one epoch and no more training than that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "default", replace(TINY, name="default"))
    monkeypatch.setattr(fastnca.DualSpecTNCA, "steps_to_fill", lambda *_: 2)
    os.rename(note, "violin.wav")
    if documented is not run.grow:
        fastnca.grow("violin.wav", "violin", epochs=1, vocoder="griffinlim")
    monkeypatch.setattr("fastnca.settings.RunSettings.budget", property(lambda settings: Budget(epochs=1)))
    names = {name: getattr(fastnca, name) for name in ("DualSpecTNCA", "save_model", "load_model")}
    failed, tried = 0, 0
    for example in doctest.DocTestFinder(recurse=False).find(documented, globs={"fastnca": fastnca, **names}):
        result = doctest.DocTestRunner().run(example)
        failed, tried = failed + result.failed, tried + result.attempted
    assert tried > 0 and failed == 0

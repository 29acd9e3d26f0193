"""Many sounds in one rule: codes, the trainer, the folder, mixtures and processes."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from commands import assert_rejected, fastnca_cli
from safetensors.torch import load_file

import fastnca
from fastnca.add import Addition, _distances
from fastnca.context import Places
from fastnca.files import lock, unlock
from fastnca.growth import CheckpointDue
from fastnca.learning import Learning, find_recordings, names_of
from fastnca.model import DualSpecTNCA
from fastnca.run import LOCK_FILE
from fastnca.settings import SpaceSettings
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import write_wav
from fastnca.sound.spectrogram import Scale, analyze, linear_centers, mel_centers
from fastnca.sound.vocoder import resolve_vocoder
from fastnca.sound_model import SoundCard
from fastnca.space import Member, Space, load_space
from fastnca.training.recipes import RECIPES
from fastnca.training.trainer import Budget, Trainer

RECIPE = replace(RECIPES["default"], num_steps=4, window=6, seed_spacing=4)
OPTIONS = {"vocoder": "griffinlim", "precision": "fp32", "pitch": "none"}


def tone(hertz, n_frames=8):
    t = np.arange(256 * n_frames) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * hertz * t) * np.exp(-3 * t)).astype(np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Three sounds of different lengths and rates, and what is no sound, in two folders."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "high").mkdir()
    write_wav(folder / "low.wav", tone(220.0))
    write_wav(folder / "high" / "low.wav", tone(440.0, 16))
    soundfile.write(folder / "high" / "stereo.wav", np.tile(tone(880.0, 24), (2, 1)).T, 44_100)
    (folder / "high" / "notes.txt").write_text("no sound")
    (folder / ".hidden").write_text("not seen")
    return folder


def make_trainer(count=3, batch=1, instruments=None, **options):
    targets = [analyze(tone(220.0 * (1 + n), 8 * (1 + n % 2))) for n in range(count)]
    pitches = [220.0 * (1 + n) if n != 1 else None for n in range(count)]
    return Trainer(
        targets,
        RECIPE,
        Budget(epochs=100),
        pitches_hz=pitches,
        instruments=instruments,
        batch=batch,
        **options,
    )


class TestCode:
    @pytest.mark.parametrize("pitch_hz", [None, 330.0])
    def test_a_code_is_taken_up_by_the_layers(self, pitch_hz):
        torch.manual_seed(0)
        many = DualSpecTNCA(context=Places(code_size=5, pitch_hz=220.0), growth=True, backend="reference")
        torch.nn.init.normal_(many.update_mlp[-1].weight, std=0.1)
        code = torch.randn(5)
        one = many.with_code(code, pitch_hz)
        assert one.places == replace(many.places, code_size=0, pitch_hz=pitch_hz)
        times = torch.linspace(-1, 1, 9)
        tables = many.context.tables(many.context.row_features(pitch_hz), times, code)
        seed = many.seed(9, at=3)
        for grown, expected in zip(one.rollout(*seed, 5), many.rollout(*seed, 5, tables=tables), strict=True):
            torch.testing.assert_close(grown, expected, rtol=1e-4, atol=1e-4)
        other, _ = many.with_code(torch.randn(5), pitch_hz).rollout(*seed, 5)
        assert not torch.allclose(other, one.rollout(*seed, 5)[0], atol=1e-2)

    def test_without_tonality_partials_do_not_matter(self):
        many = DualSpecTNCA(context=Places(code_size=5, pitch_hz=220.0))
        code = torch.randn(5)
        without, tonal, half = (many.with_code(code, *pitch) for pitch in ((None,), (220.0, 0.0), (220.0, 0.5)))
        whole = many.with_code(code, 220.0)
        for table, expected in zip(tonal.tables(8), without.tables(8), strict=True):
            torch.testing.assert_close(table, expected)
        for table, *ends in zip(half.tables(8), without.tables(8), whole.tables(8), strict=True):
            torch.testing.assert_close(table, sum(ends) / 2)

    def test_a_rule_needs_its_code_and_no_other(self):
        many, one = (DualSpecTNCA(context=Places(code_size=size)) for size in (3, 0))
        with pytest.raises(ValueError, match="a rule of many sounds needs a sound's code"):
            many.tables(8)
        with pytest.raises(ValueError, match="a rule of one sound has none"):
            one.context(torch.zeros(4), code=torch.zeros(3))

    def test_changed_gates_are_refused(self):
        many = DualSpecTNCA(context=Places(code_size=3))
        many.context.row_gates.out.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="a hook or a new forward of context"):
            many.with_code(torch.zeros(3)), many.weights


class TestTrainer:
    def test_many_sounds_are_learned_and_told_apart(self):
        trainer = make_trainer()
        before = [code.detach().clone() for code in trainer.codes.values()]
        rows = [trainer.train_epoch() for _ in range(40)]
        assert rows[-1]["mel_l1_db"] < 0.6 * rows[2]["mel_l1_db"]
        for code, old in zip(trainer.codes.values(), before, strict=True):
            assert not torch.equal(code, old)
        assert all(lesson.errors.isfinite().all() for lesson in trainer.lessons)
        mean = [sum(lesson.errors[grid].mean().item() for lesson in trainer.lessons) / 3 for grid in range(2)]
        assert [rows[-1]["mel_l1_db"], rows[-1]["linear_l1_db"]] == pytest.approx(mean)

    def test_each_sweep_hears_each_sound_as_often_as_it_has_windows(self):
        turns = make_trainer().turns[0]
        per_sweep = [lesson.seed_windows.per_sweep for lesson in turns.lessons]
        for _ in range(3):
            heard = [turns.next().number for _ in range(sum(per_sweep))]
            assert [heard.count(number) for number in range(3)] == per_sweep

    def test_instruments_share_a_code(self):
        trainer = make_trainer(4, instruments=[0, 1, 0, 1])
        assert list(trainer.codes) == [0, 1]
        assert [lesson.code is trainer.codes[n % 2] for n, lesson in enumerate(trainer.lessons)] == [True] * 4

    def test_a_batch_is_the_mean_of_its_sounds(self):
        """The first epoch's gradient of each share alone, against that of both together."""
        alone = [make_trainer(2, batch=2, rank=rank, processes=1) for rank in (0, 0)]
        both = make_trainer(2, batch=2)
        del alone[0].turns[1], alone[1].turns[0]
        for trainer in (*alone, both):
            trainer.train_epoch()
        for one, other, mean in zip(*(trainer.model.parameters() for trainer in (*alone, both)), strict=True):
            torch.testing.assert_close(mean.grad, one.grad + other.grad)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_state_goes_on_bit_for_bit(self, batch):
        whole, first, second = (make_trainer(batch=batch, seed=seed) for seed in (0, 0, 1))
        rows = [whole.train_epoch() for _ in range(14)]
        for _ in range(9):
            first.train_epoch()
        tensors, numbers = first.state_dict()
        second.load_state_dict(
            {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(numbers))
        )
        for row in rows[9:]:
            assert {**second.train_epoch(), "seconds": 0} == {**row, "seconds": 0}
        for one, other in zip(second.parameters.values(), whole.parameters.values(), strict=True):
            assert torch.equal(one, other)

    def test_what_lives_goes_to_disk_where_it_is_too_much(self, monkeypatch, tmp_path):
        """The same is learned; what is saved is small, and what lived begins anew."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        in_memory = make_trainer()
        monkeypatch.setattr("fastnca.training.trainer.LIVING_BUDGET", 1000)
        trainer, again = make_trainer(), make_trainer()
        for _ in range(12):
            assert {**trainer.train_epoch(), "seconds": 0} == {**in_memory.train_epoch(), "seconds": 0}
        for mine, theirs in zip(trainer.lessons, in_memory.lessons, strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine.living_grids, theirs.living_grids))
        assert not list(tmp_path.iterdir())  # the files have no names
        tensors, numbers = trainer.state_dict()
        assert not any("living" in name for name in tensors)
        again.load_state_dict(tensors, numbers)
        assert all(lesson.ages.max() == 0 for lesson in again.lessons)
        assert math.isfinite(again.train_epoch()["loss"])

    @pytest.mark.parametrize("batch", [0, 4])
    def test_wrong_batch(self, batch):
        with pytest.raises(ValueError, match="an epoch can learn from 1 to 3 sounds at once"):
            make_trainer(batch=batch)

    def test_the_notebooks_recipe_knows_one_sound(self):
        target = analyze(tone(220.0))
        with pytest.raises(ValueError, match="the recipe notebook has no context, so it can only learn one sound"):
            Trainer([target, target], RECIPES["notebook"], Budget(epochs=1))


class TestRecordings:
    def test_folders_are_searched_and_names_differ(self, recordings):
        found = find_recordings([recordings / "low.wav", recordings])
        assert [os.path.relpath(path, recordings) for path in found] == [
            "low.wav",
            "high/low.wav",
            "high/notes.txt",
            "high/stereo.wav",
        ]
        assert names_of(found) == ["low", "high-low", "notes", "stereo"]
        assert names_of(["/a/x.wav", "/b/a/x.wav", "/c/a/x.wav", "/d/x.wav"]) == ["x", "a-x", "x-2", "d-x"]

    def test_a_thousand_files(self, tmp_path):
        for number in range(1000):
            (tmp_path / f"{number:04}.wav").touch()
        assert len(set(names_of(find_recordings([tmp_path])))) == 1000

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or folder: .*nothing"):
            find_recordings([tmp_path / "nothing"])

    def test_what_cannot_be_learned_is_left_out_with_the_reason(self, recordings):
        learning = Learning(SpaceSettings(sounds=find_recordings([recordings]), epochs=1, **OPTIONS))
        assert learning.names == ["low", "stereo", f"{recordings.name}-low"]
        (path, reason), *others = learning.left_out.items()
        assert path.endswith("notes.txt") and "not audio" in reason and not others
        assert learning.frames == (16, 16, 8)

    def test_no_recordings(self, tmp_path):
        assert_rejected(fastnca_cli("learn", "-o", tmp_path / "space"), "no recordings to learn: give at least 2")
        assert_rejected(fastnca_cli("learn", tmp_path, "-o", tmp_path / "space"), "no recordings to learn")
        assert not (tmp_path / "space").exists()

    def test_its_minutes_are_those_of_the_sounds_that_can_be_learned(self, recordings):
        learning = Learning(SpaceSettings(sounds=find_recordings([recordings]), **OPTIONS))
        assert learning.settings.minutes == 12.0

    @pytest.mark.parametrize("names", [["low.wav"], ["low.wav", "high/notes.txt"]])
    def test_one_sound_is_no_space(self, recordings, names):
        with pytest.raises(ValueError, match="a space needs at least 2 sounds, got 1"):
            Learning(SpaceSettings(sounds=[str(recordings / name) for name in names], epochs=1, **OPTIONS))


@pytest.fixture(scope="module")
def learned(recordings, tmp_path_factory):
    """The folder of a space of three sounds, by the command line."""
    out = tmp_path_factory.mktemp("space") / "space"
    result = fastnca_cli("learn", recordings, "-o", out, "--epochs", 6, "--checkpoint-every-epochs", 4, *flags())
    assert result.exit_code == 0, result.output
    return out, result


def flags():
    return [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]


class TestFolder:
    def test_everything_is_there(self, learned):
        out, result = learned
        assert "left out:" in result.output and "notes.txt is not audio" in result.output
        assert "3 sounds, mel" in result.stdout
        for name in ("checkpoint.safetensors", "space.safetensors", "losses.csv", "map.png"):
            assert (out / name).is_file()
        report = json.loads((out / "space.json").read_text())
        assert report["epochs"] == 6 and len(report["left_out"]) == 1
        assert (
            list(report["sounds"]) == sorted(p.stem for p in (out / "sounds").iterdir()) or len(report["sounds"]) == 3
        )
        for name, measured in report["sounds"].items():
            assert measured["mel_l1_db"] > 0 and measured["spectral_convergence_db"] < 20
            samples, rate = soundfile.read(out / "sounds" / f"{name}.wav")
            assert rate == SAMPLE_RATE and len(samples) == 256 * measured["n_frames"]
        errors = sorted(measured["mel_l1_db"] for measured in report["sounds"].values())
        assert report["median_mel_l1_db"] == errors[1] and report["worst_mel_l1_db"] == errors[2]
        rows = list(csv.DictReader((out / "map.csv").open()))
        assert [row["sound"] for row in rows] == list(report["sounds"])
        assert (out / "space.safetensors").stat().st_size < 300_000

    def test_a_run_goes_on_as_if_it_had_never_stopped(self, learned, recordings, tmp_path):
        def leave(event):
            if isinstance(event, CheckpointDue):
                raise KeyboardInterrupt

        out = tmp_path / "left"
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(action="ignore"):
            fastnca.learn([recordings], out, epochs=6, checkpoint_every_epochs=4, on_event=leave, **OPTIONS)
        assert_rejected(fastnca_cli("learn", recordings, "-o", out), "already holds a run")
        other = fastnca_cli("learn", recordings / "high", "-o", out, "--resume")
        assert_rejected(other, "the run was started on other sounds or other mel bands")
        assert fastnca_cli("learn", "-o", out, "--resume").exit_code == 0
        one, other = (load_file(path / "space.safetensors") for path in (learned[0], out))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_a_sound_is_generated_by_its_name(self, learned, tmp_path):
        out, _ = learned
        assert_rejected(fastnca_cli("generate", out), "say which by --sound")
        assert_rejected(fastnca_cli("generate", out, "--sound", "none"), "there is no sound 'none' in the space")
        wav = tmp_path / "low.wav"
        result = fastnca_cli("generate", out / "space.safetensors", "--sound", "stereo", "-o", wav, "--steps", 4)
        assert result.exit_code == 0 and soundfile.info(wav).frames > 0
        fastnca.load(out)["stereo"].save(tmp_path / "model.safetensors")
        assert_rejected(fastnca_cli("generate", tmp_path, "--sound", "stereo"), "holds one sound, which has no name")


def set_by_hand():
    """A rule of which the code alone says how loud everything is: value += 0.8 relu(its first number - value)."""
    automaton = DualSpecTNCA(context=Places(code_size=2), growth=True)
    for parameter in automaton.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        automaton.update_mlp[0].weight[0, 0] = -1.0
        gates = automaton.context.row_gates
        gates.place.bias[0] = gates.code.weight[0, 0] = gates.out.weight[0, 0] = 1.0
        for layer in automaton.update_mlp[2::2]:
            layer.weight[0, 0] = 1.0
        automaton.update_mlp[-1].weight.mul_(0.8)
        automaton.update_mlp[-1].bias[1] = 1.0  # life
    return automaton


class TestSpace:
    @pytest.fixture
    def space(self, learned):
        return fastnca.load(learned[0])

    def test_it_is_a_mapping_of_sounds(self, space):
        assert isinstance(space, Space) and len(space) == 3 and "stereo" in space
        for name, member in space.members.items():
            assert space[name].card.n_frames == member.card.n_frames
        with pytest.raises(KeyError, match="there is no sound 'x' in the space; it has"):
            space["x"]

    def test_a_file_holds_all_of_it(self, space, tmp_path):
        space.save(tmp_path / "a.safetensors")
        again = load_space(tmp_path / "a.safetensors")
        again.save(tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:5000])
        with pytest.raises(ValueError, match="damaged"):
            fastnca.load(tmp_path / "a.safetensors")

    def test_ends_of_a_morph_are_the_sounds(self, space):
        first, second = list(space)[:2]
        for amount, name in ((0.0, first), (1.0, second)):
            morphed, sound = space.morph(first, second, amount), space[name]
            assert morphed.card == sound.card
            tables = zip(morphed.automaton.tables(8), sound.automaton.tables(8), strict=True)
            assert all(torch.allclose(*pair, atol=1e-6) for pair in tables)

    def test_codes_lengths_levels_and_pitches_are_mixed(self, space):
        pitches, shares = (220.0, None, 440.0), (0.5, 0.25, 0.25)
        names, members = zip(*space.members.items())
        members = [replace(member, pitch_hz=pitch_hz) for member, pitch_hz in zip(members, pitches, strict=True)]
        space = Space(space.automaton, dict(zip(names, members)), space.vocoder)
        mixed = space.between(dict(zip(names, (2.0, 1.0, 1.0))))

        def mean(values):
            return sum(share * value for share, value in zip(shares, values, strict=True))

        torch.testing.assert_close(mixed.code, mean(member.code for member in members))
        assert mixed.card.n_frames == round(mean(member.card.n_frames for member in members))
        expected = mean(member.card.scale.mel_ref_db for member in members)
        assert mixed.card.scale.mel_ref_db == pytest.approx(expected)
        assert mixed.tonality == 0.75 and mixed.pitch_hz == pytest.approx(220.0 * 2 ** (1 / 3))
        only = space.between({names[1]: 1.0, names[0]: 0.0})
        assert only.pitch_hz is None and only.tonality == 1.0

    @pytest.mark.parametrize("shares", [{}, {"stereo": 0.0}, {"stereo": 1.0, "low": -0.5}, {"stereo": math.nan}])
    def test_shares_that_make_no_mixture(self, space, shares):
        with pytest.raises(ValueError, match="shares of a mixture"):
            space.mix(shares)

    def test_amounts_beyond_the_ends(self, space):
        with pytest.raises(ValueError, match="amount must be from 0 to 1, got 1.5"):
            space.morph(*list(space)[:2], 1.5)

    def test_a_glide_from_a_sound_to_itself_is_the_sound(self, space):
        """Its parts, which grow apart and meet every 4 steps, are the whole."""
        name = max(space, key=lambda name: space.members[name].card.n_frames)
        torch.manual_seed(1)
        torch.nn.init.normal_(space.automaton.update_mlp[-1].weight, std=0.01)
        glided, sound = space.glide(name, name).grow(), space[name].grow()
        assert sound.spectrogram.n_frames >= 16 and sound.spectrogram.mel_db.std() > 1
        for grid in ("mel_db", "linear_db"):
            torch.testing.assert_close(
                getattr(glided.spectrogram, grid), getattr(sound.spectrogram, grid), rtol=0, atol=1e-2
            )

    def test_a_graft_is_the_second_sound_within_the_box(self, space):
        """A rule that was set by hand to grow a level that the code alone says, whatever lies around a cell."""
        names = list(space)[:2]
        automaton = set_by_hand()
        members = {
            name: replace(space.members[name], code=torch.tensor([level, 0.0]), pitch_hz=None)
            for name, level in zip(names, (0.2, 0.9))
        }
        space = Space(automaton, members, space.vocoder)
        first, second, grafted = (
            model.automaton.grow(16, 20, at=12)
            for model in (space[names[0]], space[names[1]], space.graft(*names, (0.05, 9.0), (1000.0, 4000.0)))
        )
        n_frames = space.morph(*names).card.n_frames
        begin = round(round(0.05 * SAMPLE_RATE / 256 * 16 / n_frames))
        for centers, *levels in zip((mel_centers(), linear_centers()), first, second, grafted):
            box = torch.zeros(len(centers), 16, dtype=torch.bool)
            box[(centers >= 1000.0) & (centers <= 4000.0), begin:] = True
            assert 0 < box.sum() < box.numel()
            torch.testing.assert_close(levels[2], torch.where(box, levels[1], levels[0]), rtol=0, atol=1e-3)

    def test_what_becomes_another_begins_as_the_one_and_ends_as_the_other(self, space):
        names = list(space)[:2]
        members = {
            name: replace(space.members[name], code=torch.tensor([level, 0.0]), pitch_hz=None)
            for name, level in zip(names, (0.2, 0.9))
        }
        space = Space(set_by_hand(), members, space.vocoder)
        stages = space.become(*names, 10, stages=4)
        ends = [space[name].grow(stages[0].spectrogram.n_frames) for name in names]
        for grown, end in zip((stages[0], stages[-1]), ends):
            torch.testing.assert_close(grown.spectrogram.mel_db, end.spectrogram.mel_db, rtol=0, atol=0.1)
            assert grown.spectrogram.scale == end.spectrogram.scale
        means = [stage.spectrogram.linear_db.mean().item() for stage in stages]
        assert means == sorted(means) and means[0] < means[1]

    def test_the_map_keeps_distances_of_two_dimensions(self, space):
        places = torch.tensor(list(space.map().values()), dtype=torch.float64)
        codes = torch.stack([member.code for member in space.members.values()]).double()
        torch.testing.assert_close(torch.cdist(places, places), torch.cdist(codes, codes))  # three are in a plane


class TestMorph:
    @pytest.mark.parametrize(
        ("words", "files"),
        [
            (["A", "B"], ["A-B-0.50.wav", "A-B-0.50.png"]),
            (["A", "B", "--amount", 0.25], ["A-B-0.25.wav", "A-B-0.25.png"]),
            (["A", "B", "--steps", 2], ["A-B-0.00.wav", "A-B-1.00.wav", "A-B-0.00_to_1.png"]),
            (["A", "B", "--glide"], ["A-B-glide.wav", "A-B-glide.png"]),
            (["A", "B", "--graft", "0-9,500-5000"], ["A-B-graft.wav", "A-B-graft.png"]),
            (["A", "B", "--become", 9], ["A-B-become.wav", "A-B-become.png"]),
            (["A=0.5,B=0.5"], ["A0.5-B0.5.wav", "A0.5-B0.5.png"]),
        ],
    )
    def test_files(self, learned, words, files, tmp_path):
        shutil.copy(learned[0] / "space.safetensors", tmp_path)
        first, second = "low", "stereo"

        def named(text):
            return str(text).replace("A", first).replace("B", second)

        result = fastnca_cli("morph", tmp_path, *map(named, words))
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(named, files), "space.safetensors"])

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["stereo"], "give two sounds"),
            (["stereo", "x"], "there is no sound 'x' in the space"),
            (["stereo=a"], "a mixture is shares of different sounds"),
            (["stereo", "low=1"], "a mixture is shares of different sounds"),
            (["stereo=1", "stereo=1"], "a mixture is shares of different sounds"),
            (["stereo=1", "low=-1"], "shares of a mixture must not be negative"),
            (["stereo", "low", "--amount", 1.5], "amount must be from 0 to 1, got 1.5"),
            (["stereo", "low", "-o", "SPACE/map.wav"], "map.png belongs to the run in that folder"),
            (["stereo", "low", "--steps", 1], "steps must be at least 2, got 1"),
            (["stereo", "low", "--glide", "--amount", 0.5], "only one can be"),
            (["stereo", "low", "--graft", "0-9"], "a graft is a box SECONDS-SECONDS,HZ-HZ"),
            (["stereo", "low", "--graft", "5-9,20-200"], "a graft is a box within the sound"),
            (["stereo", "low", "--become", 0], "to become another takes at least 1 step"),
            (["stereo", "low", "--glide", "--become", 9], "only one can be"),
            (["stereo", "low", "-o", "x.mp3"], "wav"),
        ],
    )
    def test_what_is_refused(self, learned, words, reason):
        words = [str(word).replace("SPACE", str(learned[0])) for word in words]
        assert_rejected(fastnca_cli("morph", learned[0], *words), reason)

    def test_what_takes_one_sound_says_that_there_are_many(self, learned):
        assert_rejected(fastnca_cli("life", learned[0]), "holds many sounds, low, stereo")


class TestAdd:
    @pytest.fixture
    def folder(self, learned, tmp_path):
        """A copy of the space, and a recording that it does not have."""
        shutil.copytree(learned[0], tmp_path / "space")
        write_wav(tmp_path / "new.wav", tone(300.0, 16))
        return tmp_path / "space"

    def test_by_its_code_alone_all_others_stay(self, folder):
        before = load_space(folder / "space.safetensors")
        result = fastnca_cli("add", folder, folder.parent / "new.wav", "--minutes", 0.01)
        assert result.exit_code == 0, result.output
        assert "new: by its code alone mel" in result.stdout and "--sound new" in result.stdout
        after = load_space(folder / "space.safetensors")
        assert list(after) == [*before, "new"]
        for name, member in before.members.items():
            assert torch.equal(member.code, after.members[name].code) and member.metrics == after.members[name].metrics
        mine, theirs = before.automaton.state_dict(), after.automaton.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        new = after.members["new"]
        assert new.card.n_frames == 16 and new.card.epochs > 0 and new.metrics["mel_l1_db"] > 0
        assert not any(torch.equal(new.code, member.code) for member in before.members.values())
        assert "new" in (folder / "map.csv").read_text()
        assert_rejected(fastnca_cli("learn", "-o", folder, "--resume"), "has sounds that were added, new: to go on")
        assert_rejected(fastnca_cli("add", folder, folder.parent / "new.wav"), "the space has a sound 'new' already")

    def test_the_rule_is_tuned_and_the_others_held(self, learned):
        space = load_space(learned[0] / "space.safetensors")
        options = {"seed": 0, "backend": "auto", "precision": "fp32", "device": "cpu"}
        addition = Addition(space, "new", tone(300.0, 16), "none", options)
        addition.learn_code(Budget(epochs=1), lambda *_: None)
        rows = []
        addition.tune(Budget(epochs=30), lambda share, text: rows.append(text))
        assert rows[0].startswith("growing low, to hold it") and "the rule, epoch 30: mel" in rows[-1]
        trained = space.automaton.update_mlp[0].weight
        assert not torch.equal(addition.automaton.update_mlp[0].weight, trained)
        assert addition.card.epochs == 31
        member = Member(addition.code, addition.card, None)
        known = Addition(space, "new", tone(300.0, 16), "none", options)._grown(member)
        for before, after in zip(
            _distances(known, addition.target), _distances(addition._grown(member), addition.target)
        ):
            assert after < 0.8 * before
        for member in addition.members.values():
            assert list(member.metrics) == ["mel_moved_db", "linear_moved_db"]

    def test_to_a_file_of_its_own(self, folder):
        other = folder.parent / "more.safetensors"
        words = ["-o", other, "--name", "b", "--minutes", 0.01, "--tune", 0.01]
        result = fastnca_cli("add", folder, folder.parent / "new.wav", *words)
        assert result.exit_code == 0, result.output
        assert "b: with the rule tuned mel" in result.stdout and "the other sounds have moved by" in result.stdout
        assert "b" in load_space(other) and "b" not in load_space(folder / "space.safetensors")

    def test_a_code_is_found_again(self, tmp_path):
        automaton = set_by_hand()
        card = SoundCard(Scale(0.0, 0.0), 16, 8, "griffinlim", None, "default", 1)
        members = {name: Member(torch.tensor([number, 0.5]), card, None) for name, number in (("a", 0.1), ("b", 1.0))}
        space = Space(automaton, members, resolve_vocoder("griffinlim"))
        options = {"seed": 0, "backend": "auto", "precision": "fp32", "device": "cpu"}
        addition = Addition(space, "c", tone(440.0, 16), "none", options)
        wanted = space.mix({"a": 0.5, "b": 0.5}).automaton.grow(16, 20, at=12)
        addition.target = addition.target.with_grids(*wanted)
        addition.learn_code(Budget(epochs=40), lambda *_: None)
        assert addition.code[0].item() == pytest.approx(0.55, abs=0.05)

    def test_a_folder_in_use_is_left_alone(self, folder):
        held = lock(folder / LOCK_FILE)
        try:
            assert_rejected(fastnca_cli("add", folder, folder.parent / "new.wav"), "is in use by a run")
        finally:
            unlock(held)

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["none.wav"], "no such file"),
            (["new.wav", "--minutes", 0], "minutes must be a positive number"),
            (["new.wav", "--tune", -1], "minutes must be a positive number"),
            (["new.wav", "-o", "space/checkpoint.safetensors"], "belongs to the run in that folder"),
        ],
    )
    def test_what_is_refused(self, folder, words, reason):
        words = [folder.parent / word if str(word).endswith(("wav", "safetensors")) else word for word in words]
        before = (folder / "space.safetensors").read_bytes()
        assert_rejected(fastnca_cli("add", folder, *words), reason)
        assert (folder / "space.safetensors").read_bytes() == before

    def test_one_sound_is_no_space(self, folder):
        load_space(folder / "space.safetensors")["stereo"].save(folder.parent / "model.safetensors")
        result = fastnca_cli("add", folder.parent / "model.safetensors", folder.parent / "new.wav")
        assert_rejected(result, "is a model file of fastnca (version 3); expected a space file")


def torchrun(processes, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "fastnca", "learn", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


class TestProcesses:
    @pytest.fixture
    def sounds(self, tmp_path):
        (tmp_path / "sounds").mkdir()
        for number in range(4):
            write_wav(tmp_path / "sounds" / f"{number}.wav", tone(220.0 * (1 + number)))
        return tmp_path / "sounds"

    @pytest.mark.parametrize("processes", [2, 4])
    def test_they_learn_what_one_learns(self, sounds, tmp_path, processes):
        common = ["--epochs", 4, *flags()]
        job = torchrun(processes, sounds, "-o", tmp_path / "job", "--batch", 4, *common)
        one = fastnca_cli("learn", sounds, "-o", tmp_path / "one", "--batch", 4, *common)
        assert one.exit_code == 0, one.output
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
        mine, theirs = (load_file(tmp_path / name / "space.safetensors") for name in ("one", "job"))
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)
        mine, theirs = (json.loads((tmp_path / name / "space.json").read_text()) for name in ("one", "job"))
        assert list(mine["sounds"]) == list(theirs["sounds"]) and theirs["processes"] == processes
        for name, measured in mine["sounds"].items():
            assert theirs["sounds"][name]["mel_l1_db"] == pytest.approx(measured["mel_l1_db"], abs=0.05)

    def test_a_rank_that_is_killed_loses_nothing(self, sounds, tmp_path):
        out = tmp_path / "job"
        job = torchrun(2, sounds, "-o", out, "--epochs", 100_000, "--checkpoint-every-epochs", 3, *flags())
        deadline = time.monotonic() + 100
        while not (out / "losses.csv").exists() or len((out / "losses.csv").read_text().splitlines()) < 7:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, _ = job.communicate(timeout=100)
        assert job.returncode != 0
        epochs = len((out / "losses.csv").read_text().splitlines()) - 1
        result = fastnca_cli("learn", "-o", out, "--resume", "--epochs", epochs + 2)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "space.json").read_text())["epochs"] == epochs + 2

"""Whole runs by the command line: their files, bad input and output names."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from commands import assert_rejected, assert_same_run, fastnca_cli, grow, read_losses, start
from PIL import Image

import fastnca
from fastnca.automaton import backends
from fastnca.cli import main
from fastnca.context import Places
from fastnca.files import check_replaceable, read_safetensors, write_safetensors
from fastnca.generate import erase
from fastnca.model import frame_times
from fastnca.sound.convention import SAMPLE_RATE, MelBands
from fastnca.sound.files import load_audio, write_wav
from fastnca.sound.spectrogram import analyze, mel_centers
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.training.recipes import RECIPES, Recipe


class TestGrow:
    def test_leaves_all_files(self, finished):
        run = finished[1]
        assert {path.name for path in run.iterdir()} == {
            "model.safetensors", "checkpoint.safetensors", "losses.csv", "metrics.json", "target.wav",
            "generated.wav", "target.png", "final.png", "progress",
        }  # fmt: skip
        metrics = json.loads((run / "metrics.json").read_text())
        for name in (
            "epochs", "seconds_per_epoch", "backend", "vocoder", "mel_l1_db", "linear_l1_db", "mel_l1_db_active",
            "linear_l1_db_active", "spectral_convergence_db", "log_spectral_distance_db", "rms_target",
            "rms_generated",
        ):  # fmt: skip
            assert name in metrics
        assert metrics["epochs"] == 3 and metrics["vocoder"] == "griffinlim"
        assert len(read_losses(run)) == 3
        samples, rate = soundfile.read(run / "generated.wav")
        assert rate == 22050 and len(samples) == 2048 and np.abs(samples).max() <= 1.0

    def test_the_model_is_what_metrics_say(self, finished):
        run = finished[1]
        model, card = fastnca.load_model(run / "model.safetensors")
        target = analyze(load_audio(finished[0])[0])
        metrics = json.loads((run / "metrics.json").read_text())
        grown_mel, _ = model.grow(card.n_frames, metrics["steps"])
        assert (grown_mel - target.mel_db).abs().mean().item() == pytest.approx(metrics["mel_l1_db"], rel=1e-4)

    def test_progress_pictures_and_tensorboard(self, note, tmp_path, monkeypatch):
        recipe = Recipe("default", learning_rate=1e-3, picture_every_epochs=2, num_steps=4)
        monkeypatch.setitem(RECIPES, "default", recipe)
        result = grow(note, tmp_path / "run", "--epochs", 5, "--tensorboard")
        assert result.exit_code == 0, result.stderr
        pictures = sorted(path.name for path in (tmp_path / "run" / "progress").iterdir())
        assert pictures == ["epoch_0002.png", "epoch_0004.png"]
        assert list((tmp_path / "run" / "tensorboard").iterdir())

    def test_mplbackend_of_a_notebook_and_a_matplotlibrc(self, note, tmp_path):
        (tmp_path / "matplotlibrc").write_text("text.usetex: true\nbackend: nbagg\n")
        surroundings = {"MPLBACKEND": "module://no_such.backend", "MATPLOTLIBRC": str(tmp_path)}
        process = start("grow", note, "-o", tmp_path / "run", "--epochs", 1, "--vocoder", "griffinlim", **surroundings)
        output = process.communicate(timeout=120)
        assert process.returncode == 0 and b"could not be drawn" not in output[1], output
        assert (tmp_path / "run/final.png").exists() and (tmp_path / "run/generated.wav").exists()

    def test_pictures_that_cannot_be_drawn_are_a_warning(self, note, tmp_path, monkeypatch):
        def broken(size):
            raise RuntimeError("no\nfont")

        monkeypatch.setattr("fastnca.sound.pictures._figure", broken)
        with pytest.warns(UserWarning, match="target.png could not be drawn: no font"):
            result = grow(note, tmp_path / "run", "--epochs", 1)
        assert result.exit_code == 0, result.stderr
        with pytest.warns(UserWarning, match="again.gif could not be drawn"):
            result = fastnca_cli("generate", tmp_path / "run", "-o", tmp_path / "again.wav", "--video")
        assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'again.wav'}: decoded by griffinlim\n"
        assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "run/generated.wav").read_bytes()
        assert not list(tmp_path.rglob("*.png"))

    def test_a_long_name_gives_a_folder_that_can_be(self, note, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        long = note.rename(tmp_path / f"{'ü' * 125}.wav")
        result = fastnca_cli("grow", long.name, "--epochs", 1, "--vocoder", "griffinlim")
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / f"fastnca-{'ü' * 123}" / "generated.wav").exists()

    def test_ends_by_minutes(self, note, tmp_path):
        result = grow(note, tmp_path / "run", "--minutes", 0.001)
        assert result.exit_code == 0, result.stderr
        assert 1 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] <= 2

    def test_same_command_same_result(self, finished, tmp_path):
        note, run = finished
        assert grow(note, tmp_path / "again", "--epochs", 3).exit_code == 0
        assert_same_run(run, tmp_path / "again")

    @pytest.mark.parametrize("fastest", ["fp32", "bf16"])
    def test_trains_in_the_fastest_precision(self, note, tmp_path, monkeypatch, fastest):
        if backends.why_not("cpu", precision=fastest):
            pytest.skip(f"the CPU kernels have no {fastest} here")
        monkeypatch.setattr(backends, "fastest_precision", lambda backend: fastest)
        assert grow(note, tmp_path / "run", "--epochs", 1, "--backend", "cpu").exit_code == 0
        metrics = json.loads((tmp_path / "run/metrics.json").read_text())
        assert metrics["precision"] == fastest
        named = grow(note, tmp_path / "named", "--epochs", 1, "--backend", "cpu", "--precision", fastest)
        assert named.exit_code == 0
        assert_same_run(tmp_path / "run", tmp_path / "named")

    def test_demo(self, tmp_path, monkeypatch):
        short = synthesize_bowed_string(duration=0.09)
        monkeypatch.setattr("fastnca.sound.synthetic.synthesize_bowed_string", lambda duration: short)
        result = fastnca_cli("demo", "-o", tmp_path / "run", "--epochs", 1)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / "run" / "final.png").exists()


class TestGenerate:
    def test_repeats_the_run(self, finished, tmp_path):
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "again.wav")
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / "again.wav").read_bytes() == (finished[1] / "generated.wav").read_bytes()
        assert (tmp_path / "again.png").exists()

    @pytest.mark.parametrize("time", ["stretch", "sustain"])
    def test_other_length_and_steps(self, finished, tmp_path, time):
        out = tmp_path / "long.wav"
        result = fastnca_cli("generate", finished[1], "-o", out, "--frames", 16, "--steps", 8, "--time", time)
        assert result.exit_code == 0, result.stderr
        assert soundfile.info(out).frames == 16 * 256

    def test_sustaining_holds_the_middle(self, finished, tmp_path):
        """Frames of one place in time that are too far from a border to know of it grow alike."""
        model, card = fastnca.load_model(finished[1] / "model.safetensors")
        mel_db, linear_db = model.grow(40, 4, frame_times(40, card.n_frames, "sustain"), at=1)
        for grown in (mel_db, linear_db):
            held = grown[:, 8:16]
            torch.testing.assert_close(held, held[:, :1].expand_as(held))
            assert not torch.allclose(grown[:, 2], held[:, 0])

    def test_default_names_tell_results_apart(self, finished, tmp_path):
        shutil.copy(finished[1] / "model.safetensors", tmp_path)
        for options in (
            (),
            ("--steps", 4),
            ("--steps", 4, "--time", "sustain"),
            ("--steps", 4, "--pitch", "+3"),
            ("--seeds-every", 9),
        ):
            assert fastnca_cli("generate", tmp_path, *options).exit_code == 0
        assert {path.stem for path in tmp_path.glob("*.wav")} == {
            "generated", "generated_8x4", "generated_8x4_sustain", "generated_8x4_+3", "generated_seeds9"
        }  # fmt: skip

    def test_a_model_file_alone(self, finished, tmp_path):
        model = tmp_path / "violin.safetensors"
        shutil.copy(finished[1] / "model.safetensors", model)
        for options in ((), ("--frames", 9)):
            result = fastnca_cli("generate", model, *options)
            assert result.exit_code == 0, result.stderr
        assert {path.stem for path in tmp_path.glob("*.wav")} == {"violin_generated", "violin_generated_9x288"}
        assert (tmp_path / "violin_generated.wav").read_bytes() == (finished[1] / "generated.wav").read_bytes()

    @pytest.mark.parametrize(("steps", "shown"), [(0, [0]), (5, [0, 1, 2, 3, 4, 5]), (200, [0, 3, 6, 198, 200])])
    def test_video(self, finished, tmp_path, monkeypatch, steps, shown):
        titles = []

        def save_growth(path, pictures):
            path.write_bytes(b"")
            for title, mel_db, linear_db, mel_alpha, linear_alpha in pictures:
                titles.append(title)
                assert mel_db.shape == mel_alpha.shape == (80, 8) and linear_db.shape == linear_alpha.shape == (513, 8)
            growth.extend((mel_db, linear_db))
            return [path]

        growth = []
        monkeypatch.setattr("fastnca.generate.save_growth", save_growth)
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "a.wav", "--steps", steps, "--video")
        assert result.exit_code == 0, result.stderr
        assert set(titles) >= {f"step {step}" for step in shown}
        assert titles[0] == "step 0" and titles[-1] == f"step {steps}" and len(titles) <= 97
        assert (tmp_path / "a.gif").exists()
        model, _ = fastnca.load_model(finished[1] / "model.safetensors")
        for one, other in zip(growth, model.grow(8, steps), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other)

    def test_video_is_an_animated_picture(self, finished, tmp_path, monkeypatch):
        monkeypatch.setattr("fastnca.sound.pictures._find_ffmpeg", lambda: None)
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "a.wav", "--steps", 3, "--video")
        assert result.exit_code == 0, result.stderr
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.format == "GIF" and gif.n_frames == 4
        assert {path.name for path in tmp_path.iterdir()} == {"a.gif", "a.wav", "a.png"}

    def test_video_is_a_movie_too_where_ffmpeg_is(self, finished, tmp_path, monkeypatch):
        ffmpeg = tmp_path / "ffmpeg"  # leaves the name of what it writes and the size of what it reads
        ffmpeg.write_text('#!/bin/sh\nfor last; do :; done; wc -c > "$last"\n')
        ffmpeg.chmod(0o755)
        monkeypatch.setattr("fastnca.sound.pictures._find_ffmpeg", lambda: str(ffmpeg))
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "a.wav", "--steps", 3, "--video")
        assert result.exit_code == 0, result.stderr
        assert int((tmp_path / "a.mp4").read_text()) == (4 + 24) * 720 * 480 * 3
        ffmpeg.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "b.wav", "--steps", 3, "--video")
        assert result.exit_code == 2 and "ffmpeg could not write" in result.stderr and "broken" in result.stderr
        assert not (tmp_path / "b.mp4").exists()

    def test_a_growth_is_heard_and_a_wound_heals(self, finished, tmp_path):
        box = "0.02-0.06,300-3000"
        options = "--steps", 9, "--seeds-every", 8, "--hear-growth", "--wound", box, "--heal", 3
        result = fastnca_cli("generate", finished[1], "-o", tmp_path / "a.wav", *options)
        assert result.exit_code == 0, result.stderr
        names = ["a.wav", "a.png", "a_growth.wav", "a_wounded.wav", "a_healed.wav"]
        assert {path.name for path in tmp_path.iterdir()} == set(names)
        assert [line.split(": ")[0].rsplit("/")[-1] for line in result.stdout.splitlines()] == names
        stages = 5  # after 2, 4, 6, 8 and 9 steps
        assert soundfile.info(tmp_path / "a_growth.wav").frames == stages * (2048 + SAMPLE_RATE // 8)
        sounds = [(tmp_path / f"a{name}.wav").read_bytes() for name in ("", "_wounded", "_healed")]
        assert len(set(sounds)) == 3

    def test_a_wound_lies_where_the_mel_bands_are(self):
        grids = [torch.ones(1, 16, bands, 4) for bands in (80, 513)]
        for fmax in (8000.0, 11025.0):
            bands = MelBands(fmax=fmax)
            mel, linear = erase(grids, slice(1, 3), (300.0, 3000.0), bands)
            centers = mel_centers(80, bands)
            assert torch.equal(mel[0, 5, :, 1] == 0, (centers >= 300) & (centers <= 3000))
            assert mel[0, 5, :, 0].all() and not linear[0, :, 20, 1:3].any()
        assert (erase(grids, slice(0, 1), (5.0, 6.0), bands)[1][0, 0, :, 0] == 0).nonzero().tolist() == [[0]]

    def test_a_sound_without_pitch_refuses_another(self, finished, tmp_path):
        _, card = fastnca.load_model(finished[1] / "model.safetensors")
        automaton = fastnca.DualSpecTNCA(context=Places(), growth=True)
        fastnca.save_model(tmp_path / "model.safetensors", automaton, card)
        for pitch in ("E4", "+3"):
            result = fastnca_cli("generate", tmp_path, "--pitch", pitch)
            assert result.exit_code == 2 and "learned without a pitch, since none that stays was found" in result.stderr

    def test_another_pitch_is_another_sound(self, finished, tmp_path):
        for name, options in (("same", ("--pitch", "441hz")), ("other", ("--pitch", "E5"))):
            result = fastnca_cli("generate", finished[1], "-o", tmp_path / f"{name}.wav", *options)
            assert result.exit_code == 0, result.stderr
        assert (tmp_path / "same.wav").read_bytes() != (tmp_path / "other.wav").read_bytes()


def test_compare(finished):
    result = fastnca_cli("compare", finished[0], finished[0])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["log_spectral_distance_db"] == 0.0


def test_compare_takes_levels_above_full_scale_as_they_are(tmp_path):
    sound = synthesize_bowed_string(0.3)
    for name, level in (("hot", 2.0), ("half", 1.0)):
        soundfile.write(tmp_path / f"{name}.wav", level * sound, SAMPLE_RATE, subtype="FLOAT")
    result = fastnca_cli("compare", tmp_path / "hot.wav", tmp_path / "half.wav")
    assert json.loads(result.stdout)["loudness_error_db"] == pytest.approx(-6.02, abs=0.01)


def test_info():
    result = fastnca_cli("info")
    assert result.exit_code == 0
    assert "torch" in result.stdout and "reference: can run" in result.stdout


def test_any_name_in_any_locale(note, tmp_path):
    path = os.path.join(tmp_path, "Song [dQw4w9WgXcQ] caf\udce9 🎻 two  spaces :smile:.wav")
    shutil.copy(note, path)
    process = start("grow", path, "-o", path + " run", "--epochs", 1, "--vocoder", "griffinlim", LC_ALL="C")
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    before, after = output[1].split("🎻".encode())[:2]
    assert before.endswith(b"Song [dQw4w9WgXcQ] caf\\udce9 ") and after.startswith(b" two  spaces :smile:.wav"), output


class TestBadInput:
    """Each ends in one line on stderr and exit code 2 and writes nothing."""

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            (None, "no such file"),
            (b"plain text, not audio", "is not audio"),
            (np.zeros(0), "holds no samples"),
            (np.zeros(22050), "is silent"),
            (np.full(22050, np.nan), "NaN or infinite"),
            (np.r_[np.ones(22050), np.inf], "NaN or infinite"),
            (np.sin(np.arange(900.0)), "is too short"),
        ],
        ids=["missing", "not-audio", "empty", "silent", "nan", "inf", "short"],
    )
    def test_audio(self, tmp_path, samples, words):
        path = tmp_path / "in.wav"
        if isinstance(samples, bytes):
            path.write_bytes(samples)
        elif samples is not None:
            soundfile.write(path, samples, 22050, subtype="FLOAT")
        assert_rejected(grow(path, tmp_path / "run", "--epochs", 1), words)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--recipe", "best"], "unknown recipe 'best': expected one of default, notebook"),
            (["--precision", "fp8"], "unknown precision 'fp8': expected one of"),
            (["--backend", "reference", "--precision", "bf16"], "backend 'reference' cannot run"),
            (["--backend", "cuda"], "unknown backend 'cuda': expected one of auto, "),
            (["--vocoder", "hifigan"], "vocoder must be one of auto, bigvgan, griffinlim, got 'hifigan'"),
            (["--epochs", "0"], "epochs must be at least 1"),
            (["--minutes", "-1"], "minutes must be a positive number"),
            (["--duration", "0"], "duration must be a positive number"),
            (["--checkpoint-every-epochs", "0"], "checkpoint_every_epochs must be at least 1"),
            (["--resume"], "nothing to resume"),
            (["--vocoder", "bigvgan", "--bigvgan", "no-such-folder"], "no such BigVGAN folder"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_options(self, note, tmp_path, options, words):
        assert_rejected(fastnca_cli("grow", note, "-o", tmp_path / "run", *options), words)
        assert not (tmp_path / "run").exists()

    def test_bigvgan_that_does_not_fit(self, note, tmp_path):
        config = {"num_mels": 100, "sampling_rate": 24000, "n_fft": 1024, "hop_size": 256, "win_size": 1024}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "bigvgan_generator.pt").write_bytes(b"")
        result = fastnca_cli("grow", note, "-o", tmp_path / "run", "--vocoder", "bigvgan", "--bigvgan", tmp_path)
        assert_rejected(result, "expected num_mels 80, found 100; sampling_rate 22050, found 24000")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("out", ["file", "file/run", "/proc/fastnca"])
    def test_unwritable_folder(self, note, tmp_path, out):
        (tmp_path / "file").write_text("mine")
        assert_rejected(grow(note, tmp_path / out, "--epochs", 1), "folder")
        assert (tmp_path / "file").read_text() == "mine"

    def test_folder_that_holds_a_run(self, finished):
        note, run = finished
        before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        assert_rejected(grow(note, run, "--epochs", 1), "already holds a run")
        assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before

    @pytest.mark.parametrize("options", [(), ("--force",), ("--resume",)], ids=["plain", "force", "resume"])
    def test_folder_that_holds_files_of_another_kind(self, note, tmp_path, options):
        (tmp_path / "progress").mkdir()
        (tmp_path / "progress" / "thesis.txt").write_text("mine")
        (tmp_path / "target.wav").write_text("mine")
        words = "nothing to resume" if "--resume" in options else "holds target.wav, progress but no run"
        assert_rejected(grow(note, tmp_path, "--epochs", 1, *options), words)
        assert (tmp_path / "progress" / "thesis.txt").exists() and (tmp_path / "target.wav").read_text() == "mine"

    def test_resume_by_another_recipe_of_the_same_name(self, finished, monkeypatch):
        note, run = finished
        monkeypatch.setitem(RECIPES, "default", replace(RECIPES["default"], linear_weight=9.0))
        assert_rejected(
            grow(note, run, "--resume", "--recipe", "default"), "recipe 'default', which cannot become another"
        )

    def test_resume_on_another_sound_or_setting(self, finished, tmp_path):
        note, run = finished
        other = tmp_path / "other.wav"
        write_wav(other, np.sin(np.arange(2048.0)))
        assert_rejected(grow(other, run, "--resume"), "was started on another sound")
        assert_rejected(grow(note, run, "--resume", "--recipe", "notebook"), "started with recipe 'default'")
        assert_rejected(grow(note, run, "--resume", "--seed", "4"), "started with seed 0")

    @pytest.mark.parametrize("content", [b"", b"garbage", None])
    def test_resume_from_a_damaged_checkpoint(self, finished, tmp_path, content):
        note, run = finished
        whole = (run / "checkpoint.safetensors").read_bytes()
        (tmp_path / "checkpoint.safetensors").write_bytes(whole[:-100] if content is None else content)
        assert_rejected(grow(note, tmp_path, "--resume"), "damaged or not a safetensors file")

    def test_resume_from_a_checkpoint_of_another_version(self, finished, tmp_path):
        note, run = finished
        tensors, version, metadata = read_safetensors(run / "checkpoint.safetensors", "checkpoint")
        write_safetensors(tmp_path / "checkpoint.safetensors", tensors, "checkpoint", version - 1, metadata)
        assert_rejected(grow(note, tmp_path, "--resume"), f"has version {version - 1}, and this fastnca goes on with")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--frames", "0"], "frames must be at least 8"),
            (["--steps", "-1"], "steps must be at least 0, got -1"),
            (["--time", "repeat"], "unknown time 'repeat': expected one of stretch, sustain"),
            (["--backend", "cuda"], "unknown backend"),
            (["-o", "no/such/folder.wav"], "no such folder"),
            (["--pitch", "high"], "pitch must be a note (E4), semitones (+3, -2) or a frequency (330hz), got 'high'"),
            (["--seeds-every", "0"], "seeds must be at least 1 cell apart, got 0"),
            (["--wound", "0.5"], "a wound is a box SECONDS-SECONDS,HZ-HZ such as 0.5-0.8,200-2000, got '0.5'"),
            (["--wound", "1-2,100-200"], "a wound must lie within the sound's 0.09 s"),
            (["--wound", "0-1,100-200", "--heal", "0"], "heal must be at least 1 step, got 0"),
        ],
    )
    def test_generate_options(self, finished, options, words):
        assert_rejected(fastnca_cli("generate", finished[1], *options), words)

    def test_sustaining_without_time_coordinates(self, finished, tmp_path):
        _, card = fastnca.load_model(finished[1] / "model.safetensors")
        fastnca.save_model(tmp_path / "model.safetensors", fastnca.DualSpecTNCA(), replace(card, recipe="notebook"))
        result = fastnca_cli("generate", tmp_path, "--time", "sustain")
        assert_rejected(result, "the model's recipe, notebook, has no time coordinates")
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_generate_without_a_run(self, tmp_path):
        assert_rejected(fastnca_cli("generate", tmp_path / "nothing"), "no such file or folder")
        assert_rejected(fastnca_cli("generate", tmp_path), "no model.safetensors in")
        torch.save({}, tmp_path / "model.safetensors")
        assert_rejected(fastnca_cli("generate", tmp_path), "damaged or not a safetensors file")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda sound: sound.pop("n_frames"), "SoundCard has no n_frames"),
            (lambda sound: sound.update(n_frames="8"), "SoundCard has a wrong value in n_frames"),
            (lambda sound: sound.update(window="hann"), "SoundCard has unknown, perhaps newer, window"),
            (lambda sound: sound["scale"].pop("mel_ref_db"), "Scale has no mel_ref_db"),
            (lambda sound: sound["scale"].pop("bands"), "it has no 'bands'"),
            (lambda sound: sound["scale"].update(bands=3), "MelBands should be its fields and is 3"),
        ],
    )
    def test_generate_from_a_model_of_another_fastnca(self, finished, tmp_path, change, words):
        tensors, version, metadata = read_safetensors(finished[1] / "model.safetensors", "model")
        change(metadata["sound"])
        write_safetensors(tmp_path / "model.safetensors", tensors, "model", version, metadata)
        assert_rejected(fastnca_cli("generate", tmp_path), words)

    def test_generate_from_a_newer_model(self, finished, tmp_path):
        tensors, version, metadata = read_safetensors(finished[1] / "model.safetensors", "model")
        write_safetensors(tmp_path / "model.safetensors", tensors, "model", version + 1, metadata)
        assert_rejected(fastnca_cli("generate", tmp_path), "was written by a newer fastnca")
        metadata["config"]["depth"] = 2
        write_safetensors(tmp_path / "model.safetensors", tensors, "model", version, metadata)
        assert_rejected(fastnca_cli("generate", tmp_path), "configuration has unknown, perhaps newer, depth")
        del metadata["config"]["depth"], metadata["config"]["growth"]
        write_safetensors(tmp_path / "model.safetensors", tensors, "model", version, metadata)
        assert_rejected(fastnca_cli("generate", tmp_path), "configuration has no growth")
        write_safetensors(tmp_path / "model.safetensors", tensors, "model", 1, metadata)
        assert_rejected(fastnca_cli("generate", tmp_path), "has version 1, which no fastnca has written")

    @pytest.mark.parametrize("missing", ["settings", "fingerprint", "trainer", "guard", "recipe"])
    def test_resume_from_a_checkpoint_with_a_field_missing(self, finished, tmp_path, missing):
        tensors, version, metadata = read_safetensors(finished[1] / "checkpoint.safetensors", "checkpoint")
        for fields in (metadata, metadata.get("trainer", {}), metadata.get("settings", {})):
            fields.pop(missing, None)
        write_safetensors(tmp_path / "checkpoint.safetensors", tensors, "checkpoint", version, metadata)
        assert_rejected(grow(finished[0], tmp_path, "--resume"), f"it has no '{missing}'; start over with --force")

    def test_errors_that_nobody_expected(self, finished, monkeypatch, capsys):
        def fail(*arguments, **options):
            raise LookupError("lost")

        monkeypatch.setattr("fastnca.generate.load_sound", fail)
        assert_rejected(fastnca_cli("generate", finished[1]), "LookupError: lost; set FASTNCA_TRACEBACK=1 to see where")
        monkeypatch.setattr("sys.argv", ["fastnca", "info"])
        monkeypatch.setattr(backends, "choose_backend", fail)
        with pytest.raises(SystemExit, match="1"):
            main()
        assert capsys.readouterr().err == "fastnca: LookupError: lost; set FASTNCA_TRACEBACK=1 to see where\n"
        monkeypatch.setenv("FASTNCA_TRACEBACK", "1")
        with pytest.raises(LookupError):
            main()

    def test_compare_missing(self, note, tmp_path):
        assert_rejected(fastnca_cli("compare", note, tmp_path / "nothing.wav"), "no such file")


class TestOutputNames:
    """Only regular files are replaced, and none that belongs to something else; checked before anything grows."""

    @staticmethod
    def refused(finished, out, words, *options):
        before = sorted(out.parent.iterdir())
        assert_rejected(fastnca_cli("generate", finished[1], "-o", out, *options), words)
        assert sorted(out.parent.iterdir()) == before

    @pytest.mark.parametrize("suffix", [".mp3", ".png", ".gif", ".flac"])
    def test_of_another_format(self, finished, tmp_path, suffix):
        self.refused(finished, tmp_path / f"x{suffix}", f"would hold WAV, not {suffix}; let its name end in .wav")

    @pytest.mark.parametrize("name", ["x.WAV", "x"])
    def test_that_promise_no_other_format(self, finished, tmp_path, name):
        assert fastnca_cli("generate", finished[1], "-o", tmp_path / name, "--steps", 1).exit_code == 0
        assert soundfile.info(tmp_path / name).format == "WAV" and (tmp_path / "x.png").exists()

    @pytest.mark.parametrize("ending", ["", ".png", "_growth.wav", "_healed.wav"])
    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_of_pipes_and_folders(self, finished, tmp_path, make, ending):
        taken = tmp_path / f"x{ending}"
        make(taken)
        options = "--hear-growth", "--wound", "0-1,100-200"
        self.refused(finished, tmp_path / "x", f"{taken} is a {'folder' if taken.is_dir() else 'device'}", *options)

    def test_of_a_device(self):
        with pytest.raises(OSError, match="/dev/null is a device"):
            check_replaceable("/dev/null")

    @pytest.mark.parametrize("name", ["target.wav", "final.wav", "life.wav"])
    def test_of_the_run(self, finished, name):
        self.refused(finished, finished[1] / name, "belongs to the run in that folder")

    def test_links_are_followed(self, finished, tmp_path):
        (tmp_path / "there").mkdir()
        for name in ("x.wav", "x.png"):
            (tmp_path / name).symlink_to(tmp_path / "there" / name)
        for _ in range(2):
            assert fastnca_cli("generate", finished[1], "-o", tmp_path / "x.wav", "--steps", 1).exit_code == 0
            assert (tmp_path / "x.wav").is_symlink() and soundfile.info(tmp_path / "there" / "x.wav").frames == 2048
            assert {path.name for path in (tmp_path / "there").iterdir()} == {"x.wav", "x.png"}

    @pytest.mark.parametrize("letter", ["x", "\u00fc"])
    def test_near_the_limit(self, finished, tmp_path, letter):
        out = tmp_path / (letter * (251 // len(letter.encode())) + ".wav")
        result = fastnca_cli("generate", finished[1], "-o", out, "--steps", 1)
        assert result.exit_code == 0, result.stderr
        assert {path.suffix for path in tmp_path.iterdir()} == {".wav", ".png"}
        self.refused(finished, out, "File name too long", "--hear-growth")

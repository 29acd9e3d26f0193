"""The folder of a run: who owns it, ending early and going on, setbacks and full disks."""

import json
import math
import os
import shutil
import signal
import time

import pytest
from commands import assert_rejected, assert_same_run, fastnca_cli, grow, read_losses, start

import fastnca
from fastnca.files import read_safetensors
from fastnca.training.losses import RecipeLoss
from fastnca.training.trainer import Trainer


def saved_epoch(out):
    return read_safetensors(out / "checkpoint.safetensors", "checkpoint")[2]["trainer"]["epoch"]


def wait_for_epoch(process, out, epoch):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "checkpoint.safetensors").exists() and saved_epoch(out) >= epoch:
            return
        time.sleep(0.02)
    raise AssertionError(f"epoch {epoch} was not reached: {process.communicate()}")


EPOCHS = ("--epochs", 12, "--vocoder", "griffinlim", "--checkpoint-every-epochs", 2)


@pytest.fixture(scope="module")
def uninterrupted(finished, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert fastnca_cli("grow", finished[0], "-o", run, *EPOCHS).exit_code == 0
    return run


class TestGoingOn:
    def test_after_kill(self, finished, uninterrupted, tmp_path):
        process = start("grow", finished[0], "-o", tmp_path, *EPOCHS)
        wait_for_epoch(process, tmp_path, 2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "metrics.json").exists()
        fastnca.load_model(tmp_path / "model.safetensors")
        result = fastnca_cli("grow", finished[0], "-o", tmp_path, "--resume")
        assert result.exit_code == 0, result.stderr
        assert_same_run(tmp_path, uninterrupted)

    def test_after_ctrl_c(self, finished, uninterrupted, tmp_path):
        process = start("grow", finished[0], "-o", tmp_path, *EPOCHS)
        wait_for_epoch(process, tmp_path, 2)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)
        assert process.returncode == 130, output
        stopped = json.loads((tmp_path / "metrics.json").read_text())["epochs"]
        assert 2 <= stopped < 12
        assert fastnca_cli("generate", tmp_path, "-o", tmp_path / "usable.wav").exit_code == 0
        result = fastnca_cli("grow", finished[0], "-o", tmp_path, "--resume")
        assert result.exit_code == 0, result.stderr
        assert_same_run(tmp_path, uninterrupted)

    def test_more_epochs(self, finished, tmp_path):
        assert grow(finished[0], tmp_path, "--epochs", 1).exit_code == 0
        assert grow(finished[0], tmp_path, "--resume", "--epochs", 2).exit_code == 0
        assert [row["epoch"] for row in read_losses(tmp_path)] == ["1", "2"]

    @pytest.mark.parametrize(
        "edit",
        [
            lambda text: text.replace(",", ";").replace(".", ",").encode("utf-8-sig"),
            lambda text: text.replace(",", "\t").replace("\r\n", "\n").encode("utf-16"),
            lambda text: text.replace("\r\n2,", "\r\n\r\n2.0,").encode(),
            lambda text: "".join(f"{line},note\r\n" for line in text.splitlines()).encode(),
        ],
        ids=["semicolons", "tabs-utf16", "blank-lines", "a-column-more"],
    )
    def test_losses_that_a_spreadsheet_saved(self, finished, tmp_path, edit):
        run = tmp_path / "run"
        shutil.copytree(finished[1], run)
        before = read_losses(run)
        (run / "losses.csv").write_bytes(edit((run / "losses.csv").read_bytes().decode()))
        assert grow(finished[0], run, "--resume", "--epochs", 4).exit_code == 0
        after = read_losses(run)
        assert [row["epoch"] for row in after] == ["1", "2", "3", "4"]
        assert [{name: row[name] for name in before[0]} for row in after[:3]] == before

    @pytest.mark.parametrize("content", [None, b"", b"no table", b"epoch\n", b"loss\n1\n", b"PK\3\4\0\xff"])
    def test_losses_that_are_none(self, finished, tmp_path, content):
        run = tmp_path / "run"
        shutil.copytree(finished[1], run)
        (run / "losses.csv").unlink() if content is None else (run / "losses.csv").write_bytes(content)
        assert grow(finished[0], run, "--resume", "--epochs", 4).exit_code == 0
        assert [row["epoch"] for row in read_losses(run)] == ["4"]
        if content:
            assert (run / "losses.unread.csv").read_bytes() == content

    def test_force_starts_over(self, finished, tmp_path):
        assert grow(finished[0], tmp_path, "--epochs", 2).exit_code == 0
        (tmp_path / "notes.txt").write_text("mine")
        assert grow(finished[0], tmp_path, "--epochs", 1, "--force").exit_code == 0
        assert len(read_losses(tmp_path)) == 1 and (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_folder_has_one_owner(self, finished, uninterrupted, tmp_path):
        run = tmp_path / "run"
        process = start("grow", finished[0], "-o", run, *EPOCHS)
        wait_for_epoch(process, run, 2)
        process.send_signal(signal.SIGSTOP)
        try:
            for options in ((), ("--resume",), ("--force",)):
                result = grow(finished[0], run, "--epochs", 1, *options)
                assert_rejected(result, f"{run} is in use by another run")
        finally:
            process.send_signal(signal.SIGCONT)
        output = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert_same_run(run, uninterrupted)

    def test_two_that_start_at_once(self, finished, uninterrupted, tmp_path):
        runs = [start("grow", finished[0], "-o", tmp_path / "run", *EPOCHS) for _ in range(2)]
        told = [run.communicate(timeout=120)[1].decode() for run in runs]
        assert sorted(run.returncode for run in runs) == [0, 2], told
        assert sum("is in use" in text or "already holds a run" in text for text in told) == 1
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_who_fails_lets_go(self, finished, tmp_path):
        """In one process, where a listener's error is kept."""

        def fail(event):
            raise LookupError

        options = {"vocoder": "griffinlim", "epochs": 1}
        with pytest.raises(LookupError) as kept:
            fastnca.grow(finished[0], tmp_path, on_event=fail, **options)
        with pytest.raises(FileExistsError, match="already holds a run"):
            fastnca.grow(finished[0], tmp_path, **options)
        fastnca.grow(finished[0], tmp_path, resume=True)
        assert kept.value.__traceback__

    @pytest.mark.parametrize("fitting", [0, 2, 4])
    def test_a_disk_that_is_full_at_the_start(self, finished, tmp_path, monkeypatch, fitting):
        """So many files fit; then every command finds a folder that it can use."""
        real_fsync, count = os.fsync, iter(range(1000))

        def fill(descriptor):
            if next(count) >= fitting:
                raise OSError(28, "No space left on device")
            real_fsync(descriptor)

        for options, words in (((), ""), (("--resume",), "nothing to resume"), (("--force",), "")):
            count = iter(range(1000))
            with monkeypatch.context() as full:
                full.setattr("fastnca.files.os.fsync", fill)
                result = grow(finished[0], tmp_path / "run", "--epochs", 1)
            assert result.exit_code in (1, 2) and "No space left on device" in result.stderr
            result = grow(finished[0], tmp_path / "run", "--epochs", 1, *options)
            assert words in result.stderr if words else result.exit_code == 0, result.stderr
            shutil.rmtree(tmp_path / "run")

    def test_a_full_disk_leaves_the_last_checkpoint(self, finished, uninterrupted, tmp_path, monkeypatch):
        real_fsync = os.fsync

        def fill_after_epoch_four(descriptor):
            if (tmp_path / "losses.csv").exists() and len(read_losses(tmp_path)) >= 4:
                raise OSError(28, "No space left on device")
            real_fsync(descriptor)

        monkeypatch.setattr("fastnca.files.os.fsync", fill_after_epoch_four)
        result = fastnca_cli("grow", finished[0], "-o", tmp_path, *EPOCHS)
        assert result.exit_code == 1 and "No space left on device" in result.stderr
        assert saved_epoch(tmp_path) == 2
        monkeypatch.undo()
        assert fastnca_cli("grow", finished[0], "-o", tmp_path, "--resume").exit_code == 0
        assert_same_run(tmp_path, uninterrupted)

    def test_a_setback_is_told_and_outlives_a_kill(self, finished, tmp_path, spoil_loss):
        spoil_loss(lambda epoch, setbacks: math.nan if epoch == 2 and not setbacks else 1.0)
        result = grow(finished[0], tmp_path / "whole", "--epochs", 6)
        assert result.exit_code == 0 and "epoch 3: diverged; back to the lowest loss" in result.stderr
        assert grow(finished[0], tmp_path / "parts", "--epochs", 3).exit_code == 0
        assert grow(finished[0], tmp_path / "parts", "--resume", "--epochs", 6).exit_code == 0
        for name in ("whole", "parts"):
            assert json.loads((tmp_path / name / "metrics.json").read_text())["setbacks"] == 1
        rates = [float(row["learning_rate"]) for row in read_losses(tmp_path / "whole")]
        assert rates[2] < 0.55 * rates[1]

    def test_training_that_diverges_for_good_leaves_its_best(self, finished, tmp_path, spoil_loss):
        spoil_loss(lambda epoch, setbacks: 10.0**epoch)
        result = grow(finished[0], tmp_path, "--epochs", 12)
        assert result.exit_code == 1 and "in epoch 12, as 10 times before; try another seed" in result.stderr
        assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 11
        assert fastnca_cli("generate", tmp_path, "-o", tmp_path / "usable.wav").exit_code == 0

    def test_nan_keeps_the_last_checkpoint(self, finished, uninterrupted, tmp_path, monkeypatch, spoil_loss):
        spoil_loss(lambda epoch, setbacks: math.nan if epoch == 5 else 1.0)
        result = fastnca_cli("grow", finished[0], "-o", tmp_path, *EPOCHS)
        assert result.exit_code == 1
        assert "the loss became nan" in result.stderr and "epoch 6" in result.stderr
        monkeypatch.undo()
        assert fastnca_cli("grow", finished[0], "-o", tmp_path, "--resume").exit_code == 0
        assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def spoil_loss(monkeypatch):
    """Multiplies every loss by ``factor(epochs done, setbacks)``."""

    def spoil(factor):
        real_epoch = Trainer.train_epoch
        trainers = []

        def train_epoch(trainer):
            trainers[:] = [trainer]
            return real_epoch(trainer)

        def forward(loss, *arguments):
            total, terms = real_forward(loss, *arguments)
            return total * factor(trainers[0].epoch, trainers[0].setbacks), terms

        real_forward = RecipeLoss.forward
        monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
        monkeypatch.setattr(RecipeLoss, "forward", forward)

    return spoil

"""A run: a growth and the folder that keeps it, from the checks before it to the files it leaves."""

import codecs
import contextlib
import csv
import io
import json
import os
import shutil
from contextlib import ExitStack, closing
from pathlib import Path

from .files import atomic_write, check_replaceable, lock, remove_partials, unlock
from .growth import Checkpoint, CheckpointDue, Done, EpochDone, Growth, PictureDue, TrainingDone
from .settings import RunSettings
from .sound.files import write_wav
from .sound.pictures import save_picture
from .sound_model import MODEL_FILE, SPACE_FILE
from .training.divergence import TrainingDiverged

CHECKPOINT_FILE = "checkpoint.safetensors"
LOSSES_FILE = "losses.csv"
LOCK_FILE = ".fastnca.lock"  # there while a process owns the folder, or after a crash
RUN_FILES = (
    CHECKPOINT_FILE,
    MODEL_FILE,
    LOSSES_FILE,
    "metrics.json",
    "target.wav",
    "generated.wav",
    "target.png",
    "final.png",
    "life.json",
    "life.png",
    "progress",
    "tensorboard",
)

SOUNDS_FOLDER = "sounds"
SPACE_FILES = (
    CHECKPOINT_FILE,
    SPACE_FILE,
    LOSSES_FILE,
    "space.json",
    "map.png",
    "map.csv",
    SOUNDS_FOLDER,
    "progress",
    "tensorboard",
)


def check_output(path):
    """Raises OSError where a file cannot be written, or is one of a run; what was grown at last may be grown again."""
    check_replaceable(path)
    if (
        path.name in RUN_FILES + SPACE_FILES
        and path.name != "generated.wav"
        and path.with_name(CHECKPOINT_FILE).exists()
    ):
        raise FileExistsError(f"{path} belongs to the run in that folder; choose another name with -o")


def read_losses(data):
    """The rows of a losses.csv, also one that a spreadsheet has saved: with a byte order mark, semicolons, tabs,
    decimal commas, in UTF-16. Rows without an epoch are left out, and the last of several for one epoch stays."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = data.decode(encoding, errors="replace").replace("\0", "")
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = {}
    with contextlib.suppress(csv.Error):
        for row in csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter):
            row = {name: value or "" for name, value in row.items() if name}
            if delimiter != ",":
                row = {name: value.replace(",", ".") for name, value in row.items()}
            with contextlib.suppress(KeyError, ValueError, OverflowError):
                row["epoch"] = str(int(float(row["epoch"])))
                rows[int(row["epoch"])] = row
    return [rows[epoch] for epoch in sorted(rows)]


class RunFolder:
    """The folder of one run: which files it holds, whose they are, and when they are written.

    It belongs to one process at a time, from :meth:`find_checkpoint`, or :meth:`open` where it was not there before, to
    :meth:`release`.
    """

    files = RUN_FILES  # that a run writes, the checkpoint first
    settings_type = RunSettings

    def __init__(self, path):
        self.path = Path(path)
        self.losses = []  # rows of losses.csv
        self._lock = None
        self._goes_on = False

    def _own(self, make=False):
        try:
            if make:
                os.makedirs(os.path.realpath(self.path))  # raises where another run has made it since
            self._lock = lock(self.path / LOCK_FILE)
        except (BlockingIOError, FileExistsError) as error:
            raise BlockingIOError(
                f"{self.path} is in use by another run; wait for its end, or choose another folder with -o"
            ) from error
        except OSError as error:
            raise OSError(f"cannot write to the output folder {self.path}: {error.strerror or error}") from error

    def release(self):
        """Let others use the folder."""
        if self._lock:
            unlock(self._lock)
            self._lock = None

    def find_checkpoint(self, resume=False, force=False):
        """The Checkpoint to go on from, or None for a new run.

        resume: a run must be there. force: a run that is there will be replaced. Raises OSError or ValueError, saying
        what the folder holds, where neither a new run nor an old one can begin here.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; the output must be a folder")
        if self.path.exists():
            self._own()
        existing = [name for name in self.files if (self.path / name).exists()]
        if resume:
            if CHECKPOINT_FILE not in existing:
                raise FileNotFoundError(
                    f"nothing to resume in {self.path}: it holds no {CHECKPOINT_FILE}; start without --resume"
                )
            self._goes_on = True
            return Checkpoint.load(self.path / CHECKPOINT_FILE, self.settings_type)
        if existing and CHECKPOINT_FILE not in existing:
            raise FileExistsError(
                f"{self.path} holds {', '.join(existing[:3])} but no run; remove what a run would overwrite, or choose "
                "another folder with -o"
            )
        if existing and not force:
            raise FileExistsError(
                f"{self.path} already holds a run ({', '.join(existing[:3])}, ...); go on with it by --resume, "
                "replace it by --force, or choose another folder with -o"
            )
        return None

    def open(self, growth):
        """Make the folder, clear it of a run that is replaced, and write the target and a first checkpoint."""
        if not self._lock:
            self._own(make=True)
        try:
            if self._goes_on:
                self._read_losses(growth.trainer.epoch)
            else:
                self._clear()
            for name in self.files:
                remove_partials(self.path / name)
            try:
                self._save_checkpoint(growth)  # first: what holds no checkpoint is not taken for a run
                self._save_losses()
                self._save_model(growth)
                (self.path / "progress").mkdir(exist_ok=True)
                self._write_targets(growth)
            except BaseException:
                if not self._goes_on:
                    self._clear()  # or nothing could begin here
                raise
        except OSError as error:
            raise OSError(f"cannot write to the output folder {self.path}: {error.strerror or error}") from error

    def _clear(self):
        for name in reversed(self.files):  # the checkpoint last: until then it is a run
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def _read_losses(self, epoch):
        """Take up the rows up to that epoch: the checkpoint counts. A file that holds none is kept aside."""
        path = self.path / LOSSES_FILE
        if path.exists():
            self.losses = [row for row in read_losses(path.read_bytes()) if int(row["epoch"]) <= epoch]
            if not self.losses and path.stat().st_size:
                os.replace(path, path.with_name("losses.unread.csv"))

    def record(self, growth):
        """The growth's events, each passed on when the files that it asks for are written.

        Raises TrainingDiverged, after writing what had been learned, or OSError where a file cannot be written; the
        last checkpoint stays whole. The folder is released when the events end.
        """
        try:
            for event in growth.events():
                if isinstance(event, PictureDue):
                    self._write_picture(growth, self.path / "progress" / f"epoch_{event.epoch:04d}.png")
                elif isinstance(event, (CheckpointDue, TrainingDone)):
                    self._save_losses()
                    self._save_model(growth)
                    self._save_checkpoint(growth)  # last: what it goes on from is there
                elif isinstance(event, Done):
                    self._write_results(growth, event.result)
                elif isinstance(event, EpochDone):
                    self.losses.append(event.row)
                yield event
        except TrainingDiverged:
            if growth.trainer.epoch:
                self._save_model(growth)
                self._write_results(growth, growth.result())
            raise
        finally:
            self.release()

    def _save_losses(self):
        text = io.StringIO(newline="")
        if self.losses:
            names = {**self.losses[0], **self.losses[-1]}  # somebody may have removed a column, or added one
            rows = csv.DictWriter(text, names)
            rows.writeheader()
            rows.writerows(self.losses)
        with atomic_write(self.path / LOSSES_FILE) as file:
            file.write(text.getvalue().encode())

    def _save_model(self, growth):
        growth.model().save(self.path / MODEL_FILE)

    def _save_checkpoint(self, growth):
        growth.checkpoint().save(self.path / CHECKPOINT_FILE)

    def _write_targets(self, growth):
        write_wav(self.path / "target.wav", growth.samples)
        save_picture(self.path / "target.png", [("target", growth.target)])

    def _write_picture(self, growth, path):
        save_picture(path, [(f"epoch {growth.trainer.epoch}", growth.grown())])

    def _write_results(self, growth, sound):
        sound.save(self.path / "generated.wav")
        with atomic_write(self.path / "metrics.json") as file:
            file.write((json.dumps(sound.metrics, indent=2) + "\n").encode())
        rows = [("target", growth.target), (f"grown, epoch {growth.trainer.epoch}", sound.spectrogram)]
        save_picture(self.path / "final.png", rows)


def prepare(source, out=None, *, resume=False, force=False, checkpoint_every_epochs=100, **given):
    """Check everything that a run needs and open its folder -> (Growth, RunFolder or None).

    Args:
        source: the path of a recording, or samples [n] at 22.05 kHz.
        out: the run's folder, or None for a growth that leaves no files.
        resume: go on from the folder's last checkpoint. force: replace a run that the folder holds.
        given: settings by name, see RunSettings; None means the default or, with ``resume``, what the run had.

    Raises ValueError, TypeError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    folder = RunFolder(out) if out is not None else None
    if folder is None and (resume or force):
        raise ValueError("resume and force need out, the folder of the run")
    with ExitStack() as on_failure:
        if folder:
            on_failure.callback(folder.release)
        checkpoint = folder.find_checkpoint(resume, force) if folder else None
        settings = RunSettings.merge(given, checkpoint.settings if checkpoint else None)
        growth = Growth(source, settings, checkpoint, checkpoint_every_epochs)
        if folder:
            folder.open(growth)
        on_failure.pop_all()
    return growth, folder


def grow(
    source,
    out=None,
    *,
    recipe=None,
    epochs=None,
    minutes=None,
    duration=None,
    seed=None,
    pitch=None,
    vocoder=None,
    bigvgan=None,
    backend=None,
    precision=None,
    checkpoint_every_epochs=100,
    resume=False,
    force=False,
    on_event=None,
):
    """Learn a recording and grow it -> GrownSound with ``samples``, ``spectrogram``, ``metrics`` and ``save(wav)``.

    Args:
        source: the path of a recording, or samples [n] at 22.05 kHz.
        out: a folder for everything that ``fastnca grow`` writes; without it nothing is written.
        recipe: a name ("default") or a Recipe. epochs, minutes: the budget of training, whichever ends first; without
            either, 10 minutes. duration: seconds of the recording to use, 3 if not given. seed: of every random choice.
        pitch: of the recording ("A4", "440hz"), "auto" to find it or "none"; a sound with a pitch can grow at another.
        vocoder, bigvgan: see ``vocoder.resolve_vocoder``. backend, precision: see ``fastnca info``.
        resume, force: go on with the run in ``out``, or replace it.
        on_event: called with every event of the growth, see growth.py; to show progress, say.

    Raises:
        ValueError, TypeError, OSError: bad input, before any training. RuntimeError: a backend that cannot run here.
        TrainingDiverged: the loss exploded and could not be brought back.

    >>> sound = fastnca.grow("violin.wav", minutes=2)
    >>> sound.save("grown.wav")
    >>> longer = sound.model.grow(n_frames=400, time="sustain")
    """
    growth, folder = prepare(
        source,
        out,
        recipe=recipe,
        epochs=epochs,
        minutes=minutes,
        duration=duration,
        seed=seed,
        pitch=pitch,
        vocoder=vocoder,
        bigvgan=bigvgan,
        backend=backend,
        precision=precision,
        checkpoint_every_epochs=checkpoint_every_epochs,
        resume=resume,
        force=force,
    )
    with closing(folder.record(growth) if folder else growth.events()) as events:
        for event in events:
            if on_event:
                on_event(event)
    return event.result

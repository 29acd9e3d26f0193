"""Learning many sounds in one rule: the recordings, the training, and the folder that keeps it."""

import copy
import csv
import io
import json
import os
import statistics
import warnings
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from .files import atomic_write
from .growth import (
    Checkpoint,
    CheckpointDue,
    Done,
    PictureDue,
    SoundGrown,
    Training,
    TrainingDone,
    chosen_pitch,
    fingerprint,
    measured,
)
from .run import CHECKPOINT_FILE, SOUNDS_FOLDER, SPACE_FILES, RunFolder
from .settings import MINUTES_PER_SOUND, SpaceSettings
from .sound.convention import on_cpu
from .sound.files import load_audio, write_wav
from .sound.pictures import save_map, save_picture
from .sound.spectrogram import analyze
from .sound_model import SPACE_FILE, SoundCard
from .space import Member, Space, load_space
from .training.divergence import TrainingDiverged
from .training.trainer import Trainer

PICTURE_EVERY = 10  # times the epochs between the pictures of one sound
SHOWN = 3  # sounds of a picture


def find_recordings(sounds):
    """The files that ``sounds``, paths of files and folders, name: of a folder all in it that are not hidden.

    Raises FileNotFoundError for a path that is not there.
    """
    found = []
    for path in map(Path, sounds):
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.is_file())
            found += [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}; give recordings, or folders of recordings")
    return list(dict.fromkeys(str(path.absolute()) for path in found))


def names_of(paths):
    """A name for each recording: that of its file, with its folder's or a number where another has it already."""
    names = []
    for path in map(Path, paths):
        name = next((name for name in (path.stem, f"{path.parent.name}-{path.stem}") if name not in names), None)
        count = 2
        while name is None or name in names:
            name, count = f"{path.stem}-{count}", count + 1
        names.append(name)
    return names


class Learning(Training):
    """Many sounds being learned in one rule.

    Making one reads all recordings and checks everything that can be checked; :meth:`events` does the work.

    Args:
        settings: SpaceSettings.
        checkpoint: where an interrupted run goes on.
        checkpoint_every_epochs: epochs between two CheckpointDue.
        rank, processes: of torch.distributed: this process learns each ``processes``-th sound.
        on_read: called with (recordings read, recordings in all).

    Raises:
        ValueError, TypeError, OSError: bad input, said in one line. RuntimeError: a backend that cannot run here.
    """

    @on_cpu
    def __init__(
        self, settings, checkpoint=None, checkpoint_every_epochs=1000, rank=0, processes=1, on_read=lambda *_: None
    ):
        super().__init__(settings, checkpoint_every_epochs, PICTURE_EVERY * settings.recipe.picture_every_epochs)
        self.rank, self.processes = rank, processes
        if settings.pitch not in ("auto", "none"):
            raise ValueError(f"the pitch of many sounds is auto or none, got {settings.pitch!r}")
        self.paths, self.targets, self.left_out = [], [], {}
        self.instruments, folders = [], {}
        known = []  # of each of this process's sounds: number, frames, pitch, fingerprint
        for done, path in enumerate(settings.sounds):
            on_read(done, len(settings.sounds))
            try:
                samples, _ = load_audio(path, settings.duration)
                target = analyze(samples, self.vocoder.bands)
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                self.left_out[path] = " ".join(str(error).split())
                continue
            number = len(self.paths)
            instrument = folders.setdefault(Path(path).parent, len(folders)) if settings.instruments else number
            own = instrument % processes == rank
            if own:
                pitch_hz = chosen_pitch(samples, settings.pitch) if settings.recipe.context else None
                known.append((number, target.n_frames, pitch_hz, fingerprint(target)))
            self.paths.append(path)
            self.targets.append(target if own else None)
            self.instruments.append(instrument)
        if len(self.paths) < 2:
            reasons = "".join(f"; {reason}" for reason in self.left_out.values())
            raise ValueError(f"a space needs at least 2 sounds, got {len(self.paths)}{reasons}")
        self.names = names_of(self.paths)
        _, self.frames, self.pitches_hz, fingerprints = zip(
            *sorted(entry for part in self._gathered(known) for entry in part)
        )
        self.fingerprint = "".join(fingerprints)
        if settings.epochs is None and settings.minutes is None:
            settings = replace(settings, minutes=MINUTES_PER_SOUND * len(self.paths))
        self.settings = settings = replace(settings, batch=settings.batch or processes)
        self.trainer = Trainer(
            self.targets,
            settings.recipe,
            settings.budget,
            pitches_hz=list(self.pitches_hz),
            instruments=self.instruments,
            batch=settings.batch,
            rank=rank,
            processes=processes,
            longest=max(self.frames),
            **self.trainer_options,
        )
        if checkpoint:
            self.take_up(
                checkpoint, "other sounds or other mel bands; give it the same recordings, vocoder and duration"
            )

    def _gathered(self, value):
        """[what each process gives], in every process."""
        if self.processes == 1:
            return [value]
        values = [None] * self.processes
        dist.all_gather_object(values, value)
        return values

    def stop(self):
        self.trainer.stop()
        self.go_on()

    @property
    def stopped(self):
        return self.trainer.stopped

    def space(self, measured=None):
        """What has been learned by now, as a Space. All processes must call it together.

        measured: {name: metrics}.
        """
        codes = {instrument: code.detach().clone() for instrument, code in self.trainer.codes.items()}
        codes = {
            instrument: code.to(self.trainer.lessons[0].times.device)
            for part in self._gathered(codes)
            for instrument, code in part.items()
        }
        scales = {number: target.scale for number, target in enumerate(self.targets) if target is not None}
        scales = {number: scale for part in self._gathered(scales) for number, scale in part.items()}
        settings = self.settings
        members = {}
        for number, name in enumerate(self.names):
            card = SoundCard(
                scales[number],
                self.frames[number],
                settings.recipe.num_steps,
                settings.vocoder,
                settings.bigvgan,
                settings.recipe.name,
                self.trainer.epoch,
            )
            members[name] = Member(
                codes[self.instruments[number]], card, self.pitches_hz[number], metrics=(measured or {}).get(name, {})
            )
        return Space(copy.deepcopy(self.trainer.model), members, self.vocoder)

    def checkpoint(self):
        """-> Checkpoint of all processes, in the first one; None in the others. All must call it together."""
        own = self.trainer.state_dict()
        parts = [own] if self.processes == 1 else [None] * self.processes if self.rank == 0 else None
        if self.processes > 1:
            dist.gather_object(own, parts)
            if self.rank:
                return None
        tensors, numbers = {}, {}
        for part_tensors, part_numbers in reversed(parts):  # what they share is the first one's
            tensors |= part_tensors
            together = {name: numbers.get(name, {}) | part_numbers[name] for name in ("lessons", "turns")}
            numbers = {**part_numbers, **together}
        return Checkpoint(self.settings, tensors, numbers, self.fingerprint)

    def _ending(self):
        """Every sound of this process is grown and compared with its recording."""
        space = self.space()
        own = [lesson.number for lesson in self.trainer.lessons]
        self.measured, self.samples = {}, {}
        for done, number in enumerate(own):
            name, target = self.names[number], self.targets[number]
            model = space[name]
            yield SoundGrown(name, done, len(own))
            sound = model.grow()
            recording, _ = load_audio(self.paths[number], self.settings.duration)
            self.samples[name] = sound.samples
            self.measured[name] = measured(model, sound, target, recording)
        for name in ("measured", "samples"):
            together = {key: value for part in self._gathered(getattr(self, name)) for key, value in part.items()}
            setattr(self, name, {name: together[name] for name in self.names})
        yield Done(self.space(self.measured))

    def result(self):
        """The Space, with the errors of all sounds. All processes must call it together."""
        return list(self._ending())[-1].result

    def report(self):
        """What ``space.json`` holds, when all sounds have been grown."""
        errors = {
            f"{name}_l1_db": [measured[f"{name}_l1_db"] for measured in self.measured.values()]
            for name in ("mel", "linear")
        }
        return {
            **self.facts(),
            "batch": self.trainer.batch,
            "processes": self.processes,
            **{f"median_{name}": statistics.median(values) for name, values in errors.items()},
            **{f"worst_{name}": max(values) for name, values in errors.items()},
            "sounds": self.measured,
            "left_out": self.left_out,
        }


class SpaceFolder(RunFolder):
    """The folder of a run that learns many sounds."""

    files = SPACE_FILES
    settings_type = SpaceSettings

    def open(self, learning):
        path = self.path / SPACE_FILE
        if self._goes_on and path.exists() and (added := set(load_space(path)) - set(learning.names)):
            raise FileExistsError(
                f"{path} has sounds that were added, {', '.join(sorted(added))}: to go on would drop them; move the "
                "file to another place first"
            )
        super().open(learning)

    def _save_model(self, learning):
        learning.space().save(self.path / SPACE_FILE)

    def _write_targets(self, learning):
        (self.path / SOUNDS_FOLDER).mkdir(exist_ok=True)

    def _write_picture(self, learning, path):
        space, recipe = learning.space(), learning.settings.recipe
        rows = []
        for lesson in learning.trainer.lessons[:SHOWN]:
            name, target = learning.names[lesson.number], learning.targets[lesson.number]
            at = recipe.seed_spacing
            grids = space[name].automaton.grow(target.n_frames, 2 * at if at else recipe.num_steps, at=at)
            rows.append((f"{name}, epoch {learning.trainer.epoch}", target.with_grids(*grids)))
        save_picture(path, rows)

    def _write_results(self, learning, space):
        space.save(self.path / SPACE_FILE)
        for name, samples in learning.samples.items():
            write_wav(self.path / SOUNDS_FOLDER / f"{name}.wav", samples)
        with atomic_write(self.path / "space.json") as file:
            file.write((json.dumps(learning.report(), indent=2) + "\n").encode())
        write_map(self.path, space)


def write_map(folder, space):
    """The map of a space as ``map.csv`` and ``map.png`` in its folder."""
    places = space.map()
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("sound", "x", "y"), *((name, *place) for name, place in places.items())])
    with atomic_write(folder / "map.csv") as file:
        file.write(text.getvalue().encode())
    save_map(folder / "map.png", places)


class _Follower:
    """The part of the folder in the other processes of a job: they give the first one what it writes."""

    def open(self, learning):
        learning.checkpoint()
        learning.space()

    def release(self):
        pass

    def record(self, learning):
        try:
            for event in learning.events():
                if isinstance(event, (CheckpointDue, TrainingDone)):
                    learning.space()
                    learning.checkpoint()
                elif isinstance(event, PictureDue):
                    learning.space()
                yield event
        except TrainingDiverged:
            if learning.trainer.epoch:
                learning.space()
                learning.result()
            raise


@contextmanager
def job():
    """(rank, number of processes) of what torchrun started, joined by torch.distributed; (0, 1) without torchrun."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 or not dist.is_available():
        yield 0, 1
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        yield dist.get_rank(), processes
    finally:
        dist.destroy_process_group()


def prepare(
    sounds=(),
    out=None,
    *,
    resume=False,
    force=False,
    checkpoint_every_epochs=1000,
    rank=0,
    processes=1,
    on_read=lambda *_: None,
    **given,
):
    """As ``run.prepare`` for many sounds -> (Learning, SpaceFolder or None)."""
    folder = SpaceFolder(out) if out is not None and rank == 0 else None
    if out is None and (resume or force):
        raise ValueError("resume and force need out, the folder of the space")
    with ExitStack() as on_failure:
        if folder:
            on_failure.callback(folder.release)
        checkpoint = folder.find_checkpoint(resume, force) if folder else None
        if rank and resume:
            checkpoint = Checkpoint.load(Path(out) / CHECKPOINT_FILE, SpaceSettings)
        found = find_recordings(sounds)
        if not (found or checkpoint):
            raise ValueError("no recordings to learn: give at least 2, or folders of them")
        settings = SpaceSettings.merge({**given, "sounds": found or None}, checkpoint.settings if checkpoint else None)
        learning = Learning(settings, checkpoint, checkpoint_every_epochs, rank, processes, on_read)
        if processes > 1 and rank and out is not None:
            folder = _Follower()
        if folder:
            folder.open(learning)
        on_failure.pop_all()
    return learning, folder


def learn(
    sounds=(),
    out=None,
    *,
    recipe=None,
    epochs=None,
    minutes=None,
    duration=None,
    instruments=None,
    batch=None,
    seed=None,
    pitch=None,
    vocoder=None,
    bigvgan=None,
    backend=None,
    precision=None,
    checkpoint_every_epochs=1000,
    resume=False,
    force=False,
    on_event=None,
):
    """Learn many recordings in one rule -> Space.

    Args:
        sounds: paths of recordings, and of folders of recordings.
        out: a folder for everything that ``fastnca learn`` writes; without it nothing is written.
        epochs, minutes: the budget of training, whichever ends first; without either, 4 minutes a sound.
        duration: seconds to use of each, at most; 3 if not given.
        instruments: take the recordings of one folder for notes of one instrument: they share a code, and their pitches
            tell them apart. batch: sounds of one epoch; if not given, one for each process of torchrun.
        pitch: "auto" to find that of each recording, or "none".
        recipe, seed, vocoder, bigvgan, backend, precision, resume, force, on_event: see :func:`fastnca.grow`. What
            learns many sounds needs a recipe with context.

    Recordings that cannot be learned are left out, with a warning that says why; ``space.json`` lists them.

    Raises:
        ValueError, TypeError, OSError: bad input, before any training. RuntimeError: a backend that cannot run here.
        TrainingDiverged: the loss exploded and could not be brought back.

    >>> space = fastnca.learn(["violin.wav", "voice.wav"], minutes=8)
    >>> space.morph("violin", "voice").grow().save("between.wav")
    """
    with job() as (rank, processes):
        learning, folder = prepare(
            sounds,
            out,
            recipe=recipe,
            epochs=epochs,
            minutes=minutes,
            duration=duration,
            instruments=instruments,
            batch=batch,
            seed=seed,
            pitch=pitch,
            vocoder=vocoder,
            bigvgan=bigvgan,
            backend=backend,
            precision=precision,
            checkpoint_every_epochs=checkpoint_every_epochs,
            resume=resume,
            force=force,
            rank=rank,
            processes=processes,
        )
        for reason in learning.left_out.values():
            warnings.warn(f"left out: {reason}", stacklevel=2)
        with closing(folder.record(learning) if folder else learning.events()) as events:
            for event in events:
                if on_event:
                    on_event(event)
    return event.result

"""Training as a sequence of events, and the growth of one sound. They know no terminal, no signals and no folder."""

import copy
import hashlib
import os
import threading
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from .automaton import backends
from .files import read_safetensors, write_safetensors
from .settings import RunSettings
from .sound import metrics
from .sound.convention import N_FFT, as_samples, on_cpu
from .sound.files import load_audio, without_rumble
from .sound.pitch import find_pitch, read_pitch
from .sound.spectrogram import analyze
from .sound.vocoder import resolve_vocoder
from .sound_model import SoundCard, SoundModel
from .training.trainer import Trainer
from .version import __version__

CHECKPOINT_VERSION = 7  # a checkpoint of another version cannot be resumed


@dataclass(frozen=True)
class EpochDone:
    """An epoch has ended. row: its numbers, see ``Trainer.train_epoch``; progress: the spent share of the budget."""

    row: dict
    progress: float
    seconds_left: float


@dataclass(frozen=True)
class Setback:
    """Training diverged in this epoch: it goes on from its lowest loss at half the learning rate."""

    epoch: int


@dataclass(frozen=True)
class PictureDue:
    """The recipe wants a picture of what grows now."""

    epoch: int


@dataclass(frozen=True)
class CheckpointDue:
    """It is time to save what has been learned."""

    epoch: int


@dataclass(frozen=True)
class TrainingDone:
    """Training has ended, because its budget is spent or because somebody stopped it; decoding follows."""

    epoch: int
    stopped: bool


@dataclass(frozen=True)
class SoundGrown:
    """One of many learned sounds has been grown and decoded: ``done`` of ``total``."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Done:
    """The last event. result: the GrownSound of a growth, the Space of what learned many sounds."""

    result: object


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never been interrupted.

    settings: what it was started with. tensors, numbers: of ``Trainer.state_dict``, the weights, the optimizer's state
    and the best so far among them. fingerprint: of the target, so that it goes on with the same sound.
    """

    settings: RunSettings
    tensors: dict
    numbers: dict
    fingerprint: str

    def save(self, path):
        """Write the checkpoint to one safetensors file, atomically."""
        metadata = {"settings": self.settings.to_dict(), "trainer": self.numbers, "fingerprint": self.fingerprint}
        write_safetensors(path, self.tensors, "checkpoint", CHECKPOINT_VERSION, metadata)

    @classmethod
    def load(cls, path, settings_type=RunSettings):
        """Raises FileNotFoundError, or ValueError for what is no checkpoint or of another version."""
        tensors, version, metadata = read_safetensors(path, "checkpoint")
        if version != CHECKPOINT_VERSION:
            age = "a newer" if version > CHECKPOINT_VERSION else "an older"
            raise ValueError(
                f"{path} was written by {age} fastnca: it has version {version}, and this fastnca goes on with version "
                f"{CHECKPOINT_VERSION}; go on with the fastnca that started the run, or start over with --force"
            )
        try:
            settings = settings_type.from_dict(metadata["settings"])
            return cls(settings, tensors, metadata["trainer"], metadata["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged or of another fastnca: {reason}; start over with --force") from error


def fingerprint(target):
    """Of a DualSpectrogram: equal ones have equal fingerprints."""
    return hashlib.sha256(target.mel_db.numpy().tobytes() + target.linear_db.numpy().tobytes()).hexdigest()


def chosen_pitch(samples, choice):
    """The pitch in Hz of a recording by the setting ``pitch``, or None."""
    if choice == "none":
        return None
    return find_pitch(samples) if choice == "auto" else read_pitch(choice)


def measured(model, sound, target, recording):
    """What a report says of a GrownSound that a SoundModel grew by its own plan, beside its target and recording."""
    return {
        "n_frames": target.n_frames,
        "steps": model.plan().num_steps,
        "pitch_hz": model.automaton.places.pitch_hz if model.automaton.places else None,
        **metrics.grid_metrics(sound.spectrogram, target),
        **metrics.compare(recording, sound.samples),
    }


def trainer_options(seed, backend, precision, fastest_precision=backends.fastest_precision):
    """The options of a Trainer on this machine, "auto" replaced by what that is here. Raises ValueError, RuntimeError
    for what cannot run."""
    device = backends.choose_device(backend)
    backend = backends.choose_backend(backend, device=device)
    precision = fastest_precision(backend) if precision == "auto" else precision
    backends.choose_backend(backend, device=device, precision=precision)
    return {"seed": seed, "backend": backend, "precision": precision, "device": device}


class Training(ABC):
    """A trainer at work, as a sequence of events.

    While one thread takes the events, others may call :meth:`pause`, :meth:`go_on`, :meth:`stop` and :meth:`extend`.

    Args:
        checkpoint_every_epochs, picture_every_epochs: epochs between two CheckpointDue, and two PictureDue.

    Those who derive from it add ``trainer``, and the ``fingerprint`` of what it learns.
    """

    def __init__(self, settings, checkpoint_every_epochs, picture_every_epochs):
        if checkpoint_every_epochs < 1:
            raise ValueError(f"checkpoint_every_epochs must be at least 1, got {checkpoint_every_epochs}")
        self.settings = settings
        self.checkpoint_every_epochs, self.picture_every_epochs = checkpoint_every_epochs, picture_every_epochs
        self.trainer_options = trainer_options(
            settings.seed, settings.backend, settings.precision, self._fastest_precision
        )
        self.vocoder = resolve_vocoder(settings.vocoder, settings.bigvgan)
        self._running, self._stopped = threading.Event(), threading.Event()
        self._running.set()

    def _fastest_precision(self, backend):
        return backends.fastest_precision(backend)

    def take_up(self, checkpoint, what):
        """Go on where a run was interrupted. Raises ValueError for a checkpoint of something else, ``what`` says of
        what it should be, or for a damaged one."""
        if checkpoint.fingerprint != self.fingerprint:
            raise ValueError(f"the run was started on {what}, or start over with --force")
        try:
            self.trainer.load_state_dict(checkpoint.tensors, checkpoint.numbers)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"the checkpoint is damaged or of another fastnca: {reason}; start over with --force"
            ) from error

    def pause(self):
        """Hold training after the present epoch, until :meth:`go_on` or :meth:`stop`."""
        self._running.clear()

    def go_on(self):
        self._running.set()

    def stop(self):
        """End training after the present epoch; what has been learned by then is decoded."""
        self._stopped.set()
        self._running.set()

    def extend(self, minutes):
        """Train for so many minutes more than was planned."""
        planned = self.trainer.seconds / 60 if self.settings.minutes is None else self.settings.minutes
        self.settings = replace(self.settings, epochs=None, minutes=planned + minutes)
        self.trainer.budget = self.settings.budget

    @property
    def stopped(self):
        return self._stopped.is_set()

    def events(self):
        """Train, and yield what happens; see the event classes above.

        Raises TrainingDiverged where training went wrong for good. The trainer is then at its lowest loss.
        """
        trainer = self.trainer
        while trainer.progress < 1.0 and not self.stopped:
            self._running.wait()
            if self.stopped:
                break
            setbacks = trainer.setbacks
            try:
                row = trainer.train_epoch()
            finally:
                self._epoch_ended()
            if trainer.setbacks > setbacks:
                yield Setback(trainer.epoch)
            yield EpochDone(row, trainer.progress, max(0.0, trainer.seconds * (1.0 / trainer.progress - 1.0)))
            if trainer.epoch % self.picture_every_epochs == 0:
                yield PictureDue(trainer.epoch)
            if trainer.epoch % self.checkpoint_every_epochs == 0:
                yield CheckpointDue(trainer.epoch)
        yield TrainingDone(trainer.epoch, self.stopped)
        yield from self._ending()

    def _ending(self):
        yield Done(self.result())

    def _epoch_ended(self):  # noqa: B027 (who has nothing to do then need not say so)
        """Called after every epoch, also one that raised."""

    @abstractmethod
    def result(self):
        """What has been learned, grown and compared with what it should be."""

    def facts(self):
        """What a report says of the run itself."""
        trainer = self.trainer
        return {
            "fastnca": __version__,
            "recipe": self.settings.recipe.name,
            "seed": self.settings.seed,
            "epochs": trainer.epoch,
            "training_seconds": trainer.seconds,
            "seconds_per_epoch": trainer.seconds / max(trainer.epoch, 1),
            "setbacks": trainer.setbacks,
            "backend": trainer.model.backend,
            "precision": trainer.model.precision,
            "vocoder": self.vocoder.name,
        }

    def checkpoint(self):
        """-> Checkpoint; only for the thread that takes the events."""
        tensors, numbers = self.trainer.state_dict()
        return Checkpoint(self.settings, tensors, numbers, self.fingerprint)


class Growth(Training):
    """One sound being learned.

    Making one checks everything that can be checked; :meth:`events` does the work. While one thread takes the events,
    others may also call :meth:`model` and :meth:`grown`.

    Args:
        source: the path of a recording, or samples [n] at 22.05 kHz.
        settings: RunSettings.
        checkpoint: where an interrupted run goes on.
        checkpoint_every_epochs: epochs between two CheckpointDue.

    Raises:
        ValueError, TypeError, OSError: bad input, said in one line. RuntimeError: a backend that cannot run here.
    """

    @on_cpu
    def __init__(self, source, settings, checkpoint=None, checkpoint_every_epochs=100):
        super().__init__(settings, checkpoint_every_epochs, settings.recipe.picture_every_epochs)
        self.source = None  # what was found in the file, an AudioInfo
        if isinstance(source, (str, os.PathLike)):
            self.samples, self.source = load_audio(source, settings.duration)
        else:
            self.samples, note = without_rumble(as_samples(source, minimum=2 * N_FFT))
            if note:
                warnings.warn(f"of the samples, {note}", stacklevel=2)
        self.target = analyze(self.samples, self.vocoder.bands)
        self.fingerprint = fingerprint(self.target)
        pitch_hz = chosen_pitch(self.samples, settings.pitch) if settings.recipe.context else None
        self.trainer = Trainer(
            [self.target], settings.recipe, settings.budget, pitches_hz=[pitch_hz], **self.trainer_options
        )
        if checkpoint:
            self.take_up(
                checkpoint, "another sound or other mel bands; give it the same audio file, vocoder and duration"
            )
        self._present = self._snapshot()

    def _epoch_ended(self):
        self._present = self._snapshot()

    def _snapshot(self):
        """The weights as they are after an epoch, for threads that ask while the next one changes them."""
        return {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}

    def model(self):
        """What has been learned by the end of the last epoch, as a SoundModel of its own."""
        automaton = copy.deepcopy(self.trainer.model)
        automaton.load_state_dict(self._present)
        return SoundModel(automaton, self.card, self.vocoder)

    @property
    def card(self):
        settings = self.settings
        return SoundCard(
            self.target.scale,
            self.target.n_frames,
            settings.recipe.num_steps,
            settings.vocoder,
            settings.bigvgan,
            settings.recipe.name,
            self.trainer.epoch,
        )

    def grown(self):
        """What the model grows now -> DualSpectrogram. Any thread may ask at any time.

        It grows from as many seeds and for twice as many steps as an epoch; from one cell it would take far longer.
        """
        automaton, recipe = self.model().automaton, self.settings.recipe
        num_steps = recipe.num_steps if recipe.seed_spacing is None else 2 * recipe.seed_spacing
        return self.target.with_grids(*automaton.grow(self.target.n_frames, num_steps, at=recipe.seed_spacing))

    @on_cpu
    def result(self):
        """What the model grows now, decoded and compared with the recording -> GrownSound."""
        model = self.model()
        sound = model.grow()
        return replace(sound, metrics={**self.facts(), **measured(model, sound, self.target, self.samples)})

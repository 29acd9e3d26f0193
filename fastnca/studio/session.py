"""One studio: its folder, the sound that is open in it, what learns and what lives."""

import contextlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import threading
import time
from collections import OrderedDict
from contextlib import closing
from pathlib import Path

import torch

from ..files import atomic_write, lock, read_safetensors, unlock, write_safetensors
from ..generate import STAGES, growth_picture, in_turn
from ..growth import Checkpoint, EpochDone, Setback, TrainingDone
from ..life import find_target
from ..run import CHECKPOINT_FILE, LOSSES_FILE, prepare, read_losses
from ..sound.convention import HOP_LENGTH, SAMPLE_RATE
from ..sound.files import load_audio
from ..sound.pictures import save_growth, save_picture
from ..sound.synthetic import synthesize_bowed_string
from ..sound_model import MODEL_FILE, SPACE_FILE, find_model_file, load
from ..space import Space
from ..training.divergence import TrainingDiverged
from .stage import Mixture, Moment, Stage, level_bytes

LOCK_FILE = ".fastnca-studio.lock"
UPLOAD = ".upload-"  # begins the name of a folder that is not a sound yet
RECORDING = "recording"  # the stem of what was learned from
TAKES = "takes"
MIXTURE = "mixture.json"  # of a space: what was last grown from it
TAKE_VERSION = 1
NAME_LENGTH = 60
CURVE_POINTS = 400
CHECKPOINT_EPOCHS = 50  # between two checkpoints: some seconds
SOUNDS_KEPT = 12  # decoded, to play again
RULE_SECONDS = 1.0  # between two new rules for what lives, while it learns
WATCHED_SECONDS = 3.0  # after the page last asked: without anybody looking nothing lives on
LEARNING_SHARE = 0.15  # of the time that life may take from learning
RESTING_SHARE = 0.03  # the same, where nothing has been done to it for long
REST_STEPS = 64  # after the sound is full, or after the last touch
SPEEDS = (0.0, 1000.0)  # steps a second; 0 for as fast as it can


class Learning:
    """One growth, learning in a thread of its own, and its files."""

    def __init__(self, growth, folder):
        self.growth, self.folder = growth, folder
        self.status = "learning"
        self.row, self.error = None, None
        self._leaving = False
        self._thread = threading.Thread(target=self._learn, name="fastnca-learning", daemon=True)
        self._thread.start()

    def _learn(self):
        try:
            with closing(self.folder.record(self.growth)) as events:
                for event in events:
                    if isinstance(event, EpochDone):
                        self.row = event.row
                    elif isinstance(event, TrainingDone):
                        if self._leaving:
                            return
                        self.status = "finishing"
                    elif isinstance(event, Setback):
                        self.error = None
            self.status = "stopped" if self.growth.stopped else "finished"
        except TrainingDiverged as error:
            self._fail(f"the sound could not be learned: {error}")
        except OSError as error:
            self._fail(f"learning stopped: {error.strerror or error}; what was saved before is whole")
        except Exception as error:  # noqa: BLE001 (a thread would end without a word)
            self._fail(f"learning stopped: {type(error).__name__}: {' '.join(str(error).split())}")

    def _fail(self, text):
        self.status, self.error = "failed", text

    @property
    def running(self):
        return self._thread.is_alive()

    @property
    def busy(self):
        """Whether it takes the processor."""
        return self.running and self.status != "paused"

    def pause(self):
        if self.status == "learning":
            self.growth.pause()
            self.status = "paused"

    def go_on(self):
        if self.status == "paused":
            self.growth.go_on()
            self.status = "learning"

    def stop(self):
        self.growth.stop()

    def leave(self):
        """End at once, with a checkpoint and without decoding."""
        self._leaving = True
        self.growth.stop()
        while self.running and self.status != "finishing":  # what decodes is left to itself: its files are whole or not
            self._thread.join(0.05)

    def report(self):
        trainer = self.growth.trainer
        row = self.row or {}
        progress = min(1.0, trainer.progress)
        left = trainer.seconds * (1 / progress - 1) if progress else 60 * (self.growth.settings.minutes or 0)
        return {
            "status": self.status,
            "epoch": trainer.epoch,
            "mel_l1_db": row.get("mel_l1_db"),
            "linear_l1_db": row.get("linear_l1_db"),
            "progress": progress,
            "seconds_left": left,
            "minutes": self.growth.settings.minutes,
            "error": self.error,
        }


class Studio:
    """What the page shows: any thread may call anything.

    Args:
        path: the studio's folder, made if it is not there. In it each sound is the folder of a run, as ``fastnca grow``
            writes it, with the ``recording`` that it learns and with its ``takes``; or it is a space, which is played
            and learns no more, with the ``mixture.json`` that was last played.
        minutes: of learning a new sound. duration: seconds of a recording to learn.
        backend, vocoder: see ``fastnca.load``.

    Raises OSError where the folder cannot be written, BlockingIOError where another studio has it.
    """

    def __init__(self, path, *, minutes=10.0, duration=3.0, backend="auto", vocoder=None):
        self.path = Path(path)
        self.minutes, self.duration, self.backend, self.vocoder = minutes, duration, backend, vocoder
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock(self.path / LOCK_FILE)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{self.path} is open in another studio; close that, or choose another folder"
            ) from error
        except OSError as error:
            raise OSError(f"cannot write to the studio folder {self.path}: {error.strerror or error}") from error
        for left in self.path.glob(f"{UPLOAD}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.id = secrets.token_hex(4)
        self.name = self.note = self.stage = self.space = self.learning = self.message = None
        self.running, self.speed = True, 8.0
        self._moving = threading.Lock()  # life takes no step between a pause and what follows it
        self._opening = threading.Lock()  # one sound is opened at a time
        self._decoding = threading.Lock()  # and one decoded
        self._decoded = OrderedDict()
        self._watched = self._rule_at = 0.0
        self._closed = threading.Event()
        self._life = threading.Thread(target=self._live, name="fastnca-life", daemon=True)
        self._life.start()

    def close(self):
        """End all threads, with a checkpoint of what is being learned."""
        self._closed.set()
        self._life.join()
        if self.learning:
            self.learning.leave()
        if self._lock_file:
            unlock(self._lock_file)
            self._lock_file = None

    # Sounds

    def sounds(self):
        """What the page lists: name, epochs and error (None where it is not known) of each sound of the folder, and
        whether it is a space."""
        found = []
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and (_recording(folder) or has_model(folder)):
                numbers = {}
                with contextlib.suppress(OSError, ValueError):
                    numbers = json.loads((folder / "metrics.json").read_bytes())
                numbers = {key: numbers.get(key) for key in ("epochs", "mel_l1_db")}
                found.append({"name": folder.name, "is_space": (folder / SPACE_FILE).is_file(), **numbers})
        return found

    def add_upload(self, name, write, **settings):
        """A new sound of a file that somebody gave: ``write`` puts it at the path it is called with.

        ``settings``: of the run, by name.

        Raises ValueError for what is neither a recording nor a model; nothing is left of it then.
        """
        stem, suffix = _safe_name(name)
        upload = self.path / f"{UPLOAD}{secrets.token_hex(8)}"
        upload.mkdir()
        try:
            model = suffix == ".safetensors"
            file = upload / (MODEL_FILE if model else f"{RECORDING}{suffix}")
            write(file)
            try:
                if model:
                    file.rename(upload / self._checked_model(file))
                else:
                    load_audio(file, self.duration)
            except (ValueError, OSError, RuntimeError) as error:
                raise ValueError(str(error).replace(str(file), name)) from error
            with self._opening:
                folder = self._free_folder(stem)
                os.rename(upload, folder)
            self.open(folder.name, **settings)
        except BaseException:
            shutil.rmtree(upload, ignore_errors=True)
            raise

    def add_builtin(self):
        """The built-in bowed string."""
        import soundfile

        def write(path):
            soundfile.write(path, synthesize_bowed_string(duration=1.0), SAMPLE_RATE, subtype="FLOAT")

        self.add_upload("bowed string.wav", write, pitch="440hz")

    def _checked_model(self, file):
        """What a model file or a space file is called in a sound's folder. Raises ValueError for what is neither."""
        loaded = load(file, backend=self.backend, vocoder="griffinlim")
        return SPACE_FILE if isinstance(loaded, Space) else MODEL_FILE

    def add_run(self, run):
        """A copy of a finished run from elsewhere: its model, and its recording as it was learned; or of a space."""
        model_file = find_model_file(run)
        kept_as = self._checked_model(model_file)
        stem, _ = _safe_name(f"{Path(run).resolve().stem if Path(run).is_dir() else model_file.stem}.wav")
        upload = self.path / f"{UPLOAD}{secrets.token_hex(8)}"
        upload.mkdir()
        try:
            shutil.copyfile(model_file, upload / kept_as)
            for name in ("target.wav", LOSSES_FILE, "metrics.json") if kept_as == MODEL_FILE else ():
                source = model_file.with_name(name)
                if source.is_file():
                    shutil.copyfile(source, upload / name)
            folder = self._free_folder(stem)
            os.rename(upload, folder)
        except BaseException:
            shutil.rmtree(upload, ignore_errors=True)
            raise
        self.open(folder.name)

    def open_last(self):
        """Open the sound that was last worked on, if there is one."""
        folders = [self.path / sound["name"] for sound in self.sounds()]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
            try:
                self.open(folder.name)
                return
            except (ValueError, OSError, RuntimeError) as error:
                self.say(f"{folder.name} cannot be opened: {error}")

    def _free_folder(self, stem):
        count = 1
        while (folder := self.path / (stem if count == 1 else f"{stem} {count}")).exists():
            count += 1
        return folder

    def _folder(self, name):
        if name not in [sound["name"] for sound in self.sounds()]:
            raise ValueError(f"there is no sound {name!r} in this studio")
        return self.path / name

    def open(self, name, **settings):
        """Open a sound of the folder; one that has not learned all that it should goes on, and one that has not begun
        begins by these ``settings``.

        Raises ValueError or OSError where it cannot be opened; what is open then stays.
        """
        with self._opening:
            folder = self._folder(name)
            if name == self.name and self.learning and self.learning.running:
                return
            recording, checkpoint = _recording(folder), folder / CHECKPOINT_FILE
            goes_on = checkpoint.exists()
            if goes_on:
                try:
                    saved = Checkpoint.load(checkpoint)
                    spent = saved.settings.budget.spent(saved.numbers["epoch"], saved.numbers["seconds"])
                except (ValueError, KeyError, TypeError):
                    goes_on, spent = False, 1.0
            if recording and (spent < 1 if goes_on else not checkpoint.exists()):
                self._leave()
                if not goes_on:
                    chosen = {"duration": self.duration, "backend": self.backend, "vocoder": self.vocoder}
                    settings = {**chosen, "minutes": self.minutes, **settings}
                self._learn(folder, recording, goes_on, **settings)
            else:
                loaded = load(folder, backend=self.backend, vocoder=self.vocoder)
                if isinstance(loaded, Space):
                    stage, space = Stage(mixture=_last_mixture(folder, loaded)), loaded
                    note = f"{len(space)} sounds in one rule"
                else:
                    target = None
                    with contextlib.suppress(OSError, ValueError):
                        target = find_target(folder / MODEL_FILE, loaded.card)
                    stage, space = Stage(loaded, target), None
                    note = f"learned for {loaded.card.epochs} epochs"
                self._leave()
                self._show(name, stage, None, space)
                self.note = note

    def _learn(self, folder, recording, resume, **settings):
        growth, run = prepare(recording, folder, resume=resume, checkpoint_every_epochs=CHECKPOINT_EPOCHS, **settings)
        stage = Stage(growth.model(), growth.target)
        self._show(folder.name, stage, Learning(growth, run))
        self.note = str(growth.source).replace(recording.name, folder.name, 1)

    def _show(self, name, stage, learning, space=None):
        self.name, self.stage, self.learning, self.space = name, stage, learning, space
        self.message, self.running = None, True
        self._decoded.clear()

    def _leave(self):
        if self.learning:
            self.learning.leave()

    # Spaces

    def open_space(self):
        """The Space. Raises ValueError where none is open."""
        self.open_stage()
        if self.space is None:
            raise ValueError(f"{self.name} is one sound: only a space of many can be mixed")
        return self.space

    def map(self):
        """What the page shows of each sound of the space."""
        space = self.open_space()
        sounds = {name: {"name": name, "place": place} for name, place in space.map().items()}
        for name, member in space.members.items():
            seconds = round(member.card.n_frames * HOP_LENGTH / SAMPLE_RATE, 3)
            sounds[name] |= {"pitch_hz": member.pitch_hz, "seconds": seconds}
        return list(sounds.values())

    def mix(self, shares=None, glide=None, stroke=None):
        """Grow another mixture of the space: ``shares`` by name, or a ``glide`` from one of two names to the other."""
        with self._opening:
            mixture = _mixture(self.open_space(), shares, glide)
            self.stage.mix(mixture, stroke)
            with atomic_write(self.path / self.name / MIXTURE) as file:
                file.write(json.dumps(mixture.recipe).encode())

    # Learning

    def learn(self, action, minutes=5.0):
        """ "pause", "go_on", "stop", or "longer" by so many minutes."""
        if action not in ("pause", "go_on", "stop", "longer"):
            raise ValueError(f"unknown action {action!r}: expected pause, go_on, stop or longer")
        learning = self.learning
        if action != "longer":
            if learning is None:
                raise ValueError("nothing is being learned")
            {"pause": learning.pause, "go_on": learning.go_on, "stop": learning.stop}[action]()
            return
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes <= 24 * 60:
            raise ValueError(f"minutes must be a number above 0 and at most a day, got {minutes!r}")
        with self._opening:
            if learning and learning.running and learning.status in ("learning", "paused"):
                learning.growth.extend(minutes)
                return
            folder = self.path / self.name if self.name else None
            recording = folder and _recording(folder)
            if not recording or not (folder / CHECKPOINT_FILE).exists():
                raise ValueError("there is no recording to learn from: drop the recording itself")
            self._leave()
            numbers = Checkpoint.load(folder / CHECKPOINT_FILE).numbers
            self._learn(folder, recording, resume=True, minutes=numbers["seconds"] / 60 + minutes)

    def losses(self):
        """{"epoch", "mel", "linear"}: the errors in dB so far, thinned out."""
        learning, rows = self.learning, []
        if learning:
            rows = list(learning.folder.losses)
        elif self.name:
            with contextlib.suppress(OSError):
                rows = read_losses((self.path / self.name / LOSSES_FILE).read_bytes())
        rows = rows[::-1][:: max(1, -(-len(rows) // CURVE_POINTS))][::-1]
        names = {"epoch": "epoch", "mel": "mel_l1_db", "linear": "linear_l1_db"}
        columns = {name: [] for name in names}
        for row in rows:
            with contextlib.suppress(KeyError, ValueError):
                values = {name: float(row[key]) for name, key in names.items()}
                for name, value in values.items():
                    columns[name].append(value)
        return columns

    # Life

    def watch(self):
        """Somebody is looking: life goes on for a while."""
        self._watched = time.monotonic()

    def _live(self):
        """The thread in which the stage lives."""
        while not self._closed.wait(0.01):
            stage, learning = self.stage, self.learning
            now = time.monotonic()
            if stage is None or now - self._watched > WATCHED_SECONDS:
                continue
            try:
                self._take_rule(stage, learning)
                resting = stage.now.age - stage.touched > stage.steps_to_fill + REST_STEPS
                busy = learning is not None and learning.busy
                if resting and not busy:
                    continue
                with self._moving:
                    if not self.running:
                        continue
                    stage.live()
            except Exception as error:  # noqa: BLE001 (the thread must live, and the page should know)
                self.running = False
                self.say(f"life stopped: {type(error).__name__}: {' '.join(str(error).split())}")
                continue
            took = time.monotonic() - now
            pause = 1 / self.speed - took if self.speed else 0.0
            if busy:
                pause = max(pause, took / (RESTING_SHARE if resting else LEARNING_SHARE) - took)
            if pause > 0:
                self._closed.wait(min(pause, 2.0))

    def _take_rule(self, stage, learning):
        if learning is not None and learning.row and time.monotonic() - self._rule_at > RULE_SECONDS:
            self._rule_at = time.monotonic()
            if learning.running or stage.model.card.epochs != learning.growth.trainer.epoch:
                stage.learn(learning.growth.model())

    def say(self, text):
        """One line for the page."""
        self.message = {"id": (self.message or {"id": 0})["id"] + 1, "text": text}

    def live(self, action, steps=1, age=0, speed=8.0, seeds="many"):
        """What the page's buttons do to life, see the server."""
        stage = self.open_stage()
        if action == "run":
            self.running = True
            stage.touched = stage.now.age
        elif action == "pause":
            self._pause()
        elif action == "step":
            self._pause()
            stage.live(_integer("steps", steps, 1, 1000))
        elif action == "restart":
            stage.restart(many=seeds == "many")
            self.running = True
        elif action == "empty":
            stage.restart(empty=True)
        elif action == "scrub":
            self._pause()
            stage.scrub(_integer("age", age, 0, 10**9))
        elif action == "speed":
            if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not SPEEDS[0] <= speed <= SPEEDS[1]:
                raise ValueError(f"speed must be from 0 to 1000 steps a second, got {speed!r}")
            self.speed = float(speed)
        else:
            raise ValueError(f"unknown action {action!r}: expected run, pause, step, restart, empty, scrub or speed")

    def _pause(self):
        with self._moving:
            self.running = False

    def open_stage(self):
        """The Stage. Raises ValueError where no sound is open."""
        if self.stage is None:
            raise ValueError("no sound is open: drop a recording first")
        return self.stage

    # Takes

    def takes(self):
        """What the page shows of each take that was kept."""
        found = []
        folder = self._takes_folder()
        for path in sorted(folder.glob("*.safetensors"), key=_take_id) if folder else ():
            with contextlib.suppress(ValueError, OSError):
                found.append(self._take(path)[1])
        return found

    def _takes_folder(self):
        return self.path / self.name / TAKES if self.name else None

    def _take(self, path):
        key = path, path.stat().st_mtime_ns
        if key not in self._decoded:
            tensors, version, numbers = read_safetensors(path, "take")
            if version != TAKE_VERSION:
                raise ValueError(f"{path.name} was kept by another fastnca")
            self._remember(key, (tensors, numbers))
        return self._decoded[key]

    def _take_path(self, number):
        path = self._takes_folder() / f"{_integer('id', number, 1, 10**6)}.safetensors" if self.name else None
        if path is None or not path.is_file():
            raise ValueError(f"there is no take {number!r}")
        return path

    def take(self, action, number=None, name=None):
        """ "keep" what lives now, "recall", "forget" or "rename" a take."""
        stage = self.open_stage()
        if name is not None and not (isinstance(name, str) and 0 < len(name.strip()) <= NAME_LENGTH):
            raise ValueError(f"a take's name has 1 to {NAME_LENGTH} characters")
        if action == "keep":
            folder = self._takes_folder()
            folder.mkdir(exist_ok=True)
            number = max((_take_id(path) for path in folder.glob("*.safetensors")), default=0) + 1
            numbers, shape = stage.report()
            numbers = {key: numbers[key] for key in ("age", "mel_error_db")}
            mixture = stage.now.mixture
            take = {
                "id": number,
                "name": name or (_words(mixture.recipe) if mixture else f"take {number}"),
                "epochs": stage.model.card.epochs,
                **numbers,
                **shape,
            }
            if mixture:
                take["mixture"] = mixture.recipe
            self._save_take(folder / f"{number}.safetensors", dict(zip(("mel", "linear"), stage.now.grids)), take)
        elif action == "recall":
            self._pause()
            stage.put(self.kept(number))
        elif action == "forget":
            self._take_path(number).unlink(missing_ok=True)
        elif action == "rename" and name:
            path = self._take_path(number)
            tensors, numbers = self._take(path)
            self._save_take(path, tensors, {**numbers, "name": name})
        else:
            raise ValueError(f"unknown action {action!r}: expected keep, recall, forget or rename (with a name)")

    @staticmethod
    def _save_take(path, tensors, numbers):
        write_safetensors(path, tensors, "take", TAKE_VERSION, numbers)

    def kept(self, number):
        """A take as a Moment."""
        stage = self.open_stage()
        tensors, take = self._take(self._take_path(number))
        grids = tuple(tensors[name].to(now.device) for name, now in zip(("mel", "linear"), stage.now.grids))
        other = any(grid.shape[:3] != now.shape[:3] for grid, now in zip(grids, stage.now.grids))
        if other or (self.space is not None) != ("mixture" in take):
            raise ValueError(f"take {number} was kept of another model")
        mixture = _mixture(self.space, **take["mixture"]) if self.space else None
        return Moment(grids, None, take["age"], take["semitones"], take["time"], mixture)

    # What is seen, heard and taken away

    def state(self):
        """All that the page shows, but for pictures and sounds."""
        self.watch()
        stage, learning = self.stage, self.learning
        state = {
            "server": self.id,
            "version": stage.version if stage else 0,
            "sounds": self.sounds(),
            "sound": None,
            "mixture": None,
            "learning": learning.report() if learning else None,
            "life": None,
            "shape": None,
            "takes": [],
            "message": self.message,
        }
        if stage is None:
            return state
        life, shape = stage.report()
        places = stage.model.automaton.places
        card = stage.model.card
        sound = {
            "name": self.name,
            "note": self.note,
            "has_target": stage.target is not None,
            "pitch_hz": places.pitch_hz if places else None,
            "seconds": round(card.n_frames * HOP_LENGTH / SAMPLE_RATE, 3),
            "n_frames": card.n_frames,
        }
        life |= {"running": self.running, "speed": self.speed}
        mixture = stage.now.mixture and stage.now.mixture.recipe
        return {**state, "sound": sound, "mixture": mixture, "life": life, "shape": shape, "takes": self.takes()}

    def target_picture(self):
        stage = self.open_stage()
        if stage.target is None:
            raise ValueError("the recording of this sound is not here")
        return level_bytes((stage.target.mel_db, stage.target.linear_db)), stage.version, 0, stage.target.n_frames

    def take_picture(self, number):
        stage, moment = self.open_stage(), self.kept(number)
        return level_bytes(stage.model.automaton.levels(moment.grids)), stage.version, moment.age, moment.n_frames

    def _remember(self, key, value):
        self._decoded[key] = value
        while len(self._decoded) > SOUNDS_KEPT:
            self._decoded.popitem(last=False)
        return value

    def samples(self, of="grown", number=None, semitones=0.0):
        """What is heard -> float32 array [n] at 22.05 kHz: "grown", what lives now; "target", the recording;
        "wounded", as it was right after the last wound; "growth", its stages one after the other; "take"."""
        stage = self.open_stage()
        with self._decoding:
            version = stage.version
            if of == "take":
                version = self._take_path(number).stat().st_mtime_ns
            elif of == "wounded" and stage.wounded:
                version = stage.wounded[0]
            key = of, number, float(semitones), None if of == "target" else version
            if key in self._decoded:
                return self._decoded[key]
            if of == "grown":
                samples = stage.heard(semitones=semitones).samples
            elif of == "target":
                if stage.target is None:
                    raise ValueError("the recording of this sound is not here")
                samples, _ = load_audio(self.path / self.name / "target.wav")
            elif of == "wounded":
                if stage.wounded is None:
                    raise ValueError("nothing has been wounded yet")
                samples = stage.heard(stage.wounded[1]).samples
            elif of == "take":
                samples = stage.heard(self.kept(number)).samples
            elif of == "growth":
                samples = in_turn([stage.heard(moment).samples for moment in stage.stages(STAGES)])
            else:
                raise ValueError(f"unknown sound {of!r}: expected grown, target, wounded, growth or take")
            return self._remember(key, samples)

    def export(self, what):
        """(bytes, file name) of the model, a gif or mp4 of the growth, a picture, or the command line as text."""
        stage = self.open_stage()
        if what == "command":
            return self.command().encode(), "command.txt"
        if what == "model" and stage.now.mixture and "glide" in stage.now.mixture.recipe:
            raise ValueError("a glide is many rules, which no model file holds: its command line grows it anywhere")
        suffix = {"model": "safetensors", "gif": "gif", "mp4": "mp4", "picture": "png"}.get(what)
        if suffix is None:
            raise ValueError(f"unknown export {what!r}: expected model, gif, mp4, picture or command")
        folder = self.path / f"{UPLOAD}{secrets.token_hex(8)}"
        folder.mkdir()
        try:
            file = folder / f"{self.name}.{suffix}"
            if what == "model":
                stage.model.save(file)
            elif what == "picture":
                rows = [] if stage.target is None else [("recording", stage.target)]
                now = stage.now
                rows.append(
                    (f"grown, {now.age} steps", stage.model.spectrogram(*stage.model.automaton.levels(now.grids)))
                )
                save_picture(file, rows)
            else:
                moments = stage.stages(96)
                pictures = (growth_picture(stage.model.automaton, moment.age, moment.grids) for moment in moments)
                save_growth(folder / f"{self.name}.gif", pictures)
            if not file.is_file():
                raise ValueError("an mp4 needs ffmpeg; take the gif" if what == "mp4" else f"no {what} could be drawn")
            return file.read_bytes(), file.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def command(self):
        """The commands that learn this sound and grow it in its present shape; of a mixture, in its own shape."""
        stage, folder = self.open_stage(), self.path / self.name
        recipe = stage.now.mixture.recipe if stage.now.mixture else {}
        if "glide" in recipe:
            return shlex.join(["fastnca", "morph", str(folder), *recipe["glide"], "--glide"])
        shares = recipe.get("shares", {})
        if len(shares) > 1:
            words = [f"{name}={share:.4g}" for name, share in shares.items()]
            return shlex.join(["fastnca", "morph", str(folder), *words])
        lines = []
        recording = _recording(folder)
        if recording and self.learning:
            settings = self.learning.growth.settings
            words = ["fastnca", "grow", recording, "-o", folder.name, "--duration", f"{settings.duration:g}"]
            words += ["--minutes", f"{settings.minutes:g}"] if settings.minutes else ["--epochs", settings.epochs]
            lines.append(shlex.join(map(str, words)))
        now = stage.now
        words = ["fastnca", "generate", folder, *(["--sound", *shares] if shares else [])]
        words += ["--frames", now.n_frames, "--steps", now.age, "--time", now.time]
        words += ["--pitch", f"{now.semitones:+g}"] if now.semitones else []
        lines.append(shlex.join(map(str, words)))
        return "\n".join(lines)


def wav_bytes(samples, bits):
    """A WAV file of 16 or 24 bit, or 32 bit float."""
    import soundfile

    subtype = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}.get(bits)
    if subtype is None:
        raise ValueError(f"bits must be 16, 24 or 32 (float), got {bits!r}")
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype=subtype)
    return file.getvalue()


def warm_up():
    """What the first recording needs, imported and compiled while nobody waits."""
    from ..sound.pitch import find_pitch
    from ..training.optim import Soap

    find_pitch(synthesize_bowed_string(duration=0.1))
    Soap([torch.nn.Parameter(torch.zeros(2, 2))], lr=1e-3)


def _mixture(space, shares=None, glide=None):
    """A Mixture of a space, by what somebody else says of it. Raises ValueError for what is none."""
    if glide is not None:
        first, second = glide
        if not (isinstance(first, str) and isinstance(second, str)) or first == second:
            raise ValueError(f"a glide goes from one sound to another, got {first!r} and {second!r}")
        return Mixture({"glide": [first, second]}, space.glide(first, second))
    numbers = shares.values() if isinstance(shares, dict) else [None]
    if any(isinstance(share, bool) or not isinstance(share, (int, float)) for share in numbers):
        raise ValueError("shares must be a number for each of some sounds, by name")
    model = space.mix(shares)
    total = sum(numbers)
    return Mixture({"shares": {name: share / total for name, share in shares.items() if share}}, model)


def _words(recipe):
    """A take's first name, of what it is a mixture of."""
    shares = recipe.get("shares", {})
    parts = [f"{name} {share:.0%}" if len(shares) > 1 else name for name, share in shares.items()]
    return (", ".join(parts) or " to ".join(recipe["glide"]))[:NAME_LENGTH]


def _last_mixture(folder, space):
    """What was last grown from a space, and at first its first sound."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return _mixture(space, **json.loads((folder / MIXTURE).read_bytes()))
    return _mixture(space, {next(iter(space)): 1.0})


def _recording(folder):
    """The file that a sound's folder learns from, or None."""
    return next((path for path in sorted(folder.glob(f"{RECORDING}.*")) if path.is_file()), None)


def has_model(folder):
    """Whether a folder holds one learned sound or a space of them."""
    return any((folder / name).is_file() for name in (MODEL_FILE, SPACE_FILE))


def _take_id(path):
    return int(path.stem) if path.stem.isdigit() else 0


def _safe_name(name):
    """(stem, suffix) for a folder and a file of it, whatever somebody called a file."""
    name = re.split(r"[/\\]", str(name))[-1]
    stem, suffix = os.path.splitext(name)
    stem = re.sub(r"[^\w .+-]", "", stem).strip(" .")[:NAME_LENGTH].strip(" .")
    suffix = re.sub(r"[^a-z0-9.]", "", suffix.lower())[:12]
    return stem or "sound", suffix if len(suffix) > 1 else ".wav"


def _integer(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return value

"""A run: one sound grown in one folder, from the checks before it to the files it leaves."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from . import __version__, audio, backends, metrics, plotting, vocoder
from .files import atomic_write
from .model import decode_db, frame_times, load_model, read_safetensors, save_model, write_safetensors
from .training import Budget, Trainer, TrainingDiverged, find_recipe

CHECKPOINT_FORMAT = "fastnca-checkpoint-4"
CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FILE = "model.safetensors"
LOSSES_FILE = "losses.csv"
RUN_FILES = (
    CHECKPOINT_FILE,
    MODEL_FILE,
    LOSSES_FILE,
    "metrics.json",
    "target.wav",
    "generated.wav",
    "target.png",
    "final.png",
    "progress",
    "tensorboard",
)
DEFAULTS = {
    "recipe": "default",
    "duration": 3.0,
    "seed": 0,
    "vocoder": "auto",
    "bigvgan": None,
    "backend": "auto",
    "precision": "auto",
}
DEFAULT_MINUTES = 10.0
PICTURES = 96  # of a growth, beside the seed


class Run:
    """One growth of ``source`` (the path of a recording, or samples [n] at 22.05 kHz) in the folder ``out``.

    Making one checks everything that can be checked and writes nothing; :meth:`open_folder` and then :meth:`grow` do
    the work. Of the settings, None means the default or, with ``resume``, what the run was started with.

    Args:
        epochs, minutes: the budget of training, whichever ends first; without either, 10 minutes.
        precision: of the training rollouts; "auto" takes bf16 where the processor has tile registers for it (AMX).
        duration: seconds of the recording to use. vocoder, bigvgan: see ``vocoder.resolve_vocoder``.
        resume: go on from the folder's last checkpoint. force: replace a run that the folder holds.
        tensorboard: write the losses for TensorBoard too.

    Raises:
        ValueError, TypeError, OSError: bad input, said in one line. RuntimeError: a backend that cannot run here.
    """

    def __init__(
        self,
        source,
        out,
        *,
        recipe=None,
        epochs=None,
        minutes=None,
        duration=None,
        seed=None,
        vocoder_choice=None,
        bigvgan=None,
        backend=None,
        precision=None,
        checkpoint_every_epochs=10,
        resume=False,
        force=False,
        tensorboard=False,
        console=None,
    ):
        self.console = console or Console(stderr=True)
        self.out = Path(out)
        self.tensorboard = tensorboard
        if checkpoint_every_epochs < 1:
            raise ValueError(f"checkpoint_every_epochs must be at least 1, got {checkpoint_every_epochs}")
        self.checkpoint_every_epochs = checkpoint_every_epochs
        given = {
            "recipe": recipe,
            "duration": duration,
            "seed": seed,
            "vocoder": vocoder_choice,
            "bigvgan": os.path.abspath(bigvgan) if bigvgan and os.path.isdir(bigvgan) else bigvgan,
            "backend": backend,
            "precision": precision,
        }
        given = {name: value for name, value in given.items() if value is not None}
        checkpoint = self._find_checkpoint(resume, force)
        stored = checkpoint[1]["settings"] if checkpoint else {}
        for name in ("recipe", "duration", "seed"):
            if stored and given.get(name, stored[name]) != stored[name]:
                raise ValueError(
                    f"the run in {self.out} was started with {name} {stored[name]!r}, which cannot become "
                    f"{given[name]!r}; resume without it, or start over with --force"
                )
        self.settings = {**DEFAULTS, **stored, **given}
        if epochs is None and minutes is None:
            epochs, minutes = stored.get("epochs"), stored.get("minutes", DEFAULT_MINUTES)
        budget = Budget(epochs, minutes)
        self.settings.update(epochs=epochs, minutes=minutes)

        self.recipe = find_recipe(self.settings["recipe"])
        self.recipe_fields = json.loads(json.dumps(asdict(self.recipe)))  # as a checkpoint holds them
        if stored and checkpoint[1]["recipe"] != self.recipe_fields:
            raise ValueError(
                f"the run in {self.out} was started when recipe {self.settings['recipe']} was another; go on with the "
                "fastnca that started it, or start over with --force"
            )
        device = "cpu" if self.settings["backend"] == "cpu" or not torch.cuda.is_available() else "cuda"
        self.backend = backends.choose_backend(self.settings["backend"], device=device)
        self.precision = self.settings["precision"]
        if self.precision == "auto":
            self.precision = backends.fastest_precision(self.backend)
        backends.choose_backend(self.backend, device=device, precision=self.precision)
        if isinstance(source, (str, os.PathLike)):
            self.samples, info = audio.load_audio(source, self.settings["duration"])
            self.console.print(str(info), highlight=False, soft_wrap=True)
        else:
            self.samples = audio.as_samples(source, minimum=2 * audio.N_FFT)
        self.vocoder = vocoder.resolve_vocoder(self.settings["vocoder"], self.settings["bigvgan"])
        self.target = audio.analyze(self.samples, self.vocoder.config)
        self.fingerprint = hashlib.sha256(
            self.target.mel_db.numpy().tobytes() + self.target.linear_db.numpy().tobytes()
        ).hexdigest()

        self.trainer = Trainer(
            self.target.mel_db,
            self.target.linear_db,
            self.recipe,
            budget,
            seed=self.settings["seed"],
            backend=self.backend,
            precision=self.precision,
            device=device,
        )
        self.losses = []
        if checkpoint:
            self._load_checkpoint(*checkpoint)

    def _find_checkpoint(self, resume, force):
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"{self.out} is a file; the output must be a folder")
        existing = [name for name in RUN_FILES if (self.out / name).exists()]
        if resume:
            if CHECKPOINT_FILE not in existing:
                raise FileNotFoundError(
                    f"nothing to resume in {self.out}: it holds no {CHECKPOINT_FILE}; start without --resume"
                )
            tensors, metadata = read_safetensors(self.out / CHECKPOINT_FILE, CHECKPOINT_FORMAT)
            return tensors, metadata
        if existing and CHECKPOINT_FILE not in existing:
            raise FileExistsError(
                f"{self.out} holds {', '.join(existing[:3])} but no run; remove what a run would overwrite, or choose "
                "another folder with -o"
            )
        if existing and not force:
            raise FileExistsError(
                f"{self.out} already holds a run ({', '.join(existing[:3])}, ...); go on with it by --resume, "
                "replace it by --force, or choose another folder with -o"
            )
        return None

    def _load_checkpoint(self, tensors, state):
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the run in {self.out} was started on another sound or mel convention; give it the same audio file, "
                "vocoder and duration, or start over with --force"
            )
        self.trainer.load_state_dict(tensors, state)
        with contextlib.suppress(FileNotFoundError), open(self.out / LOSSES_FILE, newline="") as file:
            self.losses = [row for row in csv.DictReader(file) if int(row["epoch"]) <= self.trainer.epoch]

    def grow(self):
        """Train to the end of the budget and write all files -> (metrics, whether Ctrl-C ended it early).

        Raises TrainingDiverged, after writing what had been learned, or OSError where a file cannot be written; the
        last checkpoint stays whole.
        """
        if self.vocoder.hint:
            self.console.print(self.vocoder.hint, highlight=False, soft_wrap=True)
        with _stop_on_interrupt() as interrupted:
            try:
                self._train(interrupted)
            except TrainingDiverged:
                if self.trainer.epoch:
                    self._save_model()
                    self._write_results()
                raise
        if interrupted.is_set():
            self.console.print(f"stopped after epoch {self.trainer.epoch}; writing what has grown so far")
        return self._write_results(), interrupted.is_set()

    def open_folder(self):
        """Make the folder, clear it of a run that ``force`` replaces, and write the target and a first checkpoint."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.trainer.epoch == 0:
                for name in reversed(RUN_FILES):  # the checkpoint last: until then it is a run
                    path = self.out / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            (self.out / "progress").mkdir(exist_ok=True)
            self._save()  # first: what holds no checkpoint is not taken for a run
            audio.write_wav(self.out / "target.wav", self.samples)
        except OSError as error:
            raise OSError(f"cannot write to the output folder {self.out}: {error.strerror or error}") from error
        target = ("target", self.target.mel_db, self.target.linear_db)
        plotting.save_picture(self.out / "target.png", [target], self.target.config)

    def _train(self, interrupted):
        trainer = self.trainer
        columns = (BarColumn(12), TextColumn("{task.percentage:3.0f}% {task.description}"))
        writer = self._tensorboard_writer()
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("first epoch", total=1.0, completed=trainer.progress)
            while trainer.progress < 1.0 and not interrupted.is_set():
                setbacks = trainer.setbacks
                row = trainer.train_epoch()
                self.losses.append(row)
                if trainer.setbacks > setbacks:
                    self.console.print(
                        f"epoch {trainer.epoch}: diverged; back to the lowest loss, learning rate halved"
                    )
                left = max(0.0, trainer.seconds * (1.0 / trainer.progress - 1.0))
                errors = f"mel {row['mel_l1_db']:.2f} dB, linear {row['linear_l1_db']:.2f} dB off"
                line = f"epoch {trainer.epoch}: {errors}, {left / 60:.1f} min left"
                bar.update(task, completed=trainer.progress, description=line)
                if writer:
                    for name in ("loss", "mel_l1_db", "linear_l1_db", "learning_rate"):
                        writer.add_scalar(name, row[name], trainer.epoch)
                if trainer.epoch % self.recipe.log_interval == 0:
                    if not self.console.is_terminal:
                        self.console.print(line, highlight=False, soft_wrap=True)
                    self._save_progress_picture()
                if trainer.epoch % self.checkpoint_every_epochs == 0:
                    self._save()
        if writer:
            writer.close()
        self._save()

    def _tensorboard_writer(self):
        if not self.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.out / "tensorboard", purge_step=self.trainer.epoch + 1)

    def _save_progress_picture(self):
        mel_db, linear_db = self.trainer.grown()
        plotting.save_picture(
            self.out / "progress" / f"epoch_{self.trainer.epoch:04d}.png",
            [(f"epoch {self.trainer.epoch}", mel_db, linear_db)],
            self.target.config,
        )

    def _save(self):
        """Write the losses, a usable model and, last, the checkpoint; each file is whole or the one before."""
        text = io.StringIO(newline="")
        if self.losses:
            rows = csv.DictWriter(text, self.losses[0].keys())
            rows.writeheader()
            rows.writerows(self.losses)
        with atomic_write(self.out / LOSSES_FILE) as file:
            file.write(text.getvalue().encode())
        self._save_model()
        tensors, state = self.trainer.state_dict()
        state.update(settings=self.settings, recipe=self.recipe_fields, fingerprint=self.fingerprint)
        write_safetensors(self.out / CHECKPOINT_FILE, tensors, CHECKPOINT_FORMAT, state)

    def _save_model(self):
        sound = {
            "spectrogram": asdict(self.target.config),
            "mel_ref_db": self.target.mel_ref_db,
            "linear_ref_db": self.target.linear_ref_db,
            "n_frames": self.target.n_frames,
            "num_steps": self.recipe.num_steps,
            "vocoder": self.settings["vocoder"],
            "bigvgan": self.settings["bigvgan"],
            "recipe": self.settings["recipe"],
            "epochs": self.trainer.epoch,
        }
        save_model(self.out / MODEL_FILE, self.trainer.model, sound)

    def _write_results(self):
        trainer, target = self.trainer, self.target
        mel_db, linear_db = trainer.grown()
        grown = audio.DualSpectrogram(mel_db, linear_db, target.mel_ref_db, target.linear_ref_db, target.config)
        generated = self.vocoder.decode(grown)
        gain = audio.write_wav(self.out / "generated.wav", generated)
        if gain < 1.0:
            self.console.print(f"generated.wav would have clipped and was made {-20 * math.log10(gain):.1f} dB quieter")
        result = {
            "fastnca": __version__,
            "recipe": self.settings["recipe"],
            "seed": self.settings["seed"],
            "epochs": trainer.epoch,
            "training_seconds": trainer.seconds,
            "seconds_per_epoch": trainer.seconds / max(trainer.epoch, 1),
            "setbacks": trainer.setbacks,
            "backend": trainer.model.backend,
            "precision": trainer.model.precision,
            "vocoder": self.vocoder.name,
            "n_frames": target.n_frames,
            **metrics.grid_metrics(mel_db, linear_db, target),
            **metrics.compare(self.samples, generated * gain),
        }
        with atomic_write(self.out / "metrics.json") as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
        rows = [("target", target.mel_db, target.linear_db), (f"grown, epoch {trainer.epoch}", mel_db, linear_db)]
        plotting.save_picture(self.out / "final.png", rows, target.config)
        return result


@contextlib.contextmanager
def _stop_on_interrupt():
    """An event that the first Ctrl-C sets; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signal_number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def generate(
    run_folder,
    out=None,
    *,
    n_frames=None,
    num_steps=None,
    time="stretch",
    video=False,
    vocoder_choice=None,
    bigvgan=None,
    backend="auto",
    console=None,
):
    """Grow the sound of a finished run again and write it -> (path of the wav, the Vocoder that decoded it).

    A picture of the grown spectrograms lies beside the wav. ``out`` is by default ``generated.wav`` in the run's folder
    or, with other frames or steps than it was trained with, a name that says them. The vocoder is the run's own unless
    another is asked for.

    Args:
        time: what another number of frames does to the sound, "stretch" or "sustain", see ``model.frame_times``.
        video: write the growth too, as an animated GIF beside the wav.

    Raises ValueError, TypeError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"no such folder: {run_folder}; give the folder that fastnca grow wrote")
    device = "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"
    backends.choose_backend(backend, device=device)
    model, sound = load_model(run_folder / MODEL_FILE, backend=backend)
    model.to(device)
    if "spectrogram" not in sound:
        raise ValueError(f"{run_folder / MODEL_FILE} does not say what its grids sound like; grow it with fastnca grow")
    trained = (sound["n_frames"], sound["num_steps"])
    wanted = (trained[0] if n_frames is None else n_frames, trained[1] if num_steps is None else num_steps)
    if wanted[0] < 8:
        raise ValueError(f"frames must be at least 8 (about 0.1 s), got {wanted[0]}")
    if wanted[1] < 0:
        raise ValueError(f"steps must be at least 0, got {wanted[1]}")
    times = frame_times(wanted[0], trained[0], time)
    if time == "sustain" and not any(axis == "t" for _, axis, _ in model.coordinates):
        raise ValueError(f"time cannot sustain in {run_folder}: its recipe, {sound['recipe']}, has no time coordinates")
    if out is None:
        name = "generated" if wanted == trained else f"generated_{wanted[0]}x{wanted[1]}"
        out = run_folder / (f"{name}.wav" if time == "stretch" else f"{name}_{time}.wav")
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}; make it first")
    decoder = vocoder.resolve_vocoder(vocoder_choice or sound["vocoder"], bigvgan or sound["bigvgan"])
    config = audio.SpectrogramConfig(**sound["spectrogram"])
    decoder.check(config)
    if video:
        _save_growth(out.with_suffix(".gif"), model, *wanted, times, config, console or Console(stderr=True))
    mel_db, linear_db = model.grow(*wanted, times)
    grown = audio.DualSpectrogram(mel_db, linear_db, sound["mel_ref_db"], sound["linear_ref_db"], config)
    audio.write_wav(out, decoder.decode(grown))
    plotting.save_picture(out.with_suffix(".png"), [(f"grown, {wanted[1]} steps", mel_db, linear_db)], config)
    return out, decoder


def _save_growth(path, model, n_frames, num_steps, times, config, console):
    """An animated GIF from the seed to ``num_steps``, of no more than PICTURES steps."""
    stride = max(1, math.ceil(num_steps / PICTURES))
    columns = (BarColumn(12), TextColumn("{task.percentage:3.0f}% {task.description}"))

    @torch.no_grad()
    def pictures(advance):
        grids = model.seed(n_frames, times)
        for step in range(0, num_steps + stride, stride):
            step = min(step, num_steps)
            if step > 0:
                grids = model.rollout(*grids, (step - 1) % stride + 1)
            levels = [decode_db(grid)[0].cpu().numpy() for grid in grids]
            alphas = [grid[0, 1].cpu().numpy() for grid in grids]
            yield f"step {step}", *levels, *alphas
            advance()

    with Progress(*columns, console=console) as bar:
        task = bar.add_task(path.name, total=math.ceil(num_steps / stride) + 1)
        plotting.save_growth(path, pictures(lambda: bar.advance(task)), config)

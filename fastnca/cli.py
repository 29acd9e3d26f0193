"""The command line: options, progress, Ctrl-C, and errors in one line."""

import json
import math
import os
import signal
import sys
import threading
import warnings
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer


@contextmanager
def _one_line_errors(exit_code):
    """Ends in one line on stderr and ``exit_code`` instead of a traceback, which FASTNCA_TRACEBACK=1 brings back."""
    try:
        yield
    except Exception as error:
        if os.environ.get("FASTNCA_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, TypeError, OSError, RuntimeError)):
            text = f"{type(error).__name__}: {text}; set FASTNCA_TRACEBACK=1 to see where"
        typer.echo(f"fastnca: {text or type(error).__name__}", err=True)
        raise SystemExit(exit_code) from error


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Teach a neural cellular automaton to grow a sound.",
)

Out = Annotated[Path | None, typer.Option("-o", "--out", help="The folder for everything that the run writes.")]
Epochs = Annotated[int | None, typer.Option(help="End training after this many epochs in all.")]
Minutes = Annotated[float | None, typer.Option(help="End training after this many minutes in all.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Start every random choice from this number: the same seed and epochs repeat a run."),
]
Vocoder = Annotated[
    str | None,
    typer.Option(help="Decode by bigvgan or griffinlim. auto takes BigVGAN where its weights are at hand."),
]
BigVGAN = Annotated[
    str | None, typer.Option(help="Take this BigVGAN: a hub name, or a folder with config.json and the weights.")
]
Backend = Annotated[str | None, typer.Option(help="Compute with this backend: auto, or a name from `fastnca info`.")]
Precision = Annotated[
    str | None,
    typer.Option(help="Train with matrix products in fp32, bf16 or, on a GPU, tf32. auto takes the faster."),
]
Learned = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="The folder of a finished run or a space, or the model file, wherever that is."),
]
Sound = Annotated[str | None, typer.Option(help="Of a space, take the sound of this name.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that the folder holds.")]


@contextmanager
def _ctrl_c_stops(growth):
    """The first Ctrl-C ends training after the present epoch; a second one, or one after training, ends all at once."""

    def stop(signal_number, frame):
        if growth.stopped or growth.trainer.progress >= 1.0:
            raise KeyboardInterrupt
        growth.stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress_bar(console):
    """A function that shows how far something has come: (share done, text)."""
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(12), TextColumn("{task.percentage:3.0f}% {task.description}"), console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)


@contextmanager
def _tensorboard(folder, epoch):
    """A listener that writes every number of an epoch for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    from .growth import EpochDone

    def write(event):
        if isinstance(event, EpochDone):
            for name, value in event.row.items():
                if name not in ("epoch", "seconds"):
                    writer.add_scalar(name, value, event.row["epoch"])

    with SummaryWriter(folder / "tensorboard", purge_step=epoch + 1) as writer:
        yield write


class _Terminal:
    """A listener that tells the user what a growth does."""

    def __init__(self, console, show_progress):
        self.console = console
        self.show_progress = show_progress
        self.line = ""

    def print(self, text):
        self.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def __call__(self, event):
        from .growth import EpochDone, PictureDue, Setback, SoundGrown, TrainingDone

        if isinstance(event, EpochDone):
            row = event.row
            errors = f"mel {row['mel_l1_db']:.2f} dB, linear {row['linear_l1_db']:.2f} dB off"
            self.line = f"epoch {row['epoch']}: {errors}, {event.seconds_left / 60:.1f} min left"
            self.show_progress(event.progress, self.line)
        elif isinstance(event, Setback):
            self.print(f"epoch {event.epoch}: diverged; back to the lowest loss, learning rate halved")
        elif isinstance(event, PictureDue) and not self.console.is_terminal:
            self.print(self.line)
        elif isinstance(event, TrainingDone) and event.stopped:
            self.print(f"stopped after epoch {event.epoch}; writing what has grown so far")
        elif isinstance(event, SoundGrown):
            self.show_progress(event.done / event.total, f"growing {event.name}")


def _train(training, folder, console, lines, tensorboard=False):
    """Takes the events of a growth or a learning to their end -> the result."""
    with ExitStack() as stack:
        stack.enter_context(_ctrl_c_stops(training))
        terminal = _Terminal(console, stack.enter_context(_progress_bar(console)))
        listeners = [terminal]
        if tensorboard:
            listeners.append(stack.enter_context(_tensorboard(folder.path, training.trainer.epoch)))
        for line in lines:
            if line:
                terminal.print(str(line))
        terminal.show_progress(training.trainer.progress, "first epoch")
        for event in stack.enter_context(closing(folder.record(training))):
            for listener in listeners:
                listener(event)
    return event.result


def _grow(audio, out, tensorboard=False, **options):
    from rich.console import Console

    from .run import prepare

    console = Console(stderr=True)
    with _one_line_errors(2):
        growth, folder = prepare(audio, out, **options)
    with _one_line_errors(1):
        sound = _train(growth, folder, console, (growth.source, growth.vocoder.hint), tensorboard)
    if sound.gain < 1.0:
        quieter = -20 * math.log10(sound.gain)
        typer.echo(f"generated.wav would have clipped and was made {quieter:.1f} dB quieter", err=True)
    result = sound.metrics
    typer.echo(
        f"{folder.path}: {result['epochs']} epochs at {result['seconds_per_epoch']:.2f} s "
        f"({result['backend']} {result['precision']}), "
        f"mel {result['mel_l1_db']:.1f} dB and linear {result['linear_l1_db']:.1f} dB from the target, "
        f"decoded by {result['vocoder']}"
    )
    if growth.stopped:
        raise typer.Exit(130)


def _default_folder(audio):
    name = f"fastnca-{audio.stem}"
    while len(os.fsencode(name)) > 255:  # the longest name that a file system takes
        name = name[:-1]
    return Path(name)


@app.command()
def grow(
    audio: Annotated[Path, typer.Argument(help="The recording to grow: any file that soundfile or librosa reads.")],
    out: Out = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    recipe: Annotated[str | None, typer.Option(help="Learn by this recipe: default or notebook.")] = None,
    duration: Annotated[
        float | None, typer.Option(help="Use this many seconds of the recording; 3 by default.")
    ] = None,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = None,
    precision: Precision = None,
    checkpoint_every_epochs: Annotated[int, typer.Option(help="Save a checkpoint every so many epochs.")] = 100,
    seed: Seed = None,
    pitch_of_recording: Annotated[
        str | None,
        typer.Option(help="Say the recording's pitch (A4, 440hz) or none, where the tracker that auto asks is wrong."),
    ] = None,
    resume: Resume = False,
    force: Force = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the losses for TensorBoard too.")] = False,
):
    """Teach one automaton to grow AUDIO, and write what it grows.

    Without --epochs or --minutes it trains for 10 minutes. Ctrl-C ends it early with a usable model.
    """
    _grow(
        audio,
        out or _default_folder(audio),
        tensorboard=tensorboard,
        epochs=epochs,
        minutes=minutes,
        recipe=recipe,
        duration=duration,
        vocoder=vocoder,
        bigvgan=bigvgan,
        backend=backend,
        precision=precision,
        checkpoint_every_epochs=checkpoint_every_epochs,
        seed=seed,
        pitch=pitch_of_recording,
        resume=resume,
        force=force,
    )


@app.command()
def learn(
    sounds: Annotated[
        list[Path] | None, typer.Argument(metavar="SOUND...", help="Recordings, and folders of recordings.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the space.")] = Path("fastnca-space"),
    epochs: Epochs = None,
    minutes: Annotated[
        float | None, typer.Option(help="End training after this many minutes in all; 4 for each sound by default.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Use this many seconds of each recording; 3 by default.")
    ] = None,
    instruments: Annotated[
        bool | None,
        typer.Option(
            "--instruments", help="Take each folder for one instrument: its notes differ by their pitch alone."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Learn from so many sounds in one epoch; one for each process by default.")
    ] = None,
    pitch: Annotated[
        str | None, typer.Option(help="auto finds the pitch of each recording; none learns all of them without.")
    ] = None,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = None,
    precision: Precision = None,
    checkpoint_every_epochs: Annotated[int, typer.Option(help="Save a checkpoint every so many epochs.")] = 1000,
    seed: Seed = None,
    resume: Resume = False,
    force: Force = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the losses for TensorBoard too.")] = False,
):
    """Teach one automaton to grow many sounds, each told apart by a code, and all that lies between them.

    Started by torchrun, its processes share the work.
    """
    from rich.console import Console

    from .learning import job, prepare

    with job() as (rank, processes):
        console = Console(stderr=True, quiet=rank > 0)
        with _one_line_errors(2), _progress_bar(console) as show:
            learning, folder = prepare(
                sounds or (),
                out,
                epochs=epochs,
                minutes=minutes,
                duration=duration,
                instruments=instruments,
                batch=batch,
                pitch=pitch,
                vocoder=vocoder,
                bigvgan=bigvgan,
                backend=backend,
                precision=precision,
                checkpoint_every_epochs=checkpoint_every_epochs,
                seed=seed,
                resume=resume,
                force=force,
                rank=rank,
                processes=processes,
                on_read=lambda done, total: show(done / total, f"reading {done + 1} of {total}"),
            )
        lines = [f"left out: {reason}" for reason in learning.left_out.values()]
        lines.append(f"{len(learning.names)} sounds, {sum(1 for pitch in learning.pitches_hz if pitch)} with a pitch")
        with _one_line_errors(1):
            _train(learning, folder, console, [*lines, learning.vocoder.hint], tensorboard and rank == 0)
        if rank == 0:
            report = learning.report()
            errors = [f"{name} {report[f'median_{name}_l1_db']:.1f} dB" for name in ("mel", "linear")]
            typer.echo(
                f"{out}: {report['epochs']} epochs at {report['seconds_per_epoch']:.2f} s ({report['backend']} "
                f"{report['precision']}), {len(learning.names)} sounds, {' and '.join(errors)} from their targets in "
                f"the median, decoded by {report['vocoder']}"
            )
        if learning.stopped:
            raise typer.Exit(130)


@app.command()
def demo(
    out: Out = Path("fastnca-demo"),
    epochs: Epochs = None,
    minutes: Minutes = None,
    backend: Backend = None,
    seed: Seed = None,
    resume: Resume = False,
    force: Force = False,
):
    """Grow a built-in bowed string for 2 minutes: no file and no network needed."""
    from .sound.synthetic import synthesize_bowed_string

    if epochs is None and minutes is None and not resume:
        minutes = 2.0
    _grow(
        synthesize_bowed_string(duration=1.0),
        out,
        epochs=epochs,
        minutes=minutes,
        vocoder="griffinlim",
        backend=backend,
        seed=seed,
        resume=resume,
        force=force,
    )


@app.command()
def generate(
    path: Learned,
    sound: Sound = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write this wav file.")] = None,
    frames: Annotated[int | None, typer.Option(help="Grow this many time frames, 256 samples each.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Grow for this many steps; by default until the sound is full and settled.")
    ] = None,
    time: Annotated[
        str,
        typer.Option(help="Choose what other --frames do: stretch changes the pace, sustain holds the sound's middle."),
    ] = "stretch",
    pitch: Annotated[
        str | None,
        typer.Option(help="Grow at another pitch: a note (E4), semitones (+3, -2) or a frequency (330hz)."),
    ] = None,
    seeds_every: Annotated[
        int | None, typer.Option(help="Begin with live cells this far apart instead of one in the middle.")
    ] = None,
    video: Annotated[
        bool, typer.Option("--video", help="Write the growth as an animated GIF too, with ffmpeg also as an MP4.")
    ] = False,
    hear_growth: Annotated[
        bool, typer.Option("--hear-growth", help="Write a sound that plays the stages of the growth too.")
    ] = False,
    wound: Annotated[
        str | None,
        typer.Option(help="Erase a box, SECONDS-SECONDS,HZ-HZ, of the grown sound; write it wounded and healed too."),
    ] = None,
    heal: Annotated[int, typer.Option(help="Let the wound heal for this many steps.")] = 96,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = "auto",
):
    """Grow the sound of a finished run again, at any length and pitch, and write it."""
    from rich.console import Console

    from .generate import generate as write_generated

    console = Console(stderr=True)
    with _one_line_errors(2), _progress_bar(console) as show:
        written, grown = write_generated(
            path,
            out,
            sound=sound,
            n_frames=frames,
            num_steps=steps,
            time=time,
            pitch=pitch,
            seeds_every=seeds_every,
            video=video,
            hear_growth=hear_growth,
            wound=wound,
            heal=heal,
            vocoder=vocoder,
            bigvgan=bigvgan,
            backend=backend,
            on_step=lambda done, total: show(done / total, f"step {done} of {total}"),
        )
    if grown.model.vocoder.hint:
        typer.echo(grown.model.vocoder.hint, err=True)
    typer.echo(f"{written[0]}: decoded by {grown.model.vocoder.name}")
    for path in written[1:]:
        typer.echo(str(path))


@app.command()
def add(
    path: Annotated[Path, typer.Argument(metavar="SPACE", help="The folder of a space, or the file in it.")],
    recording: Annotated[Path, typer.Argument(metavar="SOUND", help="The recording to add.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the space to this file instead.")] = None,
    name: Annotated[str | None, typer.Option(help="Call the sound so; after its file by default.")] = None,
    minutes: Annotated[float, typer.Option(help="Learn its code for this many minutes.")] = 0.5,
    tune: Annotated[
        float | None, typer.Option(help="Then tune the rule for so many minutes, with the other sounds held.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Use this many seconds of the recording.")] = 3.0,
    pitch_of_recording: Annotated[
        str, typer.Option(help="Say the recording's pitch (A4, 440hz) or none, where the tracker that auto asks errs.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Start every random choice from this number.")] = 0,
    backend: Backend = "auto",
    precision: Precision = "auto",
):
    """Add a sound to a space by its code alone: the rule and all other sounds stay as they are."""
    from rich.console import Console

    from .add import add as add_sound

    with _one_line_errors(2), _progress_bar(Console(stderr=True)) as show:
        space, name, by_code = add_sound(
            path,
            recording,
            out,
            name=name,
            minutes=minutes,
            tune=tune,
            duration=duration,
            pitch=pitch_of_recording,
            seed=seed,
            backend=backend,
            precision=precision,
            on_progress=show,
        )

    def errors(metrics):
        return f"mel {metrics['mel_l1_db']:.1f} dB and linear {metrics['linear_l1_db']:.1f} dB from the recording"

    typer.echo(f"{name}: by its code alone {errors(by_code)}")
    if tune is not None:
        typer.echo(f"{name}: with the rule tuned {errors(space.members[name].metrics)}")
        moved = [member.metrics["mel_moved_db"] for other, member in space.members.items() if other != name]
        typer.echo(f"the other sounds have moved by {sum(moved) / len(moved):.1f} dB of mel on average")
    typer.echo(f"hear it by: fastnca generate {out or path} --sound {name}")


@app.command()
def morph(
    path: Annotated[Path, typer.Argument(metavar="SPACE", help="The folder of a space, or the file in it.")],
    sounds: Annotated[
        list[str], typer.Argument(metavar="A B", help="Two of its sounds, or shares of any number: A=0.5 B=0.3 C=0.2.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write this wav file.")] = None,
    amount: Annotated[float | None, typer.Option(help="How much of B, from 0 to 1; half by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Write so many sounds instead, from A to B.")] = None,
    glide: Annotated[
        bool, typer.Option("--glide", help="Write one sound that is A at its beginning and B at its end.")
    ] = False,
    graft: Annotated[
        str | None, typer.Option(help="Write A, of which a box, SECONDS-SECONDS,HZ-HZ, lives by the code of B.")
    ] = None,
    become: Annotated[
        int | None,
        typer.Option(help="Write the stages of an A that is handed the code of B and lives on for so many steps."),
    ] = None,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = "auto",
):
    """Grow what lies between the sounds of a space, and write it."""
    from rich.console import Console

    from .morph import morph as write_morph

    with _one_line_errors(2), _progress_bar(Console(stderr=True)) as show:
        written, grown = write_morph(
            path,
            sounds,
            out,
            amount=amount,
            steps=steps,
            glide=glide,
            graft=graft,
            become=become,
            vocoder=vocoder,
            bigvgan=bigvgan,
            backend=backend,
            on_step=lambda done, total: show(done / total, f"{done} of {total} grown"),
        )
    for wav in written:
        typer.echo(str(wav))
    typer.echo(f"decoded by {grown[0].model.vocoder.name}", err=True)


@app.command()
def play(
    path: Learned,
    midi: Annotated[Path, typer.Argument(metavar="NOTES.mid", help="The MIDI file to play.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write this wav file.")] = None,
    sound: Sound = None,
    to: Annotated[
        str | None, typer.Option(help="Of a space, end the piece with this sound: --sound becomes it note by note.")
    ] = None,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = "auto",
):
    """Play a MIDI file by a learned sound with a pitch, or by an instrument of a space."""
    from rich.console import Console

    from .play import play as write_played

    with _one_line_errors(2), _progress_bar(Console(stderr=True)) as show:
        wav, samples, count = write_played(
            path,
            midi,
            out,
            sound=sound,
            to=to,
            vocoder=vocoder,
            bigvgan=bigvgan,
            backend=backend,
            on_note=lambda done, total: show(done / total, f"note {done + 1} of {total} different ones"),
        )
    from .sound.convention import SAMPLE_RATE

    typer.echo(f"{wav}: {count} notes, {len(samples) / SAMPLE_RATE:.1f} s")


@app.command()
def life(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a finished run, or its model file, wherever that is.")
    ],
    target: Annotated[
        Path | None, typer.Option(help="Compare with this recording instead of target.wav beside the model file.")
    ] = None,
    until: Annotated[
        int, typer.Option(help="Leave out ages beyond this many steps; 1000 is ten times as fast as 10000.")
    ] = 10_000,
    backend: Backend = "auto",
):
    """Tell how alive a learned sound is: whether it grows from one cell, stays, and heals.

    Writes life.json and life.png beside the model file. 10,000 steps can take many minutes on a CPU.
    """
    import time

    from rich.console import Console

    from .life import examine

    start = time.monotonic()
    with _one_line_errors(2), _progress_bar(Console(stderr=True)) as show:

        def on_progress(share, text):
            minutes_left = (time.monotonic() - start) * (1.0 / share - 1.0) / 60
            show(share, f"{text}, {minutes_left:.1f} min left")

        measured, written = examine(path, target, until=until, backend=backend, on_progress=on_progress)
    console = Console(highlight=False)
    for part in _life_report(measured):
        console.print(part)
    typer.echo(f"written: {', '.join(map(str, written))}")


def _life_report(life):
    """What is told of a Life, in parts: text, a table of errors by age, text, and a table of wounds."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .life import PATIENCE

    def table(*columns):
        made = Table(box=SIMPLE_HEAD)
        for name in columns:
            made.add_column(name, justify="right" if name[0].isdigit() or "dB" in name else "left")
        return made

    def decibel(*errors):
        return ["-" if error is None else f"{error:.2f}" for error in errors]

    full, least = life.one_seed_steps_to_full, life.least_steps_to_full
    if full is None:
        growth = f"From one cell life has not filled both grids in {PATIENCE * least} steps"
    else:
        growth = f"From one cell life fills both grids in {full} steps; {least} is the least possible"
    ages = table("age", "mel, dB", "linear, dB")
    rows = [(age, f"{age} steps", life.mel_l1_db_at[age], life.linear_l1_db_at[age]) for age in life.mel_l1_db_at]
    if full is not None:
        rows.append((full, f"{full} steps, just full", life.one_seed_mel_l1_db, life.one_seed_linear_l1_db))
    for _, name, *errors in sorted(rows, key=lambda row: row[:2]):
        ages.add_row(name, *decibel(*errors))

    since = list(life.wounds[0]["mel_healed"])
    healing = f"Wounds at the age of {life.wounded_at} steps: errors in dB after so many steps"
    wounds = table("wound", "grid", "0", *map(str, since))
    for grid in ("mel", "linear"):
        twin = life.wounds[0]
        wounds.add_row("none", grid, *decibel(twin[f"{grid}_before"], *twin[f"{grid}_twin"].values()))
        for row in life.wounds:
            errors = row[f"{grid}_wounded"], *row[f"{grid}_healed"].values()
            name = f"{row['kind']}, {100 * row['share']:.0f} %"
            wounds.add_row(name, grid, *decibel(*errors), end_section=row is life.wounds[-1])
    return growth, ages, healing, wounds


@app.command()
def studio(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[AUDIO|DIR]", help="A recording to begin with, a finished run, a space, or a studio's folder."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder that keeps everything.")] = Path(
        "fastnca-studio"
    ),
    port: Annotated[int | None, typer.Option(help="Listen at this port; by default 8765, or any that is free.")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    host: Annotated[
        str,
        typer.Option(help="Listen at this address of the machine, so that others can come in: those with the token."),
    ] = "127.0.0.1",
    minutes: Annotated[float, typer.Option(help="Learn a new sound for this many minutes.")] = 10.0,
    duration: Annotated[float, typer.Option(help="Use this many seconds of a recording.")] = 3.0,
    vocoder: Vocoder = None,
    backend: Backend = "auto",
):
    """Open a page in the browser on which a sound lives: hear it grow while it learns, wound it and hear it heal."""
    with _one_line_errors(2):
        try:
            from .studio.server import open_studio
        except ModuleNotFoundError as error:
            raise RuntimeError(f"the studio needs {error.name}: pip install 'fastnca[studio]'") from error
        open_studio(
            path,
            out,
            host=host,
            port=port,
            open_browser=not no_browser,
            say=typer.echo,
            minutes=minutes,
            duration=duration,
            vocoder=vocoder,
            backend=backend,
        )


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(metavar="REF.wav", help="The recording to compare with.")],
    generated: Annotated[Path, typer.Argument(metavar="GEN.wav", help="The sound to judge.")],
):
    """Print how far one recording is from another, as JSON."""
    from .sound.convention import SAMPLE_RATE
    from .sound.files import load_audio
    from .sound.metrics import compare as distances

    with _one_line_errors(2):
        sound, sound_info = load_audio(generated)
        target, target_info = load_audio(reference, duration=len(sound) / SAMPLE_RATE)
        result = distances(target / target_info.gain, sound / sound_info.gain)  # at the levels of the files
    for info in (target_info, sound_info):
        if info.notes:
            typer.echo(f"{info.name}: {'; '.join(info.notes)}", err=True)
    typer.echo(json.dumps(result, indent=2))


@app.command()
def info():
    """Show versions, devices, and which backends can run here, and why the others cannot."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .automaton import backends
    from .version import __version__

    typer.echo(f"fastnca {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy", "librosa", "soundfile", "bigvgan", "auraloss", "huggingface_hub"):
        try:
            typer.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"  {package}: not installed")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        name = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
        chosen = backends.choose_backend(device=device)
        typer.echo(f"{device} ({name}): auto takes {chosen}")
        for backend in backends.BACKENDS:
            reason = backends.why_not(backend, device=device)
            typer.echo(f"  {backend}: {'can run' if reason is None else 'cannot run: ' + reason}")
        typer.echo(f"  grow trains in {backends.fastest_precision(chosen)}")


def main():
    warnings.formatwarning = lambda message, *_: f"fastnca: {' '.join(str(message).split())}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    with _one_line_errors(1):
        app()


if __name__ == "__main__":
    sys.exit(main())

"""The command line."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Grow a sound from one seed cell with a neural cellular automaton.",
)

Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder for everything the run writes.")]
Epochs = Annotated[int | None, typer.Option(help="End after this many epochs in all.")]
Minutes = Annotated[float | None, typer.Option(help="End after this many minutes of training in all.")]
Seed = Annotated[int | None, typer.Option(help="Of every random choice; the same seed and epochs repeat a run.")]
Vocoder = Annotated[
    str | None,
    typer.Option(help="auto, bigvgan or griffinlim. auto takes BigVGAN where its weights are at hand."),
]
BigVGAN = Annotated[str | None, typer.Option(help="A hub name or a folder with config.json and the weights.")]
Backend = Annotated[str | None, typer.Option(help="auto, or a name from `fastnca info`.")]
Precision = Annotated[
    str | None,
    typer.Option(help="Of the training's matrix products: fp32, bf16, or auto, which takes the faster."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that the folder holds.")]


@contextmanager
def _one_line_errors(exit_code):
    """Ends in one line on stderr and ``exit_code`` instead of a traceback, for what the user or the machine did."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        typer.echo(f"fastnca: {text or type(error).__name__}", err=True)
        raise typer.Exit(exit_code) from error


def _grow(source, out, **options):
    from .run import Run

    with _one_line_errors(2):
        run = Run(source, out, **options)
        run.open_folder()
    with _one_line_errors(1):
        result, interrupted = run.grow()
    typer.echo(
        f"{run.out}: {result['epochs']} epochs at {result['seconds_per_epoch']:.2f} s "
        f"({result['backend']} {result['precision']}), "
        f"mel {result['mel_l1_db']:.1f} dB and linear {result['linear_l1_db']:.1f} dB from the target, "
        f"decoded by {result['vocoder']}"
    )
    if interrupted:
        raise typer.Exit(130)


@app.command()
def grow(
    audio: Annotated[Path, typer.Argument(help="The recording to grow: any file that soundfile or librosa reads.")],
    out: Out = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    recipe: Annotated[str | None, typer.Option(help="default, regenerate or notebook.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of the recording to use; 3 if not given.")] = None,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = None,
    precision: Precision = None,
    checkpoint_every_epochs: Annotated[int, typer.Option(help="Epochs between checkpoints.")] = 10,
    seed: Seed = None,
    resume: Resume = False,
    force: Force = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the losses for TensorBoard too.")] = False,
):
    """Teach one automaton to grow AUDIO, and write what it grows.

    Without --epochs or --minutes it trains for 10 minutes. Ctrl-C ends it early with a usable model.
    """
    _grow(
        audio,
        out or Path(f"fastnca-{audio.stem}"),
        epochs=epochs,
        minutes=minutes,
        recipe=recipe,
        duration=duration,
        vocoder_choice=vocoder,
        bigvgan=bigvgan,
        backend=backend,
        precision=precision,
        checkpoint_every_epochs=checkpoint_every_epochs,
        seed=seed,
        resume=resume,
        force=force,
        tensorboard=tensorboard,
    )


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
    """Grow a built-in bowed string for 3 minutes: no file and no network needed."""
    from .audio import synthesize_bowed_string

    if epochs is None and minutes is None and not resume:
        minutes = 3.0
    _grow(
        synthesize_bowed_string(duration=1.0),
        out,
        epochs=epochs,
        minutes=minutes,
        vocoder_choice="griffinlim",
        backend=backend,
        seed=seed,
        resume=resume,
        force=force,
    )


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The wav file to write.")] = None,
    frames: Annotated[int | None, typer.Option(help="Time frames to grow, 256 samples each.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to grow for.")] = None,
    time: Annotated[
        str,
        typer.Option(help="What other --frames do: stretch changes the pace, sustain holds the middle of the sound."),
    ] = "stretch",
    video: Annotated[bool, typer.Option("--video", help="Write the growth as an animated GIF too.")] = False,
    vocoder: Vocoder = None,
    bigvgan: BigVGAN = None,
    backend: Backend = "auto",
):
    """Grow the sound of a finished run again, at any length, and write it."""
    from .run import generate as generate_run

    with _one_line_errors(2):
        path, decoder = generate_run(
            run,
            out,
            n_frames=frames,
            num_steps=steps,
            time=time,
            video=video,
            vocoder_choice=vocoder,
            bigvgan=bigvgan,
            backend=backend,
        )
    if decoder.hint:
        typer.echo(decoder.hint, err=True)
    typer.echo(f"{path}: decoded by {decoder.name}")


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(metavar="REF.wav")],
    generated: Annotated[Path, typer.Argument(metavar="GEN.wav")],
):
    """Print how far one recording is from another, as JSON."""
    from . import audio, metrics

    with _one_line_errors(2):
        sound, _ = audio.load_audio(generated)
        target, _ = audio.load_audio(reference, duration=len(sound) / audio.SAMPLE_RATE)
        result = metrics.compare(target, sound)
    typer.echo(json.dumps(result, indent=2))


@app.command()
def info():
    """Show versions, devices, and which backends can run here, and why the others cannot."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from . import __version__, backends

    typer.echo(f"fastnca {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy", "librosa", "soundfile", "bigvgan", "auraloss", "huggingface_hub"):
        try:
            typer.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"  {package}: not installed")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        name = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
        typer.echo(f"{device} ({name}): auto takes {backends.choose_backend(device=device)}")
        for backend in backends.BACKENDS:
            reason = backends.why_not(backend, device=device)
            typer.echo(f"  {backend}: {'can run' if reason is None else 'cannot run: ' + reason}")
        typer.echo(f"  grow trains in {backends.fastest_precision(backends.choose_backend(device=device))}")


def main():
    app()


if __name__ == "__main__":
    sys.exit(main())

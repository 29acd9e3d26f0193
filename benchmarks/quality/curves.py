"""Training curves: ``python -m benchmarks.quality.curves [SOUND] -o DIR`` trains a sound on each backend and overlays
the losses.

All runs start from the same weights. Training is chaotic: a change in the last bit grows until two runs follow
different paths of the same quality. So the reference can run a second time (``--control``) from weights that were each
moved by one unit in the last place, and its distance from itself is the yardstick for the others.

Written to DIR: ``curves.png``; ``curves.csv``, a row for each epoch with the loss of every run; ``curves.md``, for each
run the final loss (mean over the last tenth of the epochs), also over the reference's; the largest relative distance
between the smoothed curves (running mean over a twentieth of the epochs); and how many epochs agree with the reference
to 1 % before the first that does not.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from fastnca.automaton import backends
from fastnca.files import atomic_write
from fastnca.sound.spectrogram import analyze
from fastnca.training.trainer import Budget, Trainer

from .. import report
from .recipes import read_recipe
from .sounds import load

RUNS = {
    "reference": ("reference", "fp32"),
    "cpu fp32": ("cpu", "fp32"),
    "cpu bf16": ("cpu", "bf16"),
}
CONTROL = "reference, 1 ulp off"
COLUMNS = {
    "run": ("run", None),
    "final_loss": ("final loss", "{:.3f}"),
    "final_loss_ratio": ("of the reference's", "{:.3f}"),
    "max_deviation": ("largest deviation", "{:.1%}"),
    "epochs_within_1_percent": ("epochs within 1 %", None),
}


def train(target, recipe, epochs, backend, precision, nudge=False, device="cpu"):
    """Losses [epochs] of a run that learns ``target``, a DualSpectrogram; ``nudge`` moves the weights by one ulp."""
    trainer = Trainer([target], recipe, Budget(epochs=epochs), backend=backend, precision=precision, device=device)
    if nudge:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
                parameter.copy_(torch.nextafter(parameter, signs * torch.inf))
    losses = []
    for epoch in range(epochs):
        losses.append(trainer.train_epoch()["loss"])
        if sys.stderr.isatty():
            print(f"\r{backend} {precision}: epoch {epoch + 1} of {epochs}", end="", file=sys.stderr, flush=True)
    return np.array(losses)


def smooth(losses):
    width = max(1, len(losses) // 20)
    return np.convolve(losses, np.full(width, 1.0 / width), mode="valid")


def compare(losses, expected):
    """How far losses [epochs] are from the reference's, see the top of this file."""
    tail = max(1, len(losses) // 10)
    apart = np.abs(losses / expected - 1.0) > 0.01
    return {
        "final_loss": float(losses[-tail:].mean()),
        "final_loss_ratio": float(losses[-tail:].mean() / expected[-tail:].mean()),
        "max_deviation": float(np.abs(smooth(losses) / smooth(expected) - 1.0).max()),
        "epochs_within_1_percent": int(np.argmax(apart)) if apart.any() else len(losses),
    }


def plot(curves, path):
    """Write a PNG of curves, {run: losses [epochs]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(np.arange(1, len(losses) + 1), losses, label=name, linewidth=1)
    axes.set(xlabel="epoch", ylabel="loss (dB)", yscale="log")
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main(arguments=None):
    """-> a row for each run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.curves", description=__doc__.split("\n\n")[0])
    parser.add_argument("sound", nargs="?", default="bowed", help="a recording, or a synthesized sound as of recipes")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--duration", type=float, default=1.0, help="seconds of sound")
    parser.add_argument("--recipe", type=read_recipe, default="default", help="with changed fields as of recipes")
    parser.add_argument("--control", action="store_true", help="train the reference twice, see above")
    options = parser.parse_args(arguments)
    name, samples = load(options.sound, options.duration)
    target = analyze(samples)

    learned = f"{name}, {target.n_frames} frames, {options.epochs} epochs of the recipe `{options.recipe.name}`"
    about = [f"{report.machine_line(report.machine())}. {learned}."]
    curves = {}
    for run, (backend, precision) in RUNS.items():
        reason = backends.why_not(backend, precision=precision)
        if reason:
            about.append(f"{run} left out: {reason}.")
        else:
            curves[run] = train(target, options.recipe, options.epochs, backend, precision)
    if options.control:
        curves[CONTROL] = train(target, options.recipe, options.epochs, *RUNS["reference"], nudge=True)
    rows = [{"run": run, **compare(losses, curves["reference"])} for run, losses in curves.items()]
    text = "\n\n".join([*about, report.table(rows, COLUMNS)]) + "\n"
    epochs = [dict(zip(("epoch", *curves), epoch)) for epoch in zip(range(1, options.epochs + 1), *curves.values())]
    report.write(options.out, "curves", text, epochs)
    plot(curves, options.out / "curves.png")
    print(text)
    return rows


if __name__ == "__main__":
    main()

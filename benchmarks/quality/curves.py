"""Training curves: ``python -m benchmarks.curves [WAV] -o DIR`` trains a sound on each backend and overlays the losses.

All runs start from the same weights. Training is chaotic: a change in the last bit grows until two runs follow
different paths of the same quality. So the reference can run a second time (``--control``) from weights that were each
moved by one unit in the last place, and its distance from itself is the yardstick for the others.

Reported per run, and written to curves.json and curves.png: the final loss (mean over the last tenth of the epochs)
over the reference's; the largest relative distance between the smoothed curves (running mean over a twentieth of the
epochs); and how many epochs agree with the reference to 1 %.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from fastnca import audio, backends
from fastnca.training import RECIPES, Budget, Trainer

RUNS = {
    "reference": ("reference", "fp32"),
    "cpu fp32": ("cpu", "fp32"),
    "cpu bf16": ("cpu", "bf16"),
}
CONTROL = "reference, 1 ulp off"


def train(target, frames, recipe, epochs, backend, precision, nudge=False, device="cpu"):
    """Losses [epochs] of a run."""
    grids = [grid[:, :frames] for grid in (target.mel_db, target.linear_db)]
    trainer = Trainer(*grids, recipe, Budget(epochs=epochs), backend=backend, precision=precision, device=device)
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
    """What the module's docstring says is reported."""
    tail = max(1, len(losses) // 10)
    apart = np.abs(losses / expected - 1.0) > 0.01
    return {
        "final_loss": float(losses[-tail:].mean()),
        "final_loss_ratio": float(losses[-tail:].mean() / expected[-tail:].mean()),
        "max_deviation": float(np.abs(smooth(losses) / smooth(expected) - 1.0).max()),
        "epochs_within_1_percent": int(np.argmax(apart)) if apart.any() else len(losses),
    }


def plot(curves, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(np.arange(1, len(losses) + 1), losses, label=name, linewidth=1)
    axes.set(xlabel="epoch", ylabel="loss (dB)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.split("\n")[0])
    parser.add_argument("wav", nargs="?", type=Path, help="a recording; a built-in bowed string if none")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for curves.json and curves.png")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--duration", type=float, default=1.0, help="seconds of sound")
    parser.add_argument("--frames", type=int, help="use only the first frames")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--control", action="store_true", help="train the reference twice, see above")
    options = parser.parse_args(arguments)

    if options.wav:
        samples, _ = audio.load_audio(options.wav, options.duration)
    else:
        samples = audio.synthesize_bowed_string(duration=options.duration)
    target = audio.analyze(samples)

    runs = {name: (*run, False) for name, run in RUNS.items()}
    if options.control:
        runs[CONTROL] = ("reference", "fp32", True)
    curves, skipped = {}, {}
    for name, (backend, precision, nudge) in runs.items():
        reason = backends.why_not(backend, precision=precision)
        if reason:
            skipped[name] = reason
            print(f"{name} left out: {reason}", file=sys.stderr)
            continue
        recipe = RECIPES[options.recipe]
        curves[name] = train(target, options.frames, recipe, options.epochs, backend, precision, nudge)
    results = {name: compare(losses, curves["reference"]) for name, losses in curves.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    plot(curves, options.out / "curves.png")
    report = {
        "epochs": options.epochs,
        "sound": str(options.wav.name if options.wav else "built-in bowed string"),
        "results": results,
        "skipped": skipped,
        "losses": {name: losses.tolist() for name, losses in curves.items()},
    }
    (options.out / "curves.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        print(
            f"{name}: final loss {result['final_loss']:.3f}, {result['final_loss_ratio']:.3f} of the reference's, "
            f"largest deviation {result['max_deviation']:.1%}, "
            f"{result['epochs_within_1_percent']} epochs within 1 %"
        )
    return results


if __name__ == "__main__":
    main()

"""Recipes compared: ``python -m benchmarks.quality.recipes SOUND... -o DIR`` grows each sound by each recipe and seed.

A sound is a recording or the name of a synthesized one: bowed, percussion, chord, voice, noise. A recipe is a name,
with changed fields after it where wanted: ``default,linear_weight=3,num_steps=64``. Every run is one of ``fastnca
grow`` in a folder of its own, so that a comparison that was interrupted goes on where it stopped, and finished runs are
kept.

Written to DIR: ``recipes.csv``, a row for each run; ``recipes.md``, medians over sounds and seeds, and ratios to the
recipe of the notebook; SOUND_SEED.png, the target and what each recipe grew. ``mel_l1_db@384`` and so on are of a grid
that has grown from one cell for so many steps, and ``mel_healed_11%`` is the error after a wound of so much of the area
has healed, as a multiple of the same growth's without it, see ``fastnca.life``. The metrics of the wav are also given
of what was decoded in other ways, to tell where the error comes from:

- ceiling: the target's own two grids
- grown: both grown grids, as the wav, but louder than full scale where it would be
- linear_alone, mel_alone: one grown grid without the other
"""

import argparse
import csv
import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

import torch

import fastnca
from fastnca import life
from fastnca.growth import EpochDone
from fastnca.run import CHECKPOINT_FILE, LOSSES_FILE
from fastnca.sound import metrics, vocoder
from fastnca.sound.pictures import save_picture
from fastnca.sound.spectrogram import analyze, to_magnitude
from fastnca.sound_model import MODEL_FILE
from fastnca.training.divergence import TrainingDiverged
from fastnca.training.recipes import find_recipe

from .. import report
from .sounds import SOUNDS, load

BASELINE = "notebook"
AGES = (384, 1000)
HEALED = ((0.11, 96), (0.5, 384))  # holes, by share of the area, and the steps after which they are judged
WAV_METRICS = ("spectral_convergence_db", "log_spectral_distance_db", "multi_resolution_stft", "loudness_error_db")
GRID_METRICS = ("mel_l1_db", "linear_l1_db", "mel_l1_db_active", "linear_l1_db_active")
SHOWN = ("epochs", "seconds_per_epoch", *GRID_METRICS, *WAV_METRICS, "seconds_to_mel_3_db")
RATIOS = ("mel_l1_db", "linear_l1_db", "log_spectral_distance_db", "multi_resolution_stft")
DECODED = ("ceiling", "grown", "linear_alone", "mel_alone")


def read_recipe(text):
    """The Recipe that ``name[,field=value...]`` stands for, under that whole name; values are JSON."""
    name, *changes = re.split(r",(?=\w+=)", text)
    recipe = find_recipe(name)
    fields = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in {known.name for known in dataclasses.fields(recipe)}:
            raise ValueError(f"a recipe has no field {field!r} (in {text!r})")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{value} is not JSON (in {text!r})") from error
    return dataclasses.replace(recipe, **fields, name=text)


def decoded(target, grown, samples):
    """{"ceiling/spectral_convergence_db": ...}: metrics beside the recording ``samples`` of what DECODED names.

    target, grown: DualSpectrograms.
    """
    # A linear grid that knows nothing: merging then spreads the mel grid's energy over the bins of each band.
    blank = grown.with_grids(grown.mel_db, torch.full_like(grown.linear_db, -20.0))
    magnitudes = {
        "ceiling": vocoder.merge_magnitudes(target),
        "grown": vocoder.merge_magnitudes(grown),
        "linear_alone": to_magnitude(grown.linear_db, grown.scale.linear_ref_db),
        "mel_alone": vocoder.merge_magnitudes(blank),
    }
    result = {}
    for what, magnitude in magnitudes.items():
        distances = metrics.compare(samples, vocoder.griffin_lim(magnitude))
        result.update({f"{what}/{name}": distances[name] for name in WAV_METRICS})
    return result


def grow(samples, folder, recipe, seed, epochs, minutes):
    """The row of one run, which goes on where it was interrupted."""
    facts = report.machine()
    row = {name: facts[name] for name in ("machine", "capability", "commit", "date")}

    def show(event):
        if isinstance(event, EpochDone) and sys.stderr.isatty():
            left = f"epoch {event.row['epoch']}, {event.seconds_left:.0f} s left   "
            print(f"\r{left}", end="", file=sys.stderr, flush=True)

    options = {"epochs": epochs, "minutes": minutes, "seed": seed, "vocoder": "griffinlim", "on_event": show}
    try:
        resume = (folder / CHECKPOINT_FILE).exists()
        sound = fastnca.grow(samples, folder, recipe=recipe, resume=resume, **options)
    except TrainingDiverged as error:
        return {**row, "diverged": str(error)}
    row |= {name: sound.metrics[name] for name in ("precision", "epochs", "seconds_per_epoch", *GRID_METRICS)}
    row |= {name: sound.metrics[name] for name in WAV_METRICS}
    with open(folder / LOSSES_FILE, newline="") as file:
        below = (float(row["seconds"]) for row in csv.DictReader(file) if float(row["mel_l1_db"]) < 3.0)
        row["seconds_to_mel_3_db"] = next(below, None)
    target = analyze(samples)
    found = life.measure(sound.model, target, AGES, tuple(steps for _, steps in HEALED))
    row["steps_to_full"] = found.one_seed_steps_to_full
    for grid in ("mel", "linear"):
        row |= {f"{grid}_l1_db@{age}": error for age, error in getattr(found, f"{grid}_l1_db_at").items()}
        for share, steps in HEALED:
            wound = next(wound for wound in found.wounds if (wound["kind"], wound["share"]) == ("hole", share))
            row[f"{grid}_healed_{share:.0%}"] = wound[f"{grid}_healed"][steps] / wound[f"{grid}_twin"][steps]
    return row | decoded(target, sound.spectrogram, samples)


def picture(path, samples, folders):
    """Write a PNG of the target and, below it, of what grows in each of ``folders`` ({title: folder})."""
    target = analyze(samples)
    rows = [("target", target)]
    for title, folder in folders.items():
        model = fastnca.load(folder, vocoder="griffinlim")
        rows.append((f"{title}, epoch {model.card.epochs}", model.grow().spectrogram))
    save_picture(path, rows)


def median(rows, name):
    """The median of a column, of numbers or of their text from a file; None where no row has it."""
    values = [float(row[name]) for row in rows if row.get(name) not in (None, "")]
    return statistics.median(values) if values else None


def summary(rows):
    """Rows as Markdown: medians over sounds and seeds, ratios to the notebook's recipe, medians of each sound and of
    what was decoded."""
    shown = (*SHOWN, *dict.fromkeys(name for row in rows for name in row if "_l1_db@" in name or "_healed_" in name))
    recipes = {recipe: [row for row in rows if row["recipe"] == recipe] for recipe in (row["recipe"] for row in rows)}

    def same_run(row):
        return tuple(row[name] for name in ("sound", "seed", "epoch_budget", "minute_budget", "duration"))

    def medians(names, rows, prefix=""):
        return {name: median(rows, prefix + name) for name in names}

    baselines = {same_run(row): row for row in recipes.get(BASELINE, ()) if not row.get("diverged")}
    means, ratios, by_sound, ways = [], [], [], []
    for recipe, runs in recipes.items():
        title = {"recipe": f"`{recipe}`"}
        diverged = sum(bool(row.get("diverged")) for row in runs)
        means.append({**title, "runs": len(runs), "diverged": diverged, **medians(shown, runs)})
        pairs = [(row, baselines[same_run(row)]) for row in runs if same_run(row) in baselines]
        pairs = [
            {name: float(row[name]) / float(baseline[name]) for name in RATIOS}
            for row, baseline in pairs
            if recipe != BASELINE and not row.get("diverged")
        ]
        if pairs:
            cells = {name: f"{median(pairs, name):.3g} ({max(pair[name] for pair in pairs):.3g})" for name in RATIOS}
            ratios.append({**title, "pairs": len(pairs), **cells})
        for sound in dict.fromkeys(row["sound"] for row in runs):
            chosen = [row for row in runs if row["sound"] == sound]
            by_sound.append({**title, "sound": sound, "seeds": len(chosen), **medians(shown, chosen)})
        ways += [{**title, "decoded": way, **medians(WAV_METRICS, runs, f"{way}/")} for way in DECODED]
    where = {}
    for row in rows:
        commits = where.setdefault("{machine}; {capability} kernels".format(**row), {})
        commits["{commit}, {date}".format(**row)] = True
    tables = {
        "Medians over sounds and seeds": means,
        f"Ratios to `{BASELINE}` with the same sound, seed and budget: medians, and the worst": ratios,
        "Medians over seeds": by_sound,
        "What was decoded: medians of the wav's metrics over sounds and seeds": ways,
    }
    parts = [f"**{title}**\n\n{report.table(table)}" for title, table in tables.items() if table]
    parts = [f"{machine}; commit {'; '.join(commits)}" for machine, commits in where.items()] + parts
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("sounds", nargs="+", help=f"recordings, or {', '.join(SOUNDS)}")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    parser.add_argument("--recipes", nargs="+", default=["default", BASELINE], metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--epochs", type=int, help="the budget of each run")
    parser.add_argument("--minutes", type=float, help="the budget of each run")
    parser.add_argument("--duration", type=float, default=2.0, help="seconds of each sound")
    options = parser.parse_args(arguments)
    if options.epochs is None and options.minutes is None:
        parser.error("give --epochs or --minutes")
    sounds = [load(sound, options.duration) for sound in options.sounds]
    if len({name for name, _ in sounds}) < len(sounds):
        parser.error("two sounds have the same name")
    recipes = [read_recipe(recipe) for recipe in options.recipes]

    finished = options.out / "recipes.csv"
    rows = []
    if finished.exists():
        with open(finished, newline="") as file:
            rows = list(csv.DictReader(file))
    for seed in options.seeds:
        for name, samples in sounds:
            folders = {}
            for recipe in recipes:
                run = {"recipe": recipe.name, "sound": name, "seed": seed, "epoch_budget": options.epochs}
                run |= {"minute_budget": options.minutes, "duration": options.duration}
                run = {key: "" if value is None else str(value) for key, value in run.items()}  # as the file has them
                folders[recipe.name] = options.out / "runs" / "_".join(filter(None, run.values()))
                if any(run.items() <= row.items() for row in rows):
                    continue
                print(f"{recipe.name}, {name}, seed {seed}", file=sys.stderr)
                grown = grow(samples, folders[recipe.name], recipe, seed, options.epochs, options.minutes)
                rows.append(run | grown)
                report.write(options.out, "recipes", summary(rows), rows)
            folders = {title: folder for title, folder in folders.items() if (folder / MODEL_FILE).exists()}
            picture(options.out / f"{name}_{seed}.png", samples, folders)
    print(summary(rows))


if __name__ == "__main__":
    main()

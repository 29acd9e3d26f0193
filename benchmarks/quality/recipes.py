"""Recipes compared: ``python -m benchmarks.recipes SOUND... -o DIR`` grows each sound with each recipe and seed.

A sound is a recording or the name of a built-in one: bowed, percussion, chord, voice, noise. A recipe is a name,
with changed fields after it where wanted: ``default,linear_weight=3,num_steps=64``. Every run is a ``fastnca grow`` in
a folder of its own, so that a comparison that was interrupted goes on where it stopped, and finished runs are kept.

Written to DIR: ``recipes.csv``, a row for each run with all of metrics.json and what stands below; ``recipes.md``,
medians over sounds and seeds, and ratios to the recipe of the notebook; SOUND_SEED.png, the target and what each recipe
grew. ``mel_l1_db@192`` and so on are of a grid that has grown on for so many steps. The rungs tell where the error
comes from, by the metrics of the wav:

- ceiling: the target's own two grids, decoded
- grown: both grown grids, decoded as ``generated.wav`` is
- linear_alone, mel_alone: one grown grid, decoded without the other
"""

import argparse
import csv
import dataclasses
import io
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastnca import audio, decode_db, load_model, metrics, plotting, training, vocoder
from fastnca.files import atomic_write
from fastnca.run import MODEL_FILE, Run

from .cpu import machine

BASELINE = "notebook"
AGES = (192, 384, 1000)
WAV_METRICS = ("spectral_convergence_db", "log_spectral_distance_db", "multi_resolution_stft", "loudness_error_db")
TABLE = (
    "epochs",
    "seconds_per_epoch",
    "mel_l1_db",
    "linear_l1_db",
    "mel_l1_db_active",
    "linear_l1_db_active",
    *WAV_METRICS,
    "seconds_to_mel_3_db",
    *(f"mel_l1_db@{age}" for age in AGES),
)
RATIOS = ("mel_l1_db", "linear_l1_db", "log_spectral_distance_db", "multi_resolution_stft")


def percussion(seconds):
    """A struck bar: inharmonic partials that ring and a noisy attack."""
    t = np.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    partials = enumerate((330.0, 911.0, 1782.0))
    ringing = sum(np.exp(-t * (3 + 2 * k)) * np.sin(2 * np.pi * f0 * t) for k, f0 in partials)
    return 0.25 * ringing + 0.3 * np.exp(-t * 60) * noise


def chord(seconds):
    """Three plucked notes that enter one after another."""
    t = np.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    sound = np.zeros_like(t)
    for entry, f0 in enumerate((220.0, 277.18, 329.63)):
        age = t - 0.15 * entry * seconds
        for harmonic in range(1, 9):
            partial = np.sin(2 * np.pi * f0 * harmonic * age) / harmonic
            sound += 0.12 * partial * np.exp(-np.maximum(age, 0) * (1 + 0.5 * harmonic)) * (age > 0)
    return sound


def voice(seconds):
    """A sung vowel that glides to another, with vibrato: pulses through formants, harmonic by harmonic."""
    t = np.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    place = np.linspace(0.0, 1.0, len(t))
    pitch = 180.0 * (1 + 0.02 * np.sin(2 * np.pi * 5.5 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / audio.SAMPLE_RATE
    formants = [(700 - 400 * place, 90), (1200 + 1000 * place, 110), (2600 + 300 * place, 160)]
    sound = np.zeros_like(t)
    for harmonic in range(1, 50):
        frequency = harmonic * pitch
        gain = sum(1 / (1 + ((frequency - centre) / width) ** 2) for centre, width in formants)
        sound += gain / harmonic**0.5 * np.sin(harmonic * phase) * (frequency < 10000)
    envelope = np.minimum(1, np.minimum(t / 0.08, (seconds - t) / 0.15))
    return 0.15 * sound * envelope


def noise(seconds):
    """Wind: noise through a band that wanders."""
    t = np.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    spectrum = torch.stft(
        torch.from_numpy(np.random.default_rng(0).standard_normal(len(t))), 1024, 256,
        window=torch.hann_window(1024, dtype=torch.float64), return_complex=True,
    )  # fmt: skip
    frequency = torch.linspace(0, audio.SAMPLE_RATE / 2, spectrum.shape[0], dtype=torch.float64)[:, None]
    centre = 1200 + 900 * torch.sin(2 * torch.pi * torch.linspace(0, 1.5, spectrum.shape[1], dtype=torch.float64))
    spectrum *= torch.exp(-(((frequency - centre) / 500) ** 2)) + 1e-3
    window = torch.hann_window(1024, dtype=torch.float64)
    return 0.3 * torch.istft(spectrum, 1024, 256, window=window, length=len(t)).numpy()


def bowed(seconds):
    return audio.synthesize_bowed_string(duration=seconds)


BUILT_IN = {sound.__name__: sound for sound in (bowed, percussion, chord, voice, noise)}


def load(sound, seconds):
    """(name, samples) of a built-in sound or a recording."""
    if sound in BUILT_IN:
        samples = np.asarray(BUILT_IN[sound](seconds), dtype=np.float32)
        return sound, samples[: len(samples) // audio.HOP_LENGTH * audio.HOP_LENGTH]
    return Path(sound).stem, audio.load_audio(sound, seconds)[0]


def find_recipe(text):
    """The Recipe that ``name[,field=value...]`` stands for; values are JSON."""
    name, *changes = re.split(r",(?=\w+=)", text)
    recipe = training.find_recipe(name)
    fields = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in {known.name for known in dataclasses.fields(recipe)}:
            raise ValueError(f"a recipe has no field {field!r} (in {text!r})")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{value} is not JSON (in {text!r})") from error
    return dataclasses.replace(recipe, **fields)


def decoded(dual, samples):
    sound = vocoder.griffin_lim(vocoder.merge_magnitudes(dual), config=dual.config)
    return wav_metrics(samples, sound)


def wav_metrics(samples, sound):
    result = metrics.compare(samples, sound)
    return {name: result[name] for name in WAV_METRICS}


def rungs(target, grown, samples):
    """{rung: metrics of its wav} of a run's target and grown DualSpectrogram."""
    linear = audio.to_magnitude(grown.linear_db, grown.linear_ref_db)
    # A linear grid that knows nothing: merging then spreads the mel grid's energy over the bins of each band.
    blank = dataclasses.replace(grown, linear_db=torch.full_like(grown.linear_db, -20.0))
    return {
        "ceiling": decoded(target, samples),
        "grown": decoded(grown, samples),
        "linear_alone": wav_metrics(samples, vocoder.griffin_lim(linear, config=grown.config)),
        "mel_alone": decoded(blank, samples),
    }


def grow(samples, folder, recipe, seed, epochs, minutes):
    """The metrics of one run, finished now or before."""
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "machine.json"
    if not about.exists():
        facts = machine()
        about.write_text(json.dumps({name: facts[name] for name in ("machine", "capability", "commit", "date")}))
    training.RECIPES[recipe] = find_recipe(recipe)
    resume = (folder / "checkpoint.safetensors").exists()
    options = {"epochs": epochs, "minutes": minutes, "seed": seed, "vocoder_choice": "griffinlim", "resume": resume}
    run = Run(samples, folder, recipe=recipe, console=Console(stderr=True), **options)
    run.open_folder()
    try:
        result, interrupted = run.grow()
    except training.TrainingDiverged as error:
        return {**json.loads(about.read_text()), "diverged": str(error)}
    if interrupted:
        raise KeyboardInterrupt
    from_seed = [row for row in run.losses if int(row["steps"]) == run.recipe.num_steps]
    below = (float(row["seconds"]) for row in from_seed if float(row["mel_l1_db"]) < 3.0)
    result = {**json.loads(about.read_text()), **result, "seconds_to_mel_3_db": next(below, None)}
    model, _ = load_model(folder / MODEL_FILE, backend=run.backend)
    model.to(run.trainer.target_mel.device)
    grids, age = model.seed(run.target.n_frames), 0
    with torch.no_grad():
        for steps in (run.recipe.num_steps, *(age for age in AGES if age > run.recipe.num_steps)):
            grids, age = model.rollout(*grids, steps - age), steps
            mel_db, linear_db = (decode_db(grid)[0].cpu() for grid in grids)
            if steps == run.recipe.num_steps:
                grown = dataclasses.replace(run.target, mel_db=mel_db, linear_db=linear_db)
            else:
                result[f"mel_l1_db@{steps}"] = metrics.grid_metrics(mel_db, linear_db, run.target)["mel_l1_db"]
    for rung, values in rungs(run.target, grown, samples).items():
        result.update({f"{rung}/{name}": value for name, value in values.items()})
    return result


def picture(path, samples, folders):
    """Write a PNG of the target and, below it, of what was grown in each of ``folders`` ({title: folder})."""
    rows = []
    for title, folder in folders.items():
        model, sound = load_model(folder / MODEL_FILE)
        config = audio.SpectrogramConfig(**sound["spectrogram"])
        if not rows:
            target = audio.analyze(samples, config)
            rows.append(("target", target.mel_db, target.linear_db))
        rows.append((f"{title}, epoch {sound['epochs']}", *model.grow(target.n_frames, sound["num_steps"])))
    plotting.save_picture(path, rows, config)


KEY = ("recipe", "sound", "seed", "epoch_budget", "minute_budget", "duration")


def write(out, rows):
    with atomic_write(out / "recipes.json") as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    with atomic_write(out / "recipes.csv") as file:
        file.write(text.getvalue().encode())
    with atomic_write(out / "recipes.md") as file:
        file.write(summary(rows).encode())


def median(rows, name):
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.median(values):.3g}" if values else ""


def summary(rows):
    """Markdown: medians over all sounds and seeds, ratios to the notebook's, medians of each sound, the rungs."""

    def table(head, body):
        lines = [head, ["---"] * len(head), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    of = {recipe: [row for row in rows if row["recipe"] == recipe] for recipe in recipes}
    runs = {tuple(row[name] for name in KEY): row for row in rows}
    ratios = {recipe: [] for recipe in recipes}
    for row in rows:
        baseline = runs.get(tuple(BASELINE if name == "recipe" else row[name] for name in KEY))
        if baseline and row is not baseline and "diverged" not in baseline | row:
            ratios[row["recipe"]].append({name: row[name] / baseline[name] for name in RATIOS})
    parts = [
        "Medians over sounds and seeds\n",
        table(
            ["recipe", "runs", "diverged", *TABLE],
            [
                [
                    f"`{r}`",
                    str(len(of[r])),
                    str(sum("diverged" in row for row in of[r])),
                    *(median(of[r], name) for name in TABLE),
                ]
                for r in recipes
            ],
        ),
        f"Ratios to `{BASELINE}` with the same sound, seed and budget: medians, and the worst\n",
        table(
            ["recipe", "pairs", *RATIOS],
            [
                [f"`{r}`", str(len(pairs)), *(f"{median(pairs, n)} ({max(p[n] for p in pairs):.3g})" for n in RATIOS)]
                for r, pairs in ratios.items()
                if pairs
            ],
        ),
        "Medians over seeds\n",
        table(
            ["recipe", "sound", "seeds", *TABLE],
            [
                [f"`{r}`", sound, str(len(chosen)), *(median(chosen, name) for name in TABLE)]
                for r in recipes
                for sound in dict.fromkeys(row["sound"] for row in of[r])
                for chosen in [[row for row in of[r] if row["sound"] == sound]]
            ],
        ),
        "What was decoded: medians of the wav's metrics over sounds and seeds\n",
        table(
            ["recipe", "decoded", *WAV_METRICS],
            [
                [f"`{r}`", rung, *(median(of[r], f"{rung}/{name}") for name in WAV_METRICS)]
                for r in recipes
                for rung in ("ceiling", "grown", "linear_alone", "mel_alone")
            ],
        ),
    ]
    return "\n".join(parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("sounds", nargs="+", help=f"recordings, or {', '.join(BUILT_IN)}")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["default", "notebook"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--duration", type=float, default=2.0, help="seconds of each sound")
    options = parser.parse_args(arguments)
    if options.epochs is None and options.minutes is None:
        parser.error("give --epochs or --minutes")
    sounds = [load(sound, options.duration) for sound in options.sounds]
    if len({name for name, _ in sounds}) < len(sounds):
        parser.error("two sounds have the same name")
    for recipe in options.recipes:
        find_recipe(recipe)

    options.out.mkdir(parents=True, exist_ok=True)
    finished = options.out / "recipes.json"
    rows = json.loads(finished.read_text()) if finished.exists() else []
    budget = {"epoch_budget": options.epochs, "minute_budget": options.minutes, "duration": options.duration}
    for seed in options.seeds:
        for name, samples in sounds:
            folders = {}
            for recipe in options.recipes:
                key = {"recipe": recipe, "sound": name, "seed": seed, **budget}
                folder = options.out / "runs" / "_".join(str(value) for value in key.values() if value is not None)
                folders[recipe] = folder
                if any(key.items() <= row.items() for row in rows):
                    continue
                print(f"{recipe}, {name}, seed {seed}", file=sys.stderr)
                result = grow(samples, folder, recipe, seed, options.epochs, options.minutes)
                rows.append({**key, **{k: v for k, v in result.items() if k not in key}})
                write(options.out, rows)
            folders = {recipe: folder for recipe, folder in folders.items() if (folder / MODEL_FILE).exists()}
            picture(options.out / f"{name}_{seed}.png", samples, folders)
    print(summary(rows))


if __name__ == "__main__":
    main()

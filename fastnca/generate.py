"""Growing a learned sound again: load, grow, wound and heal, decode, and the files of that."""

import math
import re
from pathlib import Path

import numpy as np
import torch

from .run import check_output
from .sound.convention import HOP_LENGTH, SAMPLE_RATE, within_full_scale
from .sound.files import check_wav_name, write_wav
from .sound.pictures import save_growth, save_picture
from .sound.pitch import read_pitch
from .sound.spectrogram import bands_between, linear_centers, mel_centers
from .sound_model import find_model_file
from .space import load_sound

MAX_PICTURES = 96  # of an animated growth, beside the seed
STAGES = 8  # of a growth that is heard
PAUSE = SAMPLE_RATE // 8  # samples between two stages
REPORT_EVERY = 32  # steps


def generate(
    path,
    out=None,
    *,
    sound=None,
    n_frames=None,
    num_steps=None,
    time="stretch",
    pitch=None,
    seeds_every=None,
    video=False,
    hear_growth=False,
    wound=None,
    heal=96,
    vocoder=None,
    bigvgan=None,
    backend="auto",
    on_step=None,
):
    """Grow a learned sound again and write it -> (paths of what was written, the wav first, and the GrownSound).

    A picture of the grown spectrograms lies beside the wav. ``out`` is by default ``generated.wav`` in the run's
    folder, or ``<name>_generated.wav`` beside a model file that was given itself; with other frames, steps, pitch or
    seeds than by default, the name says them.

    Args:
        path: the folder that ``fastnca grow`` or ``learn`` wrote, or the model file in it. sound: of a space, which.
        n_frames, num_steps, time: see ``SoundModel.grow``.
        pitch: a note ("E4"), semitones from the recording ("+3") or a frequency ("330hz").
        seeds_every: let life begin at a lattice of cells, so far apart, instead of one cell in the middle.
        video: write the growth too, as an animated GIF and, where ffmpeg is at hand, as an MP4.
        hear_growth: write its stages too, one after the other, as ``<name>_growth.wav``.
        wound: a box "SECONDS-SECONDS,HZ-HZ" in which everything is erased when the sound has grown; the wounded sound
            is written as ``<name>_wounded.wav`` and, ``heal`` steps later, ``<name>_healed.wav``.
        vocoder, bigvgan, backend: see :func:`fastnca.load`.
        on_step: called with (steps done, steps in all) while it grows.

    Raises ValueError, TypeError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    model_file = find_model_file(path)
    model = load_sound(model_file, sound, backend=backend, vocoder=vocoder, bigvgan=bigvgan)
    recorded_hz = model.automaton.places and model.automaton.places.pitch_hz
    if pitch is not None and recorded_hz is None:
        raise ValueError(
            "the sound was learned without a pitch, since none that stays was found in the recording: it cannot "
            "grow at another one; if it has one, learn it again with fastnca grow --pitch-of-recording"
        )
    pitch_hz = None if pitch is None else read_pitch(pitch, recorded_hz)
    plan = model.plan(n_frames, num_steps, time, pitch_hz, seeds_every)
    box = None if wound is None else read_wound(wound, plan.n_frames)
    if heal < 1:
        raise ValueError(f"heal must be at least 1 step, got {heal}")
    if out is None:
        name = "generated" if Path(path).is_dir() else f"{model_file.stem}_generated"
        name += "" if sound is None else f"_{sound}"
        if n_frames not in (None, model.card.n_frames) or num_steps is not None:
            name += f"_{plan.n_frames}x{plan.num_steps}"
        name += "" if time == "stretch" else f"_{time}"
        name += "" if pitch is None else f"_{re.sub('[^A-Za-z0-9+.-]', '', pitch)}"
        name += "" if seeds_every is None else f"_seeds{seeds_every}"
        out = model_file.with_name(f"{name}.wav")
    out = Path(out)
    check_wav_name(out)

    def beside(ending):
        return out.with_name(out.stem + ending)

    endings = [".png"] + video * [".gif", ".mp4"] + hear_growth * ["_growth.wav"]
    endings += [] if box is None else ["_wounded.wav", "_healed.wav"]
    for path in (out, *map(beside, endings)):
        check_output(path)

    total = max(1, plan.num_steps + (heal if box else 0))
    written = [out]
    heard = []
    seen = set(_stages(plan.num_steps, MAX_PICTURES)) if video else set()
    sounding = set(_stages(plan.num_steps, STAGES)) if hear_growth else set()
    grids = None

    def pictures():
        """Grows the sound; one picture after the other, as they would fill the memory for a long sound."""
        nonlocal grids
        reported = range(0, plan.num_steps, REPORT_EVERY)
        for step, grids in grow_by(model.automaton, plan, {*seen, *sounding, *reported, plan.num_steps}):
            if on_step:
                on_step(step, total)
            if step in sounding and step > 0:
                heard.append(model.vocoder.decode(model.spectrogram(*model.automaton.levels(grids))))
            if step in seen:
                yield growth_picture(model.automaton, step, grids)

    growing = pictures()
    if video:
        written += save_growth(out.with_suffix(".gif"), growing)
    for _ in growing:  # on to the end where nothing is drawn
        pass
    grown = model.decode(*model.automaton.levels(grids))
    rows = [(f"grown, {plan.num_steps} steps", grown.spectrogram)]
    grown.save(out)
    if hear_growth:
        written.append(beside("_growth.wav"))
        write_wav(written[-1], in_turn(heard))
    if box:
        grids = erase(grids, *box, model.card.scale.bands)
        for ending, steps in (("wounded", 0), ("healed", heal)):
            grids = grow_on(model.automaton, plan, grids, steps)
            after = model.decode(*model.automaton.levels(grids))
            rows.append((ending if steps == 0 else f"{ending}, {steps} steps later", after.spectrogram))
            written.append(beside(f"_{ending}.wav"))
            after.save(written[-1])
        if on_step:
            on_step(total, total)
    written[1:1] = save_picture(beside(".png"), rows)
    return written, grown


def in_turn(sounds):
    """Samples one after the other, with pauses -> samples; where one would clip, all are made quieter."""
    pause = np.zeros(PAUSE, dtype=np.float32)
    samples, _ = within_full_scale(np.concatenate([part for samples in sounds for part in (samples, pause)]))
    return samples


def _stages(num_steps, count):
    """0, num_steps and at most ``count - 1`` steps evenly between them."""
    stride = max(1, math.ceil(num_steps / count))
    return (*range(0, num_steps, stride), num_steps)


@torch.no_grad()
def grow_on(automaton, plan, grids, num_steps):
    """The grids of a growth by ``plan``, so many steps later."""
    if num_steps == 0:
        return grids
    tables = automaton.tables(plan.n_frames, plan.times, plan.pitch_hz)
    return automaton.rollout(*grids, num_steps, precision="fp32", tables=tables)


def grow_by(automaton, plan, steps):
    """One growth by ``plan``: yields (step, grids) at each of ``steps``, in their order."""
    grids, age = automaton.seed(plan.n_frames, plan.at, plan.times), 0
    for step in sorted(steps):
        grids, age = grow_on(automaton, plan, grids, step - age), step
        yield step, grids


def growth_picture(automaton, step, grids):
    """What ``pictures.save_growth`` shows of a growth at that step."""
    alphas = [grid[0, 1].clamp(0, 1).cpu().numpy() for grid in grids]
    return f"step {step}", *(level.numpy() for level in automaton.levels(grids)), *alphas


def read_box(text, what):
    """ "SECONDS-SECONDS,HZ-HZ" -> ((start, end), (low, high)). Raises ValueError for anything else; ``what`` it says
    the box is."""
    number = r"(\d*\.?\d+)"
    match = re.fullmatch(rf"{number}\s*-\s*{number}\s*,\s*{number}\s*-\s*{number}", text.strip())
    if not match:
        raise ValueError(f"{what} is a box SECONDS-SECONDS,HZ-HZ such as 0.5-0.8,200-2000, got {text!r}")
    start, end, low, high = (float(part) for part in match.groups())
    return (start, end), (low, high)


def read_wound(text, n_frames):
    """A box within a sound -> (frames, hertz), a slice and a pair. Raises ValueError for anything else."""
    (start, end), (low, high) = read_box(text, "a wound")
    seconds = n_frames * HOP_LENGTH / SAMPLE_RATE
    if not (start < end and low < high and start < seconds):
        raise ValueError(f"a wound must lie within the sound's {seconds:.2f} s and rise from low to high, got {text!r}")
    begin, stop = (round(second * SAMPLE_RATE / HOP_LENGTH) for second in (start, end))
    return slice(begin, max(stop, begin + 1)), (low, high)


def erase(grids, frames, hertz, mel_bands):
    """Copies of both grids in which the cells in that box, frames and range of Hz, are dead and empty. Of a range that
    lies between two bands it is the nearest band."""
    wounded = []
    for grid, centers in zip(grids, (mel_centers, linear_centers)):
        grid = grid.clone()
        grid[:, :, bands_between(centers(grid.shape[2], mel_bands), hertz), frames] = 0.0
        wounded.append(grid)
    return wounded

"""Growing a learned sound again: load, grow, decode, and the files of that."""

import math
from pathlib import Path

import torch

from .model import decode_db
from .sound.pictures import save_growth, save_picture
from .sound_model import find_model_file, load

MAX_PICTURES = 96  # of an animated growth, beside the seed


def generate(
    path,
    out=None,
    *,
    n_frames=None,
    num_steps=None,
    time="stretch",
    video=False,
    vocoder=None,
    bigvgan=None,
    backend="auto",
    on_picture=None,
):
    """Grow a learned sound again and write it -> (path of the wav, the GrownSound).

    A picture of the grown spectrograms lies beside the wav. ``out`` is by default ``generated.wav`` in the run's
    folder, or ``<name>_generated.wav`` beside a model file that was given itself; with other frames or steps than it
    was trained with, the name says them.

    Args:
        path: the folder that ``fastnca grow`` wrote, or a model file.
        n_frames, num_steps, time: see ``SoundModel.grow``.
        video: write the growth too, as an animated GIF beside the wav.
        vocoder, bigvgan, backend: see :func:`fastnca.load`.
        on_picture: called with (pictures done, pictures in all) while the GIF is drawn.

    Raises ValueError, TypeError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    model_file = find_model_file(path)
    model = load(model_file, backend=backend, vocoder=vocoder, bigvgan=bigvgan)
    n_frames, num_steps, times = model.plan(n_frames, num_steps, time)
    if out is None:
        name = "generated" if Path(path).is_dir() else f"{model_file.stem}_generated"
        if (n_frames, num_steps) != (model.card.n_frames, model.card.num_steps):
            name += f"_{n_frames}x{num_steps}"
        out = model_file.with_name(f"{name}.wav" if time == "stretch" else f"{name}_{time}.wav")
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}; make it first")
    if video:
        total = math.ceil(num_steps / _stride(num_steps)) + 1
        pictures = growth_pictures(model.automaton, n_frames, num_steps, times)
        save_growth(out.with_suffix(".gif"), _counted(pictures, total, on_picture))
    sound = model.grow(n_frames, num_steps, time)
    sound.save(out)
    save_picture(out.with_suffix(".png"), [(f"grown, {num_steps} steps", sound.spectrogram)])
    return out, sound


def _stride(num_steps):
    return max(1, math.ceil(num_steps / MAX_PICTURES))


@torch.no_grad()
def growth_pictures(automaton, n_frames, num_steps, times):
    """One growth from the seed to ``num_steps`` in no more than 97 pictures, as ``pictures.save_growth`` takes them."""
    stride = _stride(num_steps)
    grids = automaton.seed(n_frames, times)
    for step in range(0, num_steps + stride, stride):
        step = min(step, num_steps)
        if step > 0:
            grids = automaton.rollout(*grids, (step - 1) % stride + 1)
        levels = [decode_db(grid)[0].cpu().numpy() for grid in grids]
        alphas = [grid[0, 1].cpu().numpy() for grid in grids]
        yield f"step {step}", *levels, *alphas


def _counted(pictures, total, on_picture):
    for done, picture in enumerate(pictures, start=1):
        yield picture
        if on_picture:
            on_picture(done, total)

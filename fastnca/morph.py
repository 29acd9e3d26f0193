"""What lies between the sounds of a space, as files."""

from pathlib import Path

from .run import check_output
from .sound.files import check_wav_name
from .sound.pictures import save_picture
from .sound_model import find_model_file, load
from .space import Space


def read_shares(sounds):
    """["A", "B"] -> (["A", "B"], None); ["A=0.5", "B=0.3"], also with commas between -> (["A", "B"], [0.5, 0.3]).

    Raises ValueError for anything else.
    """
    words = [word for text in sounds for word in (text.split(",") if "=" in text else [text])]
    names, shares = (
        zip(*(word.rpartition("=")[::2] if "=" in word else (word, None) for word in words)) if words else ((), ())
    )
    if all(share is None for share in shares):
        if len(names) != 2:
            raise ValueError(
                f"give two sounds, A B, or the shares of any number of them, A=0.5 B=0.3; got {len(names)}"
            )
        return list(names), None
    try:
        shares = [float(share) for share in shares]
        if len(set(names)) < len(names):
            raise ValueError
        return list(names), shares
    except (TypeError, ValueError):
        raise ValueError(
            f"a mixture is shares of different sounds, A=0.5 B=0.3 C=0.2, got {' '.join(sounds)}"
        ) from None


def morph(
    path,
    sounds,
    out=None,
    *,
    amount=None,
    steps=None,
    glide=False,
    vocoder=None,
    bigvgan=None,
    backend="auto",
    on_step=None,
):
    """Grow what lies between sounds of a space and write it -> (paths of what was written, [GrownSound]).

    A picture of all that was grown lies beside the wav. ``out`` is by default named after what it is, in the space's
    folder.

    Args:
        path: the folder that ``fastnca learn`` wrote, or the space file in it.
        sounds: two names, or shares of any number of sounds, see :func:`read_shares`.
        amount: of the second of two sounds, from 0 to 1; half if not given. steps: write so many sounds instead, the
            first and the second sound among them. glide: write one sound that is the first one at its beginning and the
            second one at its end.
        vocoder, bigvgan, backend: see :func:`fastnca.load`.
        on_step: called with (done, in all), in sounds or, of a glide, in steps.

    Raises ValueError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    names, shares = read_shares(sounds)
    if sum((amount is not None, steps is not None, glide, shares is not None)) > 1:
        raise ValueError("of an amount, a number of steps, a glide and shares only one can be")
    if steps is not None and steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    file = find_model_file(path)
    space = load(file, backend=backend, vocoder=vocoder, bigvgan=bigvgan)
    if not isinstance(space, Space):
        raise ValueError(f"{path} holds one sound: to morph takes a space of many, see fastnca learn")
    if shares is not None:
        title = "-".join(f"{name}{share:g}" for name, share in zip(names, shares))
        models = {title: space.mix(dict(zip(names, shares)))}
    else:
        amounts = [0.5 if amount is None else amount]
        if steps is not None:
            amounts = [step / (steps - 1) for step in range(steps)]
        title = "-".join(names)
        models = {f"{title}-{amount:.2f}": space.morph(*names, amount) for amount in amounts}
        if glide:
            models = {f"{title}-glide": None}
    outs = [file.with_name(f"{title}.wav") for title in models]
    if out is not None:
        out = Path(out)
        outs = [out] if steps is None else [out.with_name(f"{out.stem}_{step}{out.suffix}") for step in range(steps)]
    picture = outs[0].with_suffix(".png") if steps is None else outs[0].with_name(f"{outs[0].stem}_to_{steps - 1}.png")
    for wav in outs:
        check_wav_name(wav)
    for written in (*outs, picture):
        check_output(written)
    if glide:
        grown = [space.glide(*names, on_step)]
        grown[0].save(outs[0])
    else:
        grown = []
        for done, (wav, model) in enumerate(zip(outs, models.values())):
            if on_step:
                on_step(done, len(outs))
            grown.append(model.grow())
            grown[-1].save(wav)
    rows = [(title, sound.spectrogram) for title, sound in zip(models, grown)]
    return [*outs, *save_picture(picture, rows)], grown

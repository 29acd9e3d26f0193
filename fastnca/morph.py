"""What lies between the sounds of a space, as files."""

from pathlib import Path

from .generate import in_turn, read_box
from .run import check_output
from .sound.files import check_wav_name, write_wav
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
    graft=None,
    become=None,
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
            second one at its end. graft: write the first one, of which a box "SECONDS-SECONDS,HZ-HZ" lives by the code
            of the second. become: write, one after the other, the stages of the first one that is handed the code of
            the second when it has grown, and lives on for so many steps.
        vocoder, bigvgan, backend: see :func:`fastnca.load`.
        on_step: called with (done, in all), in sounds or, of what becomes another, in steps.

    Raises ValueError, OSError for bad input, RuntimeError for a backend that cannot run here.
    """
    names, shares = read_shares(sounds)
    given = (amount is not None, steps is not None, glide, graft is not None, become is not None, shares is not None)
    if sum(given) > 1:
        raise ValueError("of an amount, steps, a glide, a graft, what becomes another and shares only one can be")
    if steps is not None and steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if become is not None and become < 1:
        raise ValueError(f"to become another takes at least 1 step, got {become}")
    file = find_model_file(path)
    space = load(file, backend=backend, vocoder=vocoder, bigvgan=bigvgan)
    if not isinstance(space, Space):
        raise ValueError(f"{path} holds one sound: to morph takes a space of many")
    if shares is not None:
        title = "-".join(f"{name}{share:g}" for name, share in zip(names, shares))
        models = {title: space.mix(dict(zip(names, shares)))}
    else:
        title = "-".join(names)
        if glide:
            models = {f"{title}-glide": space.glide(*names)}
        elif graft is not None:
            models = {f"{title}-graft": space.graft(*names, *read_box(graft, "a graft"))}
        elif become is not None:
            models = {f"{title}-become": space.morph(*names)}
        else:
            amounts = [0.5 if amount is None else amount]
            if steps is not None:
                amounts = [step / (steps - 1) for step in range(steps)]
            models = {f"{title}-{amount:.2f}": space.morph(*names, amount) for amount in amounts}
    outs = [file.with_name(f"{title}.wav") for title in models]
    if out is not None:
        out = Path(out)
        outs = [out] if steps is None else [out.with_name(f"{out.stem}_{step}{out.suffix}") for step in range(steps)]
    picture = outs[0].with_suffix(".png") if steps is None else outs[0].with_name(f"{outs[0].stem}_to_{steps - 1}.png")
    for wav in outs:
        check_wav_name(wav)
    for written in (*outs, picture):
        check_output(written)
    if become is not None:
        grown = space.become(*names, become, on_step=on_step)
        write_wav(outs[0], in_turn([sound.samples for sound in grown]))
        titles = [f"{title}, stage {stage + 1} of {len(grown)}" for stage in range(len(grown))]
    else:
        grown, titles = [], models
        for done, (wav, model) in enumerate(zip(outs, models.values())):
            if on_step:
                on_step(done, len(outs))
            grown.append(model.grow())
            grown[-1].save(wav)
    return [*outs, *save_picture(picture, [(title, sound.spectrogram) for title, sound in zip(titles, grown)])], grown

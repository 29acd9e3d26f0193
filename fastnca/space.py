"""A space of sounds: one rule that has learned many, their codes, and what lies between them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import exp, log

import torch

from .automaton.backends import check_names, choose_backend, choose_device
from .context import Places, check_pitch
from .files import read_safetensors, write_safetensors
from .model import DualSpecTNCA
from .sound.convention import HOP_LENGTH, SAMPLE_RATE, on_cpu
from .sound.spectrogram import Scale, bands_between, linear_centers, mel_centers
from .sound.vocoder import resolve_vocoder
from .sound_model import MIN_FRAMES, SoundCard, SoundModel, load

SPACE_VERSION = 1
GLIDE_FRAMES = 8  # that share a code on the way from one sound to the other
MEETING_STEPS = 4  # between two meetings of parts; a step sees 2 cells far: its neighbors, and their life's


@dataclass(frozen=True, eq=False)
class Member:
    """One sound of a space.

    code: [16], where it lies. card: what its grids mean. pitch_hz: None for a sound without one. tonality: 1 for a
    sound with that pitch, less for what lies between such a one and one without. metrics: its distances from the
    recording.
    """

    code: torch.Tensor = field(repr=False)
    card: SoundCard
    pitch_hz: float | None
    tonality: float = 1.0
    metrics: dict = field(default_factory=dict)


class UnknownSound(KeyError, ValueError):
    """A name that a space does not have."""

    def __str__(self):
        return self.args[0]  # KeyError would quote it


class Space(Mapping):
    """Many sounds that one rule has learned, by name, and all that lies between them.

    ``space["violin"]`` is a SoundModel, which grows as any other; so is every mixture, see :meth:`mix`.

    Args:
        automaton: the DualSpecTNCA, with codes. members: {name: Member}. vocoder: decodes what grows.

    >>> space = fastnca.load("strings")
    >>> space["violin"].grow().save("violin.wav")
    >>> space.morph("violin", "voice", 0.5).grow().save("between.wav")
    """

    def __init__(self, automaton, members, vocoder):
        self.automaton, self.members, self.vocoder = automaton, members, vocoder

    def __getitem__(self, name):
        return self._model(self._member(name))

    def __iter__(self):
        return iter(self.members)

    def __len__(self):
        return len(self.members)

    def __repr__(self):
        return f"Space({', '.join(self.members)})"

    def _member(self, name):
        if name not in self.members:
            raise UnknownSound(f"there is no sound {name!r} in the space; it has {', '.join(self.members)}")
        return self.members[name]

    def _model(self, member):
        automaton = self.automaton.with_code(member.code, member.pitch_hz, member.tonality)
        return SoundModel(automaton, member.card, self.vocoder)

    def mix(self, shares, pitch_hz=None):
        """What lies between sounds -> SoundModel.

        Args:
            shares: {name: share}, not negative; they are divided by their sum. Codes, length and levels in dB are mixed
                by them, and pitches in semitones; a sound without a pitch makes the mixture less tonal.
            pitch_hz: of the mixture. Each sound with a pitch then stands for the notes of its instrument, those that
                share its code: in its place is the mixture of the two next to that pitch, or the nearest one.

        Raises KeyError for a name that the space does not have, ValueError for shares that make no mixture, and for a
        pitch where no sound of the mixture has one.
        """
        return self._model(self.between(shares, pitch_hz))

    def between(self, shares, pitch_hz=None):
        """As :meth:`mix` -> Member."""
        total = sum(shares.values())
        if not shares or min(shares.values()) < 0 or not 0 < total < float("inf"):
            raise ValueError(f"shares of a mixture must not be negative, and one must be positive, got {shares}")
        parts = [(share / total, self._member(name)) for name, share in shares.items()]
        if pitch_hz is not None:
            check_pitch(pitch_hz)
            parts = [(share * of, note) for share, member in parts for of, note in self._notes_at(member, pitch_hz)]

        def mean(of):
            return sum(share * of(member) for share, member in parts)

        card = parts[0][1].card
        scale = Scale(
            mean(lambda member: member.card.scale.mel_ref_db),
            mean(lambda member: member.card.scale.linear_ref_db),
            card.scale.bands,
        )
        n_frames = max(MIN_FRAMES, round(mean(lambda member: member.card.n_frames)))
        pitched = [(share * member.tonality, member.pitch_hz) for share, member in parts if member.pitch_hz and share]
        tonality = sum(share for share, _ in pitched)
        if pitch_hz is not None and not pitched:
            raise ValueError(f"of {', '.join(shares)} none was learned with a pitch: they cannot grow at another one")
        own_hz = exp(sum(share * log(hertz) for share, hertz in pitched) / tonality) if pitched else None
        return Member(
            mean(lambda member: member.code),
            replace(card, scale=scale, n_frames=n_frames),
            pitch_hz or own_hz,
            tonality if pitched else 1.0,
        )

    def _notes_at(self, member, pitch_hz):
        """[(share, Member)]: what stands for ``member`` at that pitch, see :meth:`mix`."""
        if not member.pitch_hz:
            return [(1.0, member)]
        notes = [note for note in self.members.values() if note.pitch_hz and torch.equal(note.code, member.code)]
        lower = max((note for note in notes if note.pitch_hz <= pitch_hz), key=lambda note: note.pitch_hz, default=None)
        upper = min((note for note in notes if note.pitch_hz > pitch_hz), key=lambda note: note.pitch_hz, default=None)
        if lower is None or upper is None:
            return [(1.0, lower or upper)]
        share = log(pitch_hz / lower.pitch_hz) / log(upper.pitch_hz / lower.pitch_hz)
        return [(1.0 - share, lower), (share, upper)]

    def morph(self, first, second, amount=0.5):
        """What lies between two sounds, from ``first`` at 0 to ``second`` at 1 -> SoundModel."""
        if not 0 <= amount <= 1:
            raise ValueError(f"amount must be from 0 to 1, got {amount!r}")
        return self.mix({first: 1.0 - amount, second: amount} if first != second else {first: 1.0})

    def glide(self, first, second):
        """One sound that is ``first`` at its beginning and ``second`` at its end -> SoundModel. It grows as any other,
        but is no file of one rule: every part of 8 frames grows by the rule of another mixture."""
        middle = self.morph(first, second)
        rules = {}  # by the share of the second sound

        def cut(n_frames):
            halo = 2 * MEETING_STEPS
            width = min(n_frames, GLIDE_FRAMES + 2 * halo)
            for begin in range(0, n_frames, GLIDE_FRAMES):
                end = min(n_frames, begin + GLIDE_FRAMES)
                start = min(max(0, begin - halo), n_frames - width)
                amount = (begin + end) / 2 / n_frames
                rule = rules.get(amount) or self.morph(first, second, amount).automaton
                rules[amount] = rule
                kept, inside = (..., slice(begin, end)), (..., slice(begin - start, end - start))
                yield rule, slice(start, start + width), (kept, kept), (inside, inside)

        return replace(middle, automaton=_Parts(middle.automaton, cut))

    def graft(self, first, second, seconds, hertz):
        """``first``, of which a box lives by the code of ``second`` -> SoundModel, which is no file of one rule.

        Args:
            seconds, hertz: from and to, of the box. It is as long and loud as what lies half-way.

        Raises ValueError for a box that has no frame or does not rise from low to high.
        """
        middle = self.morph(first, second)
        models = [self[name].automaton for name in (first, second)]
        trained, (start, stop), (low, high) = middle.card.n_frames, seconds, hertz
        if not (0 <= start < stop and low < high and start * SAMPLE_RATE / HOP_LENGTH < trained):
            raise ValueError(f"a graft is a box within the sound, from low to high, got {seconds} s, {hertz} Hz")
        centers = mel_centers(models[0].n_mels, middle.card.scale.bands), linear_centers(models[0].n_linear)
        rows = [bands_between(of_grid, hertz) for of_grid in centers]

        def cut(n_frames):
            everything = slice(0, n_frames)
            yield models[0], everything, (..., ...), (..., ...)
            begin, end = (round(second * SAMPLE_RATE / HOP_LENGTH * n_frames / trained) for second in seconds)
            begin = min(begin, n_frames - 1)
            box = [(..., within, slice(begin, max(end, begin + 1))) for within in rows]
            yield models[1], everything, box, box

        return replace(middle, automaton=_Parts(middle.automaton, cut))

    @on_cpu
    @torch.no_grad()
    def become(self, first, second, num_steps, stages=8, on_step=None):
        """A living ``first`` that is handed the code of ``second`` when it has grown, and lives on for so many steps
        -> [GrownSound] at so many ages: before, after 1 step, and on to the last in equal ratios, as it changes fast.

        It has the length of what lies half-way; its level goes from the one to the other. on_step: called with (steps
        done, steps in all).
        """
        if num_steps < 1 or stages < 2:
            raise ValueError(f"to become another takes at least 1 step and 2 stages, got {num_steps} and {stages}")
        n_frames = self.between({first: 0.5, second: 0.5}).card.n_frames
        one, other = self[first], self[second]
        plan = one.plan(n_frames)
        ages = [0, *(round(num_steps ** (stage / max(1, stages - 2))) for stage in range(stages - 1))]
        ages[-1] = num_steps
        grids, grown = one.automaton.seed(n_frames), []
        for rule, steps in [(one, plan.num_steps), *((other, new - old) for old, new in zip(ages, ages[1:]))]:
            if on_step:
                on_step(plan.num_steps * bool(grown) + ages[max(0, len(grown) - 1)], plan.num_steps + num_steps)
            tables = rule.automaton.tables(n_frames, plan.times)
            grids = rule.automaton.rollout(*grids, steps, precision="fp32", tables=tables)
            now = self.morph(first, second, len(grown) / (stages - 1))
            grown.append(now.decode(*rule.automaton.levels(grids)))
        return grown

    def map(self):
        """{name: (x, y)}: the sounds in the plane in which their codes differ most, their first two principal
        components."""
        codes = torch.stack([member.code for member in self.members.values()]).double().cpu()
        codes = codes - codes.mean(dim=0)
        _, _, axes = torch.linalg.svd(codes, full_matrices=False)
        places = codes @ axes[:2].T
        return {name: tuple(place.tolist()) for name, place in zip(self.members, places)}

    def save(self, path):
        """Write one self-contained file, atomically; :func:`load_space` reads it."""
        tensors = dict(self.automaton.state_dict())
        tensors["codes"] = torch.stack([member.code for member in self.members.values()])
        members = {
            name: {"card": asdict(member.card), "pitch_hz": member.pitch_hz, "metrics": member.metrics}
            for name, member in self.members.items()
        }
        write_safetensors(path, tensors, "space", SPACE_VERSION, {"config": self.automaton.config, "members": members})


class _Parts:
    """What a SoundModel needs of an automaton, for a sound whose parts grow by different rules and meet every 4 steps.

    Args:
        middle: the DualSpecTNCA that says what the sound is.
        cut: a function of the number of frames that gives the parts: (rule, the frames that it grows, and, for both
            grids, where that goes in the whole and what of it goes there); later parts lie over earlier ones.
    """

    def __init__(self, middle, cut):
        self._middle, self._cut = middle, cut
        self.growth, self.life_mask, self.places = middle.growth, middle.life_mask, middle.places
        self.knows_time, self.steps_to_fill = middle.knows_time, middle.steps_to_fill
        self.seed, self.levels = middle.seed, middle.levels

    def tables(self, n_frames, times=None, pitch_hz=None):
        """[(rule, its tables, its frames, where it goes, what goes there)]"""
        self._middle.tables(n_frames, times, pitch_hz)  # raises where it knows no such pitch
        ratio = pitch_hz and pitch_hz / self.places.pitch_hz
        parts = []
        for rule, frames, where, what in self._cut(n_frames):
            own_hz = rule.places.pitch_hz
            *rows, columns = rule.tables(n_frames, times, own_hz * ratio if ratio and own_hz else None)
            parts.append((rule, (*rows, columns[..., frames]), frames, where, what))
        return parts

    def rollout(self, grid_mel, grid_linear, num_steps, precision, tables):
        grids = grid_mel, grid_linear
        for done in range(0, num_steps, MEETING_STEPS):
            grown = [torch.empty_like(grid) for grid in grids]
            for rule, known, frames, where, what in tables:
                window = [grid[..., frames] for grid in grids]
                steps = min(MEETING_STEPS, num_steps - done)
                parts = rule.rollout(*window, steps, precision=precision, tables=known)
                for whole, part, goes, of in zip(grown, parts, where, what):
                    whole[goes] = part[of]
            grids = tuple(grown)
        return grids

    def grow(self, n_frames, num_steps, times=None, pitch_hz=None, at=None):
        tables = self.tables(n_frames, times, pitch_hz)
        return self.levels(self.rollout(*self.seed(n_frames, at, times), num_steps, "fp32", tables))


def load_sound(path, sound=None, **options):
    """One learned sound -> SoundModel: that of a run or, of a space, the ``sound`` of that name. ``options`` are those
    of :func:`fastnca.load`.

    Raises ValueError for a name where there is only one sound, and for none or another where there are many.
    """
    loaded = load(path, **options)
    if not isinstance(loaded, Space):
        if sound is not None:
            raise ValueError(f"{path} holds one sound, which has no name: leave out --sound")
        return loaded
    if sound is None:
        raise ValueError(
            f"{path} holds many sounds, {', '.join(loaded)}: say which by --sound, or write it to a file of its own by "
            f'fastnca.load("{path}")["{next(iter(loaded))}"].save("model.safetensors")'
        )
    return loaded[sound]


@on_cpu
def load_space(path, *, backend="auto", vocoder=None, bigvgan=None):
    """Read what :meth:`Space.save` wrote -> Space. The arguments are those of :func:`fastnca.load`.

    Raises FileNotFoundError: no such file. ValueError: damaged, truncated, no space, or of a newer version.
    """
    check_names(backend, "fp32")
    device = choose_device(backend)
    choose_backend(backend, device=device)
    tensors, version, metadata = read_safetensors(path, "space")
    if version > SPACE_VERSION:
        raise ValueError(
            f"{path} was written by a newer fastnca: it has version {version}, and this fastnca reads spaces up to "
            f"{SPACE_VERSION}: update it"
        )
    try:
        config = {**metadata["config"], "context": Places.from_dict(metadata["config"]["context"])}
        codes = tensors.pop("codes")
        automaton = DualSpecTNCA(**config, backend=backend)
        automaton.load_state_dict(tensors)
        members = {}
        for code, (name, entry) in zip(codes, metadata["members"].items(), strict=True):
            card = SoundCard.from_dict(entry["card"])
            card = replace(card, vocoder=vocoder or card.vocoder, bigvgan=bigvgan or card.bigvgan)
            members[name] = Member(code.to(device), card, entry["pitch_hz"], metrics=entry["metrics"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged or of another fastnca: its configuration and its weights do not fit ({reason})"
        ) from error
    decoder = resolve_vocoder(card.vocoder, card.bigvgan)
    decoder.check(card.scale.bands)
    return Space(automaton.to(device), members, decoder)

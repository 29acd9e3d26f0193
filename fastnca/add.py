"""A new sound in a space that has been learned: by its code alone, or with the rule tuned to it."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from .files import check_replaceable, lock, unlock
from .growth import chosen_pitch, measured, trainer_options
from .learning import write_map
from .run import CHECKPOINT_FILE, LOCK_FILE, check_output
from .sound.convention import on_cpu
from .sound.files import load_audio
from .sound.spectrogram import analyze
from .sound_model import LATTICE, LATTICE_STEPS, find_model_file
from .space import Member, Space, load_space
from .training.recipes import RECIPES
from .training.trainer import Budget, Trainer

CODE_LEARNING_RATE = 0.03  # of 16 numbers of about 1 each
TUNE_LEARNING_RATE = 1e-3  # a third of what the rule was learned at


class Addition:
    """A new sound on its way into a space.

    Args:
        space: a Space, which stays as it is. name: of the new sound. samples: [n] at 22.05 kHz. pitch: see RunSettings.
        options: seed, backend, precision and device, of a Trainer.
    """

    def __init__(self, space, name, samples, pitch, options):
        self.name, self.samples, self.options = name, samples, options
        self.automaton, self.members, self.vocoder = space.automaton, dict(space.members), space.vocoder
        card = next(iter(self.members.values())).card
        self.target = analyze(samples, card.scale.bands)
        self.card = replace(card, scale=self.target.scale, n_frames=self.target.n_frames, epochs=0)
        knows_pitch = self.automaton.places.pitch_hz is not None
        self.pitch_hz = chosen_pitch(samples, pitch) if knows_pitch else None
        self.recipe = RECIPES.get(card.recipe, RECIPES["default"])
        self.code = None

    def _grown(self, member):
        """(mel, linear) in dB, soon after life has filled the grids from a lattice of cells."""
        automaton = self.automaton.with_code(member.code, member.pitch_hz)
        return automaton.grow(member.card.n_frames, LATTICE_STEPS, at=LATTICE)

    def _train(self, trainer, text, on_progress):
        while trainer.progress < 1.0:
            row = trainer.train_epoch()
            errors = f"mel {row['mel_l1_db']:.2f} dB, linear {row['linear_l1_db']:.2f} dB off"
            on_progress(trainer.progress, f"{text}, epoch {row['epoch']}: {errors}")
        self.card = replace(self.card, epochs=self.card.epochs + trainer.epoch)

    def learn_code(self, budget, on_progress):
        """Learn the code alone, from that of the sound on with which the new one comes out best."""
        codes = list({tuple(member.code.tolist()): member.code for member in self.members.values()}.values())
        errors = []
        for done, code in enumerate(codes):
            on_progress(done / len(codes), f"trying code {done + 1} of {len(codes)}")
            errors.append(sum(_distances(self._grown(Member(code, self.card, self.pitch_hz)), self.target)))
        nearest = codes[errors.index(min(errors))]
        trainer = Trainer(
            [self.target],
            replace(self.recipe, learning_rate=CODE_LEARNING_RATE),
            budget,
            pitches_hz=[self.pitch_hz],
            start=(self.automaton, {0: nearest}),
            frozen=True,
            **self.options,
        )
        self._train(trainer, "its code", on_progress)
        self.code = trainer.codes[0].detach()

    def tune(self, budget, on_progress):
        """Go on with the rule and all codes: one half of each epoch is the new sound and the other half one of the
        others, whose target is what it grew before, so that it is held."""
        others, before = list(self.members.items()), []
        for done, (name, member) in enumerate(others):
            on_progress(done / len(others), f"growing {name}, to hold it")
            before.append(self.target.with_grids(*self._grown(member)))
        instruments = [0]  # odd numbers for the others: of two sounds in an epoch the first is then the new one
        known = {}
        for _, member in others:
            instruments.append(2 * known.setdefault(tuple(member.code.tolist()), len(known)) + 1)
        codes = dict(zip(instruments, (self.code, *(member.code for _, member in others))))
        trainer = Trainer(
            [self.target, *before],
            replace(self.recipe, learning_rate=TUNE_LEARNING_RATE),
            budget,
            pitches_hz=[self.pitch_hz, *(member.pitch_hz for _, member in others)],
            instruments=instruments,
            batch=2,
            start=(self.automaton, codes),
            **self.options,
        )
        self._train(trainer, "the rule", on_progress)
        self.automaton, self.code = trainer.model, trainer.codes[0].detach()
        for (name, member), number, old in zip(others, instruments[1:], before):
            member = replace(member, code=trainer.codes[number].detach())
            moved = dict(zip(("mel_moved_db", "linear_moved_db"), _distances(self._grown(member), old)))
            self.members[name] = replace(member, metrics=moved)

    def grown(self):
        """The Space with the new sound and its metrics."""
        member = Member(self.code, self.card, self.pitch_hz)
        model = Space(self.automaton, {self.name: member}, self.vocoder)[self.name]
        sound = model.grow()
        member = replace(member, metrics=measured(model, sound, self.target, self.samples))
        return Space(self.automaton, {**self.members, self.name: member}, self.vocoder)


def _distances(grown, target):
    """Mean absolute errors (mel, linear) in dB."""
    return [(mine - its).abs().mean().item() for mine, its in zip(grown, (target.mel_db, target.linear_db))]


@contextmanager
def _owned(folder):
    """The folder, kept from others where it is that of a run."""
    if not (folder / CHECKPOINT_FILE).exists():
        yield
        return
    try:
        held = lock(folder / LOCK_FILE)
    except BlockingIOError as error:
        raise BlockingIOError(f"{folder} is in use by a run; wait for its end, or write elsewhere with -o") from error
    try:
        yield
    finally:
        unlock(held)


@on_cpu
def add(
    path,
    recording,
    out=None,
    *,
    name=None,
    minutes=0.5,
    tune=None,
    duration=3.0,
    pitch="auto",
    seed=0,
    backend="auto",
    precision="auto",
    on_progress=lambda *_: None,
):
    """Add a recording to a space -> (the Space, the name of the sound, its metrics by the code alone).

    Its code is learned; the rule stays as it is, and with it all other sounds. ``tune`` then goes on with the rule, see
    :meth:`Addition.tune`; the metrics of the other sounds are then how far they have moved, as their recordings are not
    at hand. The space file is replaced when all is done.

    Args:
        path: the folder that ``fastnca learn`` wrote, or the space file in it. recording: the path of the sound.
        out: write the space to this file instead. name: of the sound, that of its file if not given.
        minutes: of learning the code. tune: minutes of tuning the rule, None for none.
        duration: seconds of the recording to use, at most. pitch: of the recording, see RunSettings.
        seed, backend, precision: see :func:`fastnca.grow`.
        on_progress: called with (share done, text).

    Raises ValueError, TypeError, OSError for bad input, RuntimeError for a backend that cannot run here,
    TrainingDiverged where the loss exploded and could not be brought back.
    """
    file = find_model_file(path)
    out = file if out is None else Path(out)
    name = Path(recording).stem if name is None else name
    budgets = [None if spent is None else Budget(minutes=spent) for spent in (minutes, tune)]
    options = trainer_options(seed, backend, precision)
    with ExitStack() as stack:
        if out == file:
            stack.enter_context(_owned(file.parent))
            check_replaceable(out)
        else:
            check_output(out)
        space = load_space(file, backend=backend)
        if name in space:
            raise ValueError(f"the space has a sound {name!r} already; choose another name with --name")
        samples, _ = load_audio(recording, duration)
        addition = Addition(space, name, samples, pitch, options)
        addition.learn_code(budgets[0], on_progress)
        result = addition.grown()
        by_code = result.members[name].metrics
        if tune is not None:
            addition.tune(budgets[1], on_progress)
            result = addition.grown()
        result.save(out)
        if out == file and (file.parent / "map.csv").exists():
            write_map(file.parent, result)
    return result, name, by_code

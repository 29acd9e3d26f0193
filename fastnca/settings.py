"""The settings of a run: what was asked for, merged with what an interrupted run was started with."""

import os
from dataclasses import asdict, dataclass, field, replace

from .files import from_fields
from .training.recipes import RECIPES, Recipe, find_recipe
from .training.trainer import Budget

DEFAULT_MINUTES = 10.0
MINUTES_PER_SOUND = 4.0  # of many


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a run learns and how.

    recipe: a Recipe. epochs, minutes: the budget of training in all, whichever ends first; without either, 10 minutes.
    duration: seconds of the recording to use. seed: of every random choice. pitch: of the recording, "auto" to find it,
    "none" for a sound without one, else as ``pitch.read_pitch`` takes it. vocoder, bigvgan: see
    ``vocoder.resolve_vocoder``. backend: "auto" or a name of ``backends.BACKENDS``. precision: of the matrix products
    in training; "auto" takes the faster.
    """

    recipe: Recipe = field(default_factory=lambda: RECIPES["default"])
    epochs: int | None = None
    minutes: float | None = None
    duration: float = 3.0
    seed: int = 0
    pitch: str = "auto"
    vocoder: str = "auto"
    bigvgan: str | None = None
    backend: str = "auto"
    precision: str = "auto"

    fixed = ("recipe", "duration", "seed", "pitch")  # a run that goes on cannot change these
    default_minutes = DEFAULT_MINUTES

    @property
    def budget(self):
        return Budget(self.epochs, self.minutes)

    @classmethod
    def merge(cls, given, stored=None):
        """The settings of a run that is asked for by ``given``.

        Args:
            given: {name: value}; None means the default or what is stored. A recipe may be a name.
            stored: the RunSettings of the run that goes on, if one does.

        Raises TypeError for an unknown name, and ValueError for a value that the run cannot change or no budget at all.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if "recipe" in given:
            given["recipe"] = find_recipe(given["recipe"])
        if os.path.isdir(given.get("bigvgan", "")):
            given["bigvgan"] = os.path.abspath(given["bigvgan"])
        for name in cls.fixed if stored else ():
            before = getattr(stored, name)
            if given.get(name, before) != before:
                before, wanted = (getattr(value, "name", value) for value in (before, given[name]))
                raise ValueError(
                    f"the run was started with {name} {before!r}, which cannot become "
                    f"{'another' if before == wanted else repr(wanted)}; resume without it, or start over with --force"
                )
        if "epochs" in given or "minutes" in given:
            given = {"epochs": None, "minutes": None, **given}
        settings = replace(stored or cls(), **given)
        if settings.epochs is None and settings.minutes is None:
            settings = replace(settings, minutes=settings.default_minutes)
        if settings.epochs is not None or settings.minutes is not None:
            Budget(settings.epochs, settings.minutes)  # raises where they make no budget
        return settings

    def to_dict(self):
        """A JSON-serializable dict; :meth:`from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        return from_fields(cls, {**values, "recipe": from_fields(Recipe, values["recipe"])})


@dataclass(frozen=True)
class SpaceSettings(RunSettings):
    """Those of a run that learns many sounds, and beside them:

    sounds: the paths of the recordings. instruments: whether those of one folder are notes of one instrument, with one
    code. batch: sounds of one epoch; 0 for as many as there are processes. pitch: "auto" or "none". Without epochs or
    minutes it learns for 4 minutes a sound.
    """

    sounds: list = field(default_factory=list)
    instruments: bool = False
    batch: int = 0

    fixed = (*RunSettings.fixed, "instruments", "batch")
    default_minutes = None  # 4 a sound, when it is known which of them can be learned

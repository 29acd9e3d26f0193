"""Recipes: how a model learns its targets, every choice with a name."""

from dataclasses import dataclass

OPTIMIZERS = ("adam", "soap")


@dataclass(frozen=True)
class Recipe:
    """How a model learns its targets. Levels are in dB; the weights are those of the terms of ``losses.RecipeLoss``.

    name: what a run calls it; a changed recipe deserves another name.
    learning_rate, optimizer: "adam", or "soap" of optim.py.
    context: tells every cell its place at every step, and lets life spread from the seeds cell by cell.
    stencil_gain: factor on the initial weights that see the stencils, whose output is larger than the state.
    normalize_gradients: gives every epoch's gradient a norm of 1. Those from seeds have far larger ones than those that
        go on, and would drown them.
    cosine_decay: lets the learning rate decay over the whole budget.
    active_cells_only: judges only cells whose target is above -70 dB, as the prototype did.
    num_steps: of the rollout of one epoch.
    window: frames of the sound that an epoch sees, another part each time; None for all.
    seed_spacing: cells between the seeds of an epoch, None for one seed in the middle of each grid.
    continue_share: share of the epochs that go on from the state that lives beside them, so that the sound learns to
        stay.
    judgements: of an epoch that goes on, spread evenly over its steps: what stays is right on the way too.
    damage_share: share of these that damage it before, so that the sound learns to heal.
    restart_share: share of the other epochs, those from seeds, that replace what lives by what they grew.
    picture_every_epochs: epochs between progress pictures.

    Raises ValueError for an unknown optimizer and a number out of its range.
    """

    name: str
    learning_rate: float
    optimizer: str = "adam"
    context: bool = False
    stencil_gain: float = 1.0
    normalize_gradients: bool = False
    cosine_decay: bool = False
    active_cells_only: bool = False
    mel_weight: float = 1.0
    linear_weight: float = 1.0
    active_weight: float = 0.0
    magnitude_weight: float = 0.0
    texture_weight: float = 0.0
    overflow_weight: float = 0.0
    num_steps: int = 96
    window: int | None = None
    seed_spacing: int | None = None
    continue_share: float = 0.0
    judgements: int = 1
    damage_share: float = 0.0
    restart_share: float = 1.0
    picture_every_epochs: int = 25

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if not 0.0 <= self.continue_share < 1.0:
            raise ValueError(f"continue_share must be from 0 to below 1, got {self.continue_share!r}")
        for name in ("damage_share", "restart_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        for name in ("window", "seed_spacing"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be None or at least 1, got {number!r}")
        if self.judgements < 1:
            raise ValueError(f"judgements must be at least 1, got {self.judgements!r}")


_DEFAULT = Recipe(
    name="default",
    learning_rate=3e-3,  # 5e-3 drifts with age
    optimizer="soap",
    context=True,
    stencil_gain=1 / 8,  # the sum of a Sobel stencil's positive weights is 4, of the Laplacian's 12
    normalize_gradients=True,
    cosine_decay=True,
    linear_weight=2.0,
    active_weight=0.3,  # with the overflow's, or a sound that is mostly silence is learned as silence
    overflow_weight=1.0,
    magnitude_weight=20.0,
    num_steps=8,
    window=22,
    seed_spacing=12,
    continue_share=0.8,
    judgements=2,
    damage_share=0.3,
    restart_share=0.03,
    picture_every_epochs=100,
)
_NOTEBOOK = Recipe(
    name="notebook",
    learning_rate=2e-4,
    active_cells_only=True,
    mel_weight=0.3,
    linear_weight=0.5,
    texture_weight=2.0,
    picture_every_epochs=100,
)
RECIPES = {recipe.name: recipe for recipe in (_DEFAULT, _NOTEBOOK)}


def find_recipe(recipe):
    """The recipe of that name, or ``recipe`` itself if it is one. Raises ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[recipe]

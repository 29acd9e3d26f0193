"""Recipes: how a model learns its targets, every choice with a name."""

from dataclasses import dataclass, replace

OPTIMIZERS = ("adam", "muon")


@dataclass(frozen=True)
class Recipe:
    """How a model learns its targets. Levels are in dB; the weights are those of the terms of ``losses.RecipeLoss``.

    name: what a run calls it; a changed recipe deserves another name.
    learning_rate, optimizer: "adam", or "muon" of optim.py.
    coordinates: of the initial grids, see DualSpecTNCA.
    stencil_gain: factor on the initial weights that see the stencils, whose output is larger than the state.
    cosine_decay: lets the learning rate decay over the whole budget.
    normalize_gradients: scales each parameter's gradient to unit norm.
    active_cells_only: judges only cells whose target is above -70 dB, as the prototype did.
    num_steps: of the rollout of one epoch, and of the growth that is shown.
    continue_share: share of the epochs that go on from what the last one grew, so that the sound learns to stay.
    damage_continued: damages what they go on from, so that the sound learns to heal.
    picture_every_epochs: epochs between progress pictures.

    Raises ValueError for an unknown optimizer and a share outside 0...1.
    """

    name: str
    learning_rate: float
    optimizer: str = "adam"
    coordinates: tuple = ()
    stencil_gain: float = 1.0
    cosine_decay: bool = False
    normalize_gradients: bool = False
    active_cells_only: bool = False
    mel_weight: float = 1.0
    linear_weight: float = 1.0
    active_weight: float = 0.0
    magnitude_weight: float = 0.0
    texture_weight: float = 0.0
    overflow_weight: float = 0.0
    num_steps: int = 96
    continue_share: float = 0.0
    damage_continued: bool = False
    picture_every_epochs: int = 25

    def __post_init__(self):
        object.__setattr__(self, "coordinates", tuple(tuple(entry) for entry in self.coordinates))
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if not 0.0 <= self.continue_share < 1.0:
            raise ValueError(f"continue_share must be from 0 to below 1, got {self.continue_share!r}")


_DEFAULT = Recipe(
    name="default",
    learning_rate=1e-2,  # twice this diverged on the violin
    optimizer="muon",
    coordinates=(
        *(("sin", "f", octave) for octave in range(7)),
        *(("cos", "f", octave) for octave in range(3, 6)),
        ("sin", "t", 0),
        ("cos", "t", 0),
        ("sin", "t", 1),
        ("cos", "t", 1),
    ),
    stencil_gain=1 / 8,  # the sum of a Sobel stencil's positive weights is 4, of the Laplacian's 12
    cosine_decay=True,
    normalize_gradients=True,
    linear_weight=2.0,
    active_weight=0.3,  # with the overflow's, or a sound that is mostly silence is learned as silence
    overflow_weight=1.0,
    magnitude_weight=20.0,
    continue_share=0.1,
)
_REGENERATE = replace(_DEFAULT, name="regenerate", continue_share=0.3, damage_continued=True)
_NOTEBOOK = Recipe(
    name="notebook",
    learning_rate=2e-4,
    active_cells_only=True,
    mel_weight=0.3,
    linear_weight=0.5,
    texture_weight=2.0,
    picture_every_epochs=100,
)
RECIPES = {recipe.name: recipe for recipe in (_DEFAULT, _REGENERATE, _NOTEBOOK)}


def find_recipe(recipe):
    """The recipe of that name, or ``recipe`` itself if it is one. Raises ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[recipe]

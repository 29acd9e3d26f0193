"""What grown spectrograms are judged by while they are learned: terms with names, and their weighted sum."""

import torch
import torch.nn.functional as F
from torch import nn

from ..sound.convention import ACTIVE_DB

OVERFLOW = 2.0  # coordinates are within 1, and tanh(2) is -79 dB


class PerceptualLoss(nn.Module):
    """The notebook's texture loss: squared distance of Gram matrices of a fixed random convolutional network.

    Inputs are [N, 1, H, W] in dB. The network is never trained; its weights come from torch's global generator at
    construction, as in the notebook, so seed that first (Gram matrices: Gatys et al. 2015, arXiv:1505.07376).
    """

    def __init__(self, device=None):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(1, 16, 7, 2, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
        ).to(device)

    def gram_matrix(self, features):
        """[N, C, H, W] -> [N, C, C], divided by C * H * W."""
        n, c, h, w = features.shape
        features = features.reshape(n, c, h * w)
        return torch.bmm(features, features.transpose(1, 2)) / (c * h * w)

    def forward(self, generated, target):
        return F.mse_loss(
            self.gram_matrix(self.feature_extractor(generated)),
            self.gram_matrix(self.feature_extractor(target)),
        )


class RecipeLoss(nn.Module):
    """The weighted sum of named terms that a recipe judges by, as a mean over the targets of a batch.

    Of each grid, ``mel`` and ``linear``, times ``mel_weight`` and ``linear_weight``:

    - ``level``, weight 1: mean absolute error in dB over all cells. All count alike, silence and sound.
    - ``active``, ``active_weight``: the same over the cells whose target is above -70 dB, however few they are.
      Without it a sound that is mostly silence is learned as silence.
    - ``magnitude``, ``magnitude_weight``: mean absolute error of the square root of the magnitude, which the loud
      cells dominate: what is heard first.

    And once:

    - ``texture``, ``texture_weight``: :class:`PerceptualLoss` of the mel grid; likeness without place.
    - ``overflow``, ``overflow_weight``: mean excess of the state's values over -2...2. It keeps hidden channels from
      running away, and values where tanh still has a slope.

    With ``active_cells_only`` the level and the texture see only the cells whose target is above -70 dB.
    A term whose weight is 0 is not computed.
    """

    def __init__(self, recipe, device=None):
        super().__init__()
        self.recipe = recipe
        self.texture = PerceptualLoss(device).requires_grad_(False) if recipe.texture_weight else None

    def forward(self, grids, levels, targets):
        """Judges a batch of N.

        Args:
            grids: both grown grids, [N, C, 80, T] and [N, C, 513, T].
            levels: the same, decoded to dB: [N, 80, T] and [N, 513, T].
            targets: what they should be, in dB.

        Returns:
            (loss, terms): a scalar to differentiate, and {name: scalar}, the weighted terms that it is the sum of.
        """
        terms = {}
        losses = []
        weights = {"mel": self.recipe.mel_weight, "linear": self.recipe.linear_weight}
        for (name, weight), level, target in zip(weights.items(), levels, targets, strict=True):
            loss = 0.0
            for term, value in self._grid_terms(level, target):
                loss = loss + value
                terms[f"{name}_{term}"] = weight * value.detach()
            losses.append(weight * loss)
        if self.texture is not None:
            mel_db, target = (self._judged(x, targets[0])[:, None] for x in (levels[0], targets[0]))
            texture = self.recipe.texture_weight * self.texture(mel_db, target)
            losses[0] = losses[0] + texture
            terms["texture"] = texture.detach()
        loss = sum(losses)
        if self.recipe.overflow_weight:
            excess = sum((grid.abs() - OVERFLOW).clamp(min=0.0).mean() for grid in grids)
            overflow = self.recipe.overflow_weight * excess
            loss = loss + overflow
            terms["overflow"] = overflow.detach()
        return loss, terms

    def _grid_terms(self, level, target):
        yield "level", F.l1_loss(self._judged(level, target), self._judged(target, target))
        if self.recipe.active_weight:
            active = _active(target)
            distance = (level * active - target * active).abs().sum(dim=(1, 2))
            yield "active", (self.recipe.active_weight * distance / active.sum(dim=(1, 2)).clamp(min=1.0)).mean()
        if self.recipe.magnitude_weight:  # 10^(dB / 40) is the square root of 10^(dB / 20), the magnitude
            distance = F.l1_loss(10.0 ** (level / 40.0), 10.0 ** (target / 40.0))
            yield "magnitude", self.recipe.magnitude_weight * distance

    def _judged(self, level, target):
        return level * _active(target) if self.recipe.active_cells_only else level


def _active(target):
    return (target > ACTIVE_DB).to(target.dtype)

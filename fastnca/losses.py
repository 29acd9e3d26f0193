"""What a grown spectrogram is judged by while it learns."""

import torch
import torch.nn.functional as F
from torch import nn


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

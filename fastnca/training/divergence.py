"""When training goes wrong, and how it is seen in the losses."""

import math
from statistics import fmean

DIVERGING = 4.0  # times the lowest loss so far; young losses jump by less
CLIMBING = 1.25  # times the lowest mean of RECENT losses so far, see docs/experiments.md
RECENT = 20


class TrainingDiverged(RuntimeError):
    """The loss exploded, and going on from its lowest value did not help; the trainer is back there."""


class DivergenceGuard:
    """Watches the losses of the epochs that began at the seed.

    Training has diverged at once where a loss is not finite or a multiple of the lowest one, and slowly where the mean
    of the last losses has climbed above the lowest such mean.
    """

    def __init__(self):
        self.lowest_loss = math.inf
        self.lowest_mean = math.inf  # of RECENT losses in a row
        self.recent = []

    def exploded(self, loss):
        """Whether a loss is not finite, or far above the lowest so far."""
        return not (math.isfinite(loss) and loss <= DIVERGING * self.lowest_loss)

    def climbing(self):
        """Whether the losses so far have been climbing for long."""
        return len(self.recent) == RECENT and fmean(self.recent) > CLIMBING * self.lowest_mean

    def record(self, loss):
        """Takes a loss into account -> whether it is the lowest so far."""
        self.recent = [*self.recent, loss][-RECENT:]
        if len(self.recent) == RECENT:
            self.lowest_mean = min(self.lowest_mean, fmean(self.recent))
        if loss < self.lowest_loss:
            self.lowest_loss = loss
            return True
        return False

    def step_back(self):
        """Training goes on from the lowest loss: what came after it is forgotten."""
        self.recent = []

    def state_dict(self):
        """The numbers of a checkpoint."""
        return {"lowest_loss": self.lowest_loss, "lowest_mean": self.lowest_mean, "recent": self.recent}

    def load_state_dict(self, numbers):
        self.lowest_loss, self.lowest_mean, self.recent = (
            numbers[name] for name in ("lowest_loss", "lowest_mean", "recent")
        )

"""When training goes wrong, and how it is seen in the losses."""

import math
from statistics import fmean

DIVERGING = 4.0  # times the highest of the recent losses
CLIMBING = 1.5  # times the lowest mean of recent losses so far, see docs/experiments.md
RECENT = 50  # losses, or a few more for whole sweeps


class TrainingDiverged(RuntimeError):
    """The loss exploded, and going on from its lowest value did not help; the trainer is back there."""


class DivergenceGuard:
    """Watches the losses of the epochs that began at seeds.

    Training has diverged at once where a loss is not finite or a multiple of all recent ones, and slowly where the mean
    of the recent losses has climbed above the lowest such mean.

    Args:
        sweep: so many losses in a row judge the whole sound, each another part of it. Some parts are harder to learn
            than others, so recent losses are compared by whole sweeps.
    """

    def __init__(self, sweep=1):
        self.span = sweep * math.ceil(RECENT / sweep)
        self.lowest_mean = math.inf  # of ``span`` losses in a row
        self.recent = []

    def exploded(self, loss):
        """Whether a loss is not finite, or far above the recent ones."""
        return not (math.isfinite(loss) and loss <= DIVERGING * max(self.recent, default=math.inf))

    def climbing(self):
        """Whether the losses so far have been climbing for long."""
        return len(self.recent) == self.span and fmean(self.recent) > CLIMBING * self.lowest_mean

    def record(self, loss):
        """Takes a loss into account -> whether the recent ones are the lowest so far. (All of the first ones are.)"""
        self.recent = [*self.recent, loss][-self.span :]
        if len(self.recent) < self.span:
            return math.isinf(self.lowest_mean)
        lowest = fmean(self.recent) <= self.lowest_mean
        if lowest:
            self.lowest_mean = fmean(self.recent)
        return lowest

    def step_back(self):
        """Training goes on from the lowest losses: what came after them is forgotten."""
        self.recent = []

    def state_dict(self):
        """The numbers of a checkpoint."""
        return {"lowest_mean": self.lowest_mean, "recent": self.recent}

    def load_state_dict(self, numbers):
        self.lowest_mean, self.recent = numbers["lowest_mean"], numbers["recent"]

"""DualSpecTNCA: one rule, two grids."""

import math
import numbers
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from .automaton import ops, reference
from .automaton.backends import check_names, choose_backend
from .automaton.rule import ALPHA, CHANNELS, HIDDEN1, HIDDEN2, VALUE, perception
from .context import Context, Gates
from .sound.convention import DB_RANGE, N_LINEAR, N_MELS, on_cpu

TIMES = ("stretch", "sustain")
RULE_LAYERS = (nn.Sequential, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d)
CONTEXT_LAYERS = (Context, nn.Linear, nn.Linear)
GATE_LAYERS = (Gates, nn.Linear, nn.Linear, nn.Linear)


def decode_db(grid):
    """The sound that a grid shows: its channel 0 as decibels below the reference level.

    ``grid`` [N, C, H, W] -> [N, H, W] in dB, ``tanh(grid[:, 0]) * 40 - 40``, so between -80 and 0.

    >>> decode_db(torch.zeros(1, 16, 80, 8)).shape
    torch.Size([1, 80, 8])
    """
    return torch.tanh(grid[:, VALUE]) * (DB_RANGE / 2) - DB_RANGE / 2


@on_cpu
def frame_times(n_frames, trained_frames, time="stretch"):
    """The place in the sound of each of ``n_frames`` frames, for a model that learned ``trained_frames`` -> [n_frames].

    "stretch" spreads the whole sound over the frames. "sustain" lets it begin and end at the pace that it was learned
    at: a longer sound holds its middle, a shorter one hurries through what is between its first and last quarter.

    Raises ValueError for another name.
    """
    if time not in TIMES:
        raise ValueError(f"unknown time {time!r}: expected one of {', '.join(TIMES)}")
    if time == "stretch":
        return torch.linspace(-1.0, 1.0, n_frames)
    last = n_frames - 1
    at_pace = (trained_frames - 1) / 2 if n_frames >= trained_frames else last / 4
    place = -1.0 + 2.0 * at_pace / max(1, trained_frames - 1)
    frames, places = (0.0, at_pace, last - at_pace, last), (-1.0, place, -place, 1.0)
    return torch.from_numpy(np.interp(np.arange(n_frames), frames, places)).float()


class DualSpecTNCA(nn.Module):
    """A neural cellular automaton whose one rule grows a mel and a linear spectrogram at once.

    Grids are [N, num_channels, H, T]: H = ``n_mels`` or ``n_linear`` bands from low to high, T time frames; channel 0
    is the value (see :func:`decode_db`), channel 1 alpha (life), the rest hidden. The rule is written out in
    ``fastnca/automaton/reference.py``. The parameters carry the notebook's names, so its ``state_dict`` loads as it is.

    Args:
        life_mask: False leaves out the alpha clamp and the life mask, as the notebook in fact ran.
        context: a context.Places tells every cell its place at every step; None does not.
        growth: only cells with life in their neighborhood change, so that life spreads from the seed by one cell a
            step. Needs the life mask.
        backend: "auto" or a name from ``fastnca info``; ``model.backend`` says which one runs.
        precision: "fp32", or "tf32" / "bf16" for the matrix products of a backend that has them.
        coordinates: of models from before context. Fourier features of a cell's place, written into the hidden channels
            of the initial grids: entries (function, axis, octave) with function "sin" or "cos", axis "f" (band) or "t"
            (frame), both running from -1 to 1 over the grid; entry i fills channel 2 + i with
            ``function(pi * 2**octave * axis)``.

    Raises:
        ValueError: a size, name or coordinate that does not fit. RuntimeError: a named backend that cannot run, with
        the reason (when first used, since it depends on where the parameters are).
    """

    def __init__(
        self,
        num_channels=CHANNELS,
        n_mels=N_MELS,
        n_linear=N_LINEAR,
        life_mask=True,
        backend="auto",
        precision="fp32",
        context=None,
        growth=False,
        coordinates=(),
    ):
        super().__init__()
        num_channels = _checked_size("num_channels", num_channels, 2)  # value and alpha
        n_mels, n_linear = _checked_size("n_mels", n_mels, 1), _checked_size("n_linear", n_linear, 1)
        check_names(backend, precision)
        if growth and not life_mask:
            raise ValueError("growth needs the life mask: without it nothing says what lives")
        self.num_channels = num_channels
        self.n_mels = n_mels
        self.n_linear = n_linear
        self.life_mask = bool(life_mask)
        self.growth = bool(growth)
        self.precision = precision
        self.coordinates = _checked_coordinates(coordinates, num_channels)
        self._requested_backend = backend

        self.update_mlp = nn.Sequential(
            nn.Conv2d(perception(num_channels), HIDDEN1, 1),
            nn.ReLU(),
            nn.Conv2d(HIDDEN1, HIDDEN2, 1),
            nn.ReLU(),
            nn.Conv2d(HIDDEN2, num_channels, 1),
        )
        nn.init.zeros_(self.update_mlp[-1].weight)
        nn.init.zeros_(self.update_mlp[-1].bias)
        self.update_mlp[-1].bias.data[ALPHA] = 1.0
        self.context = None if context is None else Context(context, n_mels, n_linear)

    @property
    def weights(self):
        """(w1, b1, w2, b2, w3, b3), the w's [out, in, 1, 1], with what parametrizations make of them.

        Raises RuntimeError where the layers are no longer those of the rule, which the kernels would not see.
        """
        _check_layers("update_mlp", self.update_mlp, RULE_LAYERS)
        if self.context is not None:
            gates = [layer for layer in self.context._modules.values() if isinstance(layer, Gates)]
            _check_layers("context", self.context, (*CONTEXT_LAYERS, *(Gates for _ in gates)))
            for layers in gates:
                _check_layers("context", layers, GATE_LAYERS)
        return tuple(tensor for layer in self.update_mlp[::2] for tensor in (layer.weight, layer.bias))

    @property
    def places(self):
        """The Places of the context, or None."""
        return self.context and self.context.places

    @property
    def backend(self):
        """The backend that runs for the parameters' present device and dtype."""
        weight = self.update_mlp[0].weight
        return choose_backend(
            self._requested_backend,
            device=weight.device,
            dtype=weight.dtype,
            num_channels=self.num_channels,
            precision=self.precision,
        )

    @property
    def knows_time(self):
        """Whether a cell is told its place in time."""
        return self.context is not None or any(axis == "t" for _, axis, _ in self.coordinates)

    def extra_repr(self):
        return (
            f"num_channels={self.num_channels}, n_mels={self.n_mels}, n_linear={self.n_linear}, "
            f"life_mask={self.life_mask}, growth={self.growth}, backend={self._requested_backend!r}, "
            f"precision={self.precision!r}"
        )

    def seed(self, n_frames, at=None, times=None):
        """Initial grids ([1, C, n_mels, n_frames], [1, C, n_linear, n_frames]), empty but for the live seed cells.

        Args:
            at: where life begins: None for one cell in the middle of each grid; places [(band, frame), ...], both as
                shares of the grid from 0 to 1; or an integer k for a lattice of cells, k apart in both directions.
            times: [n_frames], see :func:`frame_times`; for the coordinates of models that have them.

        Raises TypeError or ValueError for what is none of these, and for a place outside the grid.
        """
        if not isinstance(n_frames, numbers.Integral) or n_frames < 1:
            raise ValueError(f"n_frames must be an integer of at least 1, got {n_frames!r}")
        times = self._checked_times(n_frames, times)
        at = _checked_seeds(at)
        return self._seed_grid(self.n_mels, at, times), self._seed_grid(self.n_linear, at, times)

    def _checked_times(self, n_frames, times):
        weight = self.update_mlp[0].weight
        if times is None:
            return torch.linspace(-1.0, 1.0, n_frames, dtype=weight.dtype, device=weight.device)
        times = torch.as_tensor(times).to(weight)
        if times.shape != (n_frames,):
            raise ValueError(f"times must have shape [{n_frames}], one place per frame, got {list(times.shape)}")
        return times

    def _seed_grid(self, height, at, times):
        width = len(times)
        grid = times.new_zeros(1, self.num_channels, height, width)
        if isinstance(at, numbers.Integral):
            grid[:, ALPHA, (height - 1) % at // 2 :: at, (width - 1) % at // 2 :: at] = 1.0
        else:
            for place in at:
                grid[(slice(None), ALPHA, *_cell(place, height, width))] = 1.0
        for channel, (function, axis, octave) in enumerate(self.coordinates, start=2):
            places = times
            if axis == "f":
                places = torch.linspace(-1.0, 1.0, height, dtype=times.dtype, device=times.device)
            wave = getattr(torch, function)(math.pi * 2.0**octave * places)
            grid[:, channel] = wave[:, None] if axis == "f" else wave
        return grid

    def steps_to_fill(self, n_frames, at=None):
        """Steps until life, which spreads by one cell a step, can have reached every cell of both grids. ``at`` as in
        :meth:`seed`. Without growth life is everywhere after one step."""
        if not self.growth:
            return 1
        at = _checked_seeds(at)
        if isinstance(at, numbers.Integral):
            return at
        farthest = 0
        for height in (self.n_mels, self.n_linear):
            distance = np.full((height, n_frames), max(height, n_frames))
            for y, x in (_cell(place, height, n_frames) for place in at):
                rows, columns = abs(np.arange(height) - y), abs(np.arange(n_frames) - x)
                distance = np.minimum(distance, np.maximum(rows[:, None], columns))
            farthest = max(farthest, int(distance.max()))
        return farthest

    def tables(self, n_frames, times=None, pitch_hz=None):
        """The tables of context for ``n_frames`` frames, as :meth:`rollout` takes them, or None without context.

        ``times`` [n_frames] gives each frame's place in the sound, -1 its start and 1 its end; by default the frames
        share the whole sound evenly (see :func:`frame_times`). ``pitch_hz`` is the pitch to grow at, the recording's if
        not given.

        Raises ValueError for another length, or a pitch that the model does not know.
        """
        times = self._checked_times(n_frames, times)
        if self.context is not None:
            return self.context(times, pitch_hz)
        if pitch_hz is not None:
            raise ValueError("the model has no context: it cannot grow at another pitch")
        return None

    @torch.no_grad()
    def with_code(self, code, pitch_hz=None, tonality=1.0):
        """The rule of one sound of many, as a model that knows no codes: what a code does is linear in a place's
        coordinates, so the layers take it up.

        Args:
            code: [code_size], the sound's. pitch_hz: the sound's own, None for a sound without one.
            tonality: from 1 for a sound with that pitch to 0 for one without, to which its partials do not matter.
        """
        one = DualSpecTNCA(
            **{**self.config, "context": replace(self.places, code_size=0, pitch_hz=pitch_hz)},
            backend=self._requested_backend,
            precision=self.precision,
        )
        one.update_mlp.load_state_dict(self.update_mlp.state_dict())
        one.context, bias = self.context.with_code(code, pitch_hz, tonality)
        one.to(self.update_mlp[0].weight)
        one.update_mlp[0].bias += bias
        return one

    def perceive(self, grid):
        """[N, C, H, W] -> [N, 4C, H, W]: the grid, its Sobel x and y gradients and its Laplacian."""
        return reference.perceive(grid)

    def forward(self, grid_mel, grid_linear, num_steps=1, **options):
        """``num_steps`` steps of both grids, one as in the notebook: :meth:`rollout`, for what wraps a module and calls
        it, such as DistributedDataParallel, ``torch.func.functional_call`` and hooks."""
        return self.rollout(grid_mel, grid_linear, num_steps, **options)

    def rollout(self, grid_mel, grid_linear, num_steps=96, checkpoint_every=None, precision=None, tables=None):
        """``num_steps`` steps of both grids, differentiable with respect to both grids and all parameters.

        ``tables`` is what :meth:`tables` gave for these frames, the whole sound if not given.

        ``checkpoint_every=k`` keeps every k-th state for the backward pass and replays the steps between, which
        trades time for memory and leaves the gradient as it is. ``precision`` is the model's own if not given.

        >>> model = DualSpecTNCA()
        >>> mel, linear = model.rollout(*model.seed(n_frames=8), num_steps=2)
        >>> mel.shape, linear.shape
        (torch.Size([1, 16, 80, 8]), torch.Size([1, 16, 513, 8]))
        """
        for name, grid, bands in (("grid_mel", grid_mel, self.n_mels), ("grid_linear", grid_linear, self.n_linear)):
            shape = list(grid.shape) if isinstance(grid, torch.Tensor) else type(grid).__name__
            if isinstance(shape, str) or len(shape) != 4 or shape[1:3] != [self.num_channels, bands]:
                raise ValueError(f"{name} must have shape [N, {self.num_channels}, {bands}, T], got {shape}")
        if grid_mel.shape[3] != grid_linear.shape[3]:
            raise ValueError(
                "grid_mel and grid_linear must have the same number of frames, "
                f"got {grid_mel.shape[3]} and {grid_linear.shape[3]}"
            )
        return ops.rollout(
            grid_mel,
            grid_linear,
            self.weights,
            num_steps,
            context=tables or self.tables(grid_mel.shape[3]),
            growth=self.growth,
            life_mask=self.life_mask,
            checkpoint_every=checkpoint_every,
            precision=precision or self.precision,
            backend=self._requested_backend,
        )

    @torch.no_grad()
    def grow(self, n_frames, num_steps=96, times=None, pitch_hz=None, at=None):
        """Grow both grids from their seeds -> (mel_db [n_mels, T], linear_db [n_linear, T]), on the CPU.

        The products are float32, whatever the model's precision: a sound is the same on any machine, but for rounding.
        ``at`` as in :meth:`seed`, ``times`` [n_frames] and ``pitch_hz`` as in :meth:`tables`.
        """
        tables = self.tables(n_frames, times, pitch_hz)
        grids = self.rollout(*self.seed(n_frames, at, times), num_steps, precision="fp32", tables=tables)
        return self.levels(grids)

    def levels(self, grids):
        """The sound that both grids show, [1, C, bands, T] each -> (mel_db [n_mels, T], linear_db [n_linear, T]), on
        the CPU: as :func:`decode_db`, but where the rule has growth, cells that life has not reached are silent."""
        levels = []
        for grid in grids:
            level = decode_db(grid)
            if self.growth:
                level = torch.where(reference.alive(grid)[:, 0], level, -DB_RANGE)
            levels.append(level[0].float().cpu())
        return tuple(levels)

    @property
    def config(self):
        """What, beside the weights, makes this model: the constructor's arguments but for backend and precision."""
        return {
            "num_channels": self.num_channels,
            "n_mels": self.n_mels,
            "n_linear": self.n_linear,
            "life_mask": self.life_mask,
            "context": self.context and asdict(self.places),
            "growth": self.growth,
            "coordinates": [list(entry) for entry in self.coordinates],
        }


def _checked_size(name, size, least):
    if not isinstance(size, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {size!r}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return int(size)


def _check_layers(name, module, expected):
    """Raises RuntimeError unless the module and its layers are plain ones of those types: the kernels run the rule, and
    not the layers."""
    layers = [module, *module._modules.values()]
    way = (
        "the rule runs in kernels that see the layers' weights alone: put back the layers that the model was made with"
    )
    found, wanted = (", ".join(kind.__name__ for kind in kinds) for kinds in (map(_kind, layers), expected))
    if found != wanted:
        raise RuntimeError(f"{name} is made of {found} in place of {wanted}, but {way}")
    for layer in layers:
        hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
        if any(hooks) or "forward" in vars(layer):
            raise RuntimeError(f"a hook or a new forward of {name}, also one of pruning, would not be called: {way}")


def _kind(layer):
    return parametrize.type_before_parametrizations(layer)


def _checked_seeds(at):
    """The argument ``at`` of DualSpecTNCA.seed, completed."""
    if at is None:
        return [(0.5, 0.5)]
    if isinstance(at, numbers.Integral):
        if at < 1:
            raise ValueError(f"seeds must be at least 1 cell apart, got {at}")
        return at
    places = [tuple(place) for place in at]
    if not places:
        raise ValueError("at least one cell must live, got no place for a seed")
    for place in places:
        if len(place) != 2 or not all(0 <= share <= 1 for share in place):
            raise ValueError(f"a seed's place is (band, frame), shares of the grid from 0 to 1, got {place!r}")
    return places


def _cell(place, height, width):
    """The cell (y, x) at a place (band, frame)."""
    return tuple(min(int(share * size), size - 1) for share, size in zip(place, (height, width)))


def _checked_coordinates(coordinates, num_channels):
    coordinates = tuple(tuple(entry) for entry in coordinates)
    if len(coordinates) > num_channels - 2:
        raise ValueError(f"{len(coordinates)} coordinates do not fit into {num_channels - 2} hidden channels")
    for entry in coordinates:
        fits = len(entry) == 3 and entry[0] in ("sin", "cos") and entry[1] in ("f", "t")
        if not fits or not isinstance(entry[2], numbers.Real):
            raise ValueError(f'a coordinate is ("sin" or "cos", "f" or "t", octave), got {entry!r}')
    return coordinates

"""DualSpecTNCA: one rule, two grids."""

import json
import math
import numbers
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import backends, ops, reference
from .files import atomic_write

MODEL_FORMAT = "fastnca-model-1"
TIMES = ("stretch", "sustain")


def decode_db(grid):
    """The sound a grid shows: its channel 0 as decibels below the reference level.

    ``grid`` [N, C, H, W] -> [N, H, W] in dB, ``tanh(grid[:, 0]) * 40 - 40``, so between -80 and 0.
    """
    return torch.tanh(grid[:, 0]) * 40.0 - 40.0


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
    ``fastnca/reference.py``. The parameters carry the notebook's names, so its ``state_dict`` loads as it is.

    Args:
        life_mask: False leaves out the alpha clamp and the life mask, as the notebook in fact ran.
        backend: "auto" or a name from ``fastnca info``; ``model.backend`` says which one runs.
        precision: "fp32", or "tf32" / "bf16" for the matrix products of a backend that has them.
        coordinates: Fourier features of a cell's place, written into the hidden channels of the initial grids:
            entries (function, axis, octave) with function "sin" or "cos", axis "f" (band) or "t" (frame), both running
            from -1 to 1 over the grid; entry i fills channel 2 + i with ``function(pi * 2**octave * axis)``.

    Raises:
        ValueError: a size, name or coordinate that does not fit. RuntimeError: a named backend that cannot run, with
        the reason (when first used, since it depends on where the parameters are).
    """

    def __init__(
        self,
        num_channels=16,
        n_mels=80,
        n_linear=513,
        life_mask=True,
        backend="auto",
        precision="fp32",
        coordinates=(),
    ):
        super().__init__()
        if num_channels < 2:
            raise ValueError(f"num_channels must be at least 2 (value and alpha), got {num_channels}")
        if n_mels < 1 or n_linear < 1:
            raise ValueError(f"n_mels and n_linear must be at least 1, got {n_mels} and {n_linear}")
        backends.check_names(backend, precision)
        self.num_channels = num_channels
        self.n_mels = n_mels
        self.n_linear = n_linear
        self.life_mask = bool(life_mask)
        self.precision = precision
        self.coordinates = _checked_coordinates(coordinates, num_channels)
        self._requested_backend = backend

        self.update_mlp = nn.Sequential(
            nn.Conv2d(4 * num_channels, 128, 1),
            nn.ReLU(),
            nn.Conv2d(128, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, num_channels, 1),
        )
        nn.init.zeros_(self.update_mlp[-1].weight)
        nn.init.zeros_(self.update_mlp[-1].bias)
        self.update_mlp[-1].bias.data[1] = 1.0

    @property
    def weights(self):
        """(w1, b1, w2, b2, w3, b3), the w's [out, in, 1, 1]."""
        return tuple(self.update_mlp.parameters())

    @property
    def backend(self):
        """The backend that runs for the parameters' present device and dtype."""
        weight = self.update_mlp[0].weight
        return backends.choose_backend(
            self._requested_backend,
            device=weight.device,
            dtype=weight.dtype,
            num_channels=self.num_channels,
            precision=self.precision,
        )

    def extra_repr(self):
        return (
            f"num_channels={self.num_channels}, n_mels={self.n_mels}, n_linear={self.n_linear}, "
            f"life_mask={self.life_mask}, backend={self._requested_backend!r}, precision={self.precision!r}"
        )

    def seed(self, n_frames, times=None):
        """Initial grids ([1, C, n_mels, n_frames], [1, C, n_linear, n_frames]): one live cell in the middle of each,
        and the model's coordinates in the hidden channels.

        ``times`` [n_frames] gives each frame's place in the sound, -1 its start and 1 its end; by default the frames
        share the whole sound evenly (see :func:`frame_times`).
        """
        if not isinstance(n_frames, numbers.Integral) or n_frames < 1:
            raise ValueError(f"n_frames must be an integer of at least 1, got {n_frames!r}")
        weight = self.update_mlp[0].weight
        if times is None:
            times = torch.linspace(-1.0, 1.0, n_frames, dtype=weight.dtype, device=weight.device)
        times = torch.as_tensor(times).to(weight)
        if times.shape != (n_frames,):
            raise ValueError(f"times must have shape [{n_frames}], one place per frame, got {list(times.shape)}")
        return self._seed_grid(self.n_mels, times), self._seed_grid(self.n_linear, times)

    def _seed_grid(self, height, times):
        width = len(times)
        grid = times.new_zeros(1, self.num_channels, height, width)
        grid[:, 1, height // 2, width // 2] = 1.0
        for channel, (function, axis, octave) in enumerate(self.coordinates, start=2):
            places = times
            if axis == "f":
                places = torch.linspace(-1.0, 1.0, height, dtype=times.dtype, device=times.device)
            wave = getattr(torch, function)(math.pi * 2.0**octave * places)
            grid[:, channel] = wave[:, None] if axis == "f" else wave
        return grid

    def perceive(self, grid):
        """[N, C, H, W] -> [N, 4C, H, W]: the grid, its Sobel x and y gradients and its Laplacian."""
        return reference.perceive(grid)

    def forward(self, grid_mel, grid_linear):
        """One step of both grids, the notebook's signature."""
        return self.rollout(grid_mel, grid_linear, num_steps=1)

    def rollout(self, grid_mel, grid_linear, num_steps=96, checkpoint_every=None):
        """``num_steps`` steps of both grids, differentiable with respect to both grids and all parameters.

        ``checkpoint_every=k`` keeps every k-th state for the backward pass and replays the steps between, which
        trades time for memory and leaves the gradient as it is.
        """
        self._check_grids(grid_mel, grid_linear)
        if not isinstance(num_steps, numbers.Integral) or num_steps < 0:
            raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
        if checkpoint_every is not None and (
            not isinstance(checkpoint_every, numbers.Integral) or checkpoint_every < 1
        ):
            raise ValueError(f"checkpoint_every must be None or an integer of at least 1, got {checkpoint_every!r}")
        backend = self.backend
        if backend != "reference":
            return ops.rollout(
                grid_mel,
                grid_linear,
                self.weights,
                num_steps,
                life_mask=self.life_mask,
                checkpoint_every=checkpoint_every,
                precision=self.precision,
                backend=backend,
            )
        return tuple(self._reference_rollout(grid, num_steps, checkpoint_every) for grid in (grid_mel, grid_linear))

    @torch.no_grad()
    def grow(self, n_frames, num_steps=96, times=None):
        """Grow both grids from their seeds -> (mel_db [n_mels, T], linear_db [n_linear, T]) on the CPU.

        ``times`` [n_frames] as in :meth:`seed`.
        """
        grids = self.rollout(*self.seed(n_frames, times), num_steps)
        return tuple(decode_db(grid)[0].float().cpu() for grid in grids)

    def _reference_rollout(self, grid, num_steps, checkpoint_every):
        if checkpoint_every is None or not torch.is_grad_enabled():
            return reference.rollout(grid, self.weights, num_steps, self.life_mask)
        for done in range(0, num_steps, checkpoint_every):
            steps = min(checkpoint_every, num_steps - done)
            grid = checkpoint(reference.rollout, grid, self.weights, steps, self.life_mask, use_reentrant=False)
        return grid

    def _check_grids(self, grid_mel, grid_linear):
        weight = self.update_mlp[0].weight
        for name, grid, bands in (("grid_mel", grid_mel, self.n_mels), ("grid_linear", grid_linear, self.n_linear)):
            if not isinstance(grid, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(grid).__name__}")
            if grid.dim() != 4 or grid.shape[1] != self.num_channels or grid.shape[2] != bands or 0 in grid.shape:
                raise ValueError(
                    f"{name} must have shape [N, {self.num_channels}, {bands}, T] with N and T at least 1, "
                    f"got {list(grid.shape)}"
                )
            if grid.dtype != weight.dtype:
                raise TypeError(f"{name} must have the parameters' dtype {weight.dtype}, got {grid.dtype}")
            if grid.device != weight.device:
                raise ValueError(f"{name} must be on the parameters' device {weight.device}, got {grid.device}")
        if grid_mel.shape[0] != grid_linear.shape[0] or grid_mel.shape[3] != grid_linear.shape[3]:
            raise ValueError(
                "grid_mel and grid_linear must have the same batch size and number of frames, "
                f"got {list(grid_mel.shape)} and {list(grid_linear.shape)}"
            )

    @property
    def config(self):
        """What, beside the weights, makes this model: the constructor's arguments but for backend and precision."""
        return {
            "num_channels": self.num_channels,
            "n_mels": self.n_mels,
            "n_linear": self.n_linear,
            "life_mask": self.life_mask,
            "coordinates": [list(entry) for entry in self.coordinates],
        }


def _checked_coordinates(coordinates, num_channels):
    coordinates = tuple(tuple(entry) for entry in coordinates)
    if len(coordinates) > num_channels - 2:
        raise ValueError(f"{len(coordinates)} coordinates do not fit into {num_channels - 2} hidden channels")
    for entry in coordinates:
        fits = len(entry) == 3 and entry[0] in ("sin", "cos") and entry[1] in ("f", "t")
        if not fits or not isinstance(entry[2], numbers.Real):
            raise ValueError(f'a coordinate is ("sin" or "cos", "f" or "t", octave), got {entry!r}')
    return coordinates


def save_model(path, model, sound=None):
    """Write weights and configuration to one safetensors file, atomically.

    ``sound`` is a JSON-serialisable dict that comes back from :func:`load_model`: what the grids mean as sound.
    """
    write_safetensors(path, model.state_dict(), MODEL_FORMAT, {"config": model.config, "sound": sound or {}})


def load_model(path, backend="auto", precision="fp32"):
    """Read what :func:`save_model` wrote -> (model, sound).

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, truncated, or not a fastnca model.
    """
    backends.check_names(backend, precision)
    tensors, metadata = read_safetensors(path, MODEL_FORMAT)
    try:
        model = DualSpecTNCA(**metadata["config"], backend=backend, precision=precision)
        sound = metadata["sound"]
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: its configuration and its weights do not fit ({error})") from error
    return model, sound


def write_safetensors(path, tensors, file_format, metadata):
    """Write tensors and a JSON-serialisable dict to one file, atomically; equal content gives equal bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, because safetensors writes several in random order.
    header = {"fastnca": json.dumps({"format": file_format, **metadata})}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def read_safetensors(path, file_format):
    """(tensors, metadata) of a file that :func:`write_safetensors` wrote in ``file_format``; errors as load_model."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("fastnca", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    try:
        metadata = json.loads(header)
        found = metadata.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its header is not fastnca's ({error})") from error
    if found != file_format:
        raise ValueError(f"{path} was not written by fastnca: expected format {file_format!r}, got {found!r}")
    return tensors, metadata

"""The automaton as different libraries run it: the same workload, the same outputs, the same gradients.

An implementation is built for a :class:`Workload` and prepares two kinds of work as functions without arguments:

- ``forward(num_steps)``: a rollout of both grids without gradients -> the final grids [N, 16, H, T];
- ``training(num_steps)``: a rollout, the mean absolute error of both decoded grids in dB, and its gradients with
  respect to all six parameters -> those gradients. (The optimizer's update of 18 thousand numbers is left out.)

``outputs()`` turns either result into NumPy arrays in PyTorch's layout, to check that all do the same work.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch

from fastnca import DualSpecTNCA, decode_db
from fastnca.automaton import backends, reference
from fastnca.automaton.rule import CHANNELS, HIDDEN1, HIDDEN2, perception
from fastnca.context import Places

# Operations per cell and step, two for each multiply-add of the 1x1 convolutions. Training adds the hidden layers once
# more, and the gradients of the activations and of the weights.
HIDDEN_FLOPS = 2 * (perception(CHANNELS) * HIDDEN1 + HIDDEN1 * HIDDEN2)
FORWARD_FLOPS = HIDDEN_FLOPS + 2 * HIDDEN2 * CHANNELS
TRAINING_FLOPS = 3 * FORWARD_FLOPS + HIDDEN_FLOPS
# What the initial grids know of place: every cell has its own state, so that no product is of equal numbers.
COORDINATES = tuple((wave, axis, octave) for axis in "ft" for octave in range(3) for wave in ("sin", "cos"))
RULES = ("plain", "context", "growth", "context and growth")
FLIPPED = 1e-3  # share of the largest value by which a cell is off that has taken another path


@dataclass(frozen=True)
class Workload:
    """What an implementation is given to run: a model, initial grids and targets.

    width: frames T. batch: N. n_mels, n_linear: bands H of the two grids. lively: cells die and come back, and
    rounding decides about some of them. rule: one of RULES; the peers know the plain one.
    """

    width: int
    batch: int = 1
    n_mels: int = 80
    n_linear: int = 513
    lively: bool = False
    rule: str = "plain"
    device: str = "cpu"

    @property
    def cells(self):
        return self.batch * (self.n_mels + self.n_linear) * self.width

    def make(self):
        """(DualSpecTNCA, initial grids [N, 16, H, T], targets [N, H, T] in dB), the same on every device."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = DualSpecTNCA(
                n_mels=self.n_mels,
                n_linear=self.n_linear,
                context=Places() if "context" in self.rule else None,
                growth="growth" in self.rule,
                coordinates=COORDINATES,
            )
            # The model is as after some epochs: every parameter has a gradient, every cell lives, and no value fades.
            torch.nn.init.normal_(model.update_mlp[-1].weight, std=2e-3)
            grids = [grid.repeat(self.batch, 1, 1, 1) for grid in model.seed(self.width)]
            if "growth" in self.rule:
                for grid in grids:
                    grid[:, 1] = 1.0
            if self.lively:
                torch.nn.init.normal_(model.update_mlp[-1].weight, std=5e-3)
                torch.nn.init.normal_(model.update_mlp[-1].bias, std=1e-2)
                for grid in grids:
                    grid.normal_()
                    grid[:, 1].uniform_()
            targets = [torch.rand(grid.shape[0], *grid.shape[2:]) * 80.0 - 80.0 for grid in grids]
        return model.to(self.device), *([x.to(self.device) for x in tensors] for tensors in (grids, targets))


def relative_difference(arrays, expected):
    """The largest distance of an array from the expected one, relative to that one's norm."""
    pairs = zip(map(torch.as_tensor, arrays), map(torch.as_tensor, expected), strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs)


def flipped_cells(grids, expected, border=FLIPPED):
    """(share of the cells that took another path, largest error of the others), of grids [N, C, H, T].

    Errors are relative to the largest value of the expected grids; a cell whose error is above ``border`` has flipped.
    """
    pairs = [(torch.as_tensor(x).double(), torch.as_tensor(y).double()) for x, y in zip(grids, expected, strict=True)]
    errors = torch.cat([(x - y).abs().amax(1).flatten() for x, y in pairs])
    errors = errors / max(y.abs().max() for _, y in pairs)
    flipped = errors > border
    return flipped.double().mean().item(), errors[~flipped].max().item()


class _Torch:
    """An implementation whose ``rollout(num_steps)`` autograd follows; ``grids`` and ``parameters`` are its inputs."""

    def __init__(self, workload):
        self.model, self.grids, self.targets = workload.make()
        self.parameters = list(self.model.parameters())

    def forward(self, num_steps):
        return torch.no_grad()(lambda: self.rollout(num_steps))

    def training(self, num_steps):
        def epoch():
            pairs = zip(self.rollout(num_steps), self.targets, strict=True)
            loss = sum((decode_db(grid) - target).abs().mean() for grid, target in pairs)
            return torch.autograd.grad(loss, self.parameters)

        return epoch

    def outputs(self, tensors):
        return [tensor.detach().numpy() for tensor in tensors]


class Model(_Torch):
    """``model.rollout`` as users call it, on a named backend; ``double`` computes in float64."""

    def __init__(self, workload, backend, precision="fp32", checkpoint_every=None, double=False):
        super().__init__(workload)
        weights, config = self.model.state_dict(), {**self.model.config, "context": self.model.places}
        self.model = DualSpecTNCA(**config, backend=backend, precision=precision).to(workload.device)
        self.model.load_state_dict(weights)
        if double:
            self.model.double()
            self.grids = [grid.double() for grid in self.grids]
        self.parameters = list(self.model.parameters())
        self.checkpoint_every = checkpoint_every

    def rollout(self, num_steps):
        return self.model.rollout(*self.grids, num_steps, checkpoint_every=self.checkpoint_every)


class Compiled(_Torch):
    """The reference's step of both grids as one graph under torch.compile, for these very shapes."""

    def __init__(self, workload):
        super().__init__(workload)

        def step(mel, linear, weights):
            return reference.step(mel, weights), reference.step(linear, weights)

        self.step = torch.compile(step, fullgraph=True, dynamic=False)

    def rollout(self, num_steps):
        grids = self.grids
        for _ in range(num_steps):
            grids = self.step(*grids, self.parameters)
        return grids


class Jax:
    """lax.scan over the step under jit; training keeps a state per step and recomputes the rest (jax.checkpoint).

    The step is written in two ways, and each kind of work takes the faster one, measured here: cells as rows of
    matrices (channels last), or as their columns (planar). Stencils are sums of shifted slices, which XLA fuses. Its
    convolutions, depthwise or 1x1, made a step take three to ten times as long on a CPU, so none is used.
    """

    def __init__(self, workload):
        import jax

        self.jax = jax
        model, *tensors = workload.make()
        self.weights = [p.detach().flatten(1).numpy() if p.ndim == 4 else p.detach().numpy() for p in model.weights]
        self.grids, self.targets = ([x.numpy() for x in of] for of in tensors)
        self.layouts = {}

    def forward(self, num_steps):
        return self._prepare(self._forward, num_steps)

    def training(self, num_steps):
        return self._prepare(self._training, num_steps)

    def outputs(self, arrays):
        import numpy as np

        arrays = [np.array(array) for array in arrays]
        return [a[..., None, None] if a.ndim == 2 else a for a in arrays]

    def _rollout(self, step, num_steps, weights, grids):
        def both(grids, _):
            return [step(weights, grid) for grid in grids], None

        return self.jax.lax.scan(both, grids, None, length=num_steps)[0]

    def _forward(self, channels_last, num_steps, weights, grids, targets):
        final = self._rollout(partial(_jax_step, channels_last), num_steps, weights, grids)
        return [self.jax.numpy.moveaxis(grid, -1, 1) for grid in final] if channels_last else final

    def _training(self, channels_last, num_steps, weights, grids, targets):
        jnp = self.jax.numpy
        step = self.jax.checkpoint(partial(_jax_step, channels_last))

        def loss(weights):
            final = self._rollout(step, num_steps, weights, grids)
            values = [grid[..., 0] if channels_last else grid[:, 0] for grid in final]
            return sum(jnp.abs(jnp.tanh(v) * 40.0 - 40.0 - t).mean() for v, t in zip(values, targets))

        return self.jax.grad(loss)(weights)

    def _compile(self, work, channels_last, num_steps):
        grids = [grid.transpose(0, 2, 3, 1) if channels_last else grid for grid in self.grids]
        arguments = self.jax.device_put((self.weights, grids, self.targets))
        compiled = self.jax.jit(partial(work, channels_last, num_steps)).lower(*arguments).compile()
        return lambda: self.jax.block_until_ready(compiled(*arguments))

    def _prepare(self, work, num_steps):
        if work not in self.layouts:
            self.layouts[work] = min((False, True), key=lambda layout: self._seconds(self._compile(work, layout, 2)))
        return self._compile(work, self.layouts[work], num_steps)

    def _seconds(self, call):
        """The shortest of three calls, after one that warms it."""
        times = [time.perf_counter()]
        for _ in range(4):
            call()
            times.append(time.perf_counter())
        return min(after - before for before, after in zip(times[1:], times[2:]))


def _jax_step(channels_last, weights, s):
    """One step of one grid s, [N, H, T, 16] with the channels last and else [N, 16, H, T]."""
    import jax
    import jax.numpy as jnp

    w1, b1, w2, b2, w3, b3 = weights
    y_axis, x_axis, channel_axis = (1, 2, 3) if channels_last else (2, 3, 1)

    def shifted(x, outside):
        """The 3 x 3 neighbors of every cell, [row][column]."""
        pad = [(1, 1) if axis in (y_axis, x_axis) else (0, 0) for axis in range(4)]
        x = jnp.pad(x, pad, constant_values=outside)
        rows = [jax.lax.slice_in_dim(x, dy, dy + s.shape[y_axis], axis=y_axis) for dy in range(3)]
        return [[jax.lax.slice_in_dim(r, dx, dx + s.shape[x_axis], axis=x_axis) for dx in range(3)] for r in rows]

    def layer(x, w, b):
        if channels_last:
            return x @ w.T + b
        flat = x.reshape(*x.shape[:2], -1)
        return (w @ flat + b[:, None]).reshape(x.shape[0], -1, *x.shape[2:])

    top, middle, bottom = shifted(s, 0.0)
    smooth = [a + 2.0 * b + c for a, b, c in zip(top, middle, bottom)]
    slope = [c - a for a, c in zip(top, bottom)]
    sobel_x = smooth[2] - smooth[0]
    sobel_y = slope[0] + 2.0 * slope[1] + slope[2]
    laplacian = smooth[0] + 2.0 * smooth[1] + smooth[2] - 16.0 * s
    perception = jnp.concatenate([s, sobel_x, sobel_y, laplacian], channel_axis)
    hidden = jax.nn.relu(layer(perception, w1, b1))
    hidden = jax.nn.relu(layer(hidden, w2, b2))
    u = s + layer(hidden, w3, b3)
    value, alpha, rest = jnp.split(u, [1, 2], channel_axis)
    alpha = jnp.clip(alpha, 0.0, 1.0)
    rows = [jnp.maximum(jnp.maximum(a, b), c) for a, b, c in shifted(alpha, -jnp.inf)]
    life = jnp.maximum(jnp.maximum(rows[0], rows[1]), rows[2])
    return jnp.concatenate([value, alpha, rest], channel_axis) * life


def _missing_module(name):
    from importlib.util import find_spec

    return None if find_spec(name) else f"{name} is not installed (pip install 'fastnca[bench]')"


# name: (how to build it, a function that tells why it cannot run here, or None), in the order of the tables.
IMPLEMENTATIONS = {
    "eager": (partial(Model, backend="reference"), lambda: None),
    "compile": (Compiled, lambda: None),
    "jax": (Jax, lambda: _missing_module("jax")),
    "cpu-fp32": (partial(Model, backend="cpu"), lambda: backends.why_not("cpu")),
    "cpu-bf16": (
        partial(Model, backend="cpu", precision="bf16"),
        lambda: backends.why_not("cpu", precision="bf16"),
    ),
}
TITLES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "jax": "JAX jit + scan",
    "cpu-fp32": "fastnca fp32",
    "cpu-bf16": "fastnca bf16",
}


def why_not(name):
    """None if the implementation can run here, else the reason."""
    return IMPLEMENTATIONS[name][1]()


def build(name, workload, **options):
    """The implementation of that name for a workload, with options of its constructor."""
    return IMPLEMENTATIONS[name][0](workload, **options)

"""The automaton as different libraries run it: the same problem, the same outputs, the same gradients.

An implementation is built on a :class:`Problem` and prepares two kinds of work, compiled and warm, as functions
without arguments:

- ``forward(num_steps)``: a rollout of both grids without gradients -> the final grids;
- ``training(num_steps)``: a rollout, the mean absolute error of both decoded grids, and its gradients with respect to
  all six parameters -> those gradients. (The optimizer's update of 18 thousand numbers is left out everywhere.)

``outputs()`` turns either result into NumPy arrays in PyTorch's layout, to check that all do the same work.
"""

import time
from functools import partial

import torch

from fastnca import DualSpecTNCA, backends, decode_db, reference
from fastnca.training import RECIPES


class Problem:
    """A model with the recipe's coordinates, its initial grids, and targets, from a seed.

    ``lively``: cells die and come back, and rounding decides about some of them.
    """

    def __init__(self, width, batch=1, n_mels=80, n_linear=513, seed=0, lively=False, device="cpu"):
        torch.manual_seed(seed)
        self.model = DualSpecTNCA(n_mels=n_mels, n_linear=n_linear, coordinates=RECIPES["default"].coordinates)
        # As after some epochs: every parameter has a gradient, every cell lives, and no value fades or explodes.
        torch.nn.init.normal_(self.model.update_mlp[-1].weight, std=2e-3)
        self.grids = [grid.repeat(batch, 1, 1, 1) for grid in self.model.seed(width)]
        if lively:
            torch.nn.init.normal_(self.model.update_mlp[-1].weight, std=5e-3)
            torch.nn.init.normal_(self.model.update_mlp[-1].bias, std=1e-2)
            for grid in self.grids:
                grid.normal_()
                grid[:, 1].uniform_()
        self.targets = [torch.rand(grid.shape[0], *grid.shape[2:]) * 80.0 - 80.0 for grid in self.grids]
        # Drawn on the CPU, so that every device has the same problem.
        self.model.to(device)
        self.grids, self.targets = ([x.to(device) for x in tensors] for tensors in (self.grids, self.targets))

    @property
    def cells(self):
        return sum(grid[:, 0].numel() for grid in self.grids)


def _numpy(tensors):
    return [tensor.detach().numpy() for tensor in tensors]


class _Torch:
    def __init__(self, problem):
        self.problem = problem
        self.parameters = list(problem.model.parameters())

    def _rollout(self, num_steps):
        raise NotImplementedError

    def forward(self, num_steps):
        return torch.no_grad()(lambda: self._rollout(num_steps))

    def training(self, num_steps):
        def epoch():
            grown = self._rollout(num_steps)
            pairs = zip(grown, self.problem.targets, strict=True)
            loss = sum((decode_db(grid) - target).abs().mean() for grid, target in pairs)
            return torch.autograd.grad(loss, self.parameters)

        return epoch

    outputs = staticmethod(_numpy)


class Model(_Torch):
    """``model.rollout`` as users call it, on a named backend."""

    def __init__(self, problem, backend, precision="fp32", checkpoint_every=None, double=False):
        super().__init__(problem)
        model = problem.model
        self.model = DualSpecTNCA(**model.config, backend=backend, precision=precision)
        self.model.load_state_dict(model.state_dict())
        self.model.to(problem.grids[0].device)
        if double:
            self.model.double()
        self.grids = [grid.to(self.model.update_mlp[-1].bias.dtype) for grid in problem.grids]
        self.parameters = list(self.model.parameters())
        self.checkpoint_every = checkpoint_every

    def _rollout(self, num_steps):
        return self.model.rollout(*self.grids, num_steps, checkpoint_every=self.checkpoint_every)


class Compiled(_Torch):
    """The reference's step of both grids as one graph under torch.compile, for these very shapes."""

    def __init__(self, problem):
        super().__init__(problem)

        def step(mel, linear, weights):
            return reference.step(mel, weights), reference.step(linear, weights)

        self.step = torch.compile(step, fullgraph=True, dynamic=False)

    def _rollout(self, num_steps):
        grids = self.problem.grids
        for _ in range(num_steps):
            grids = self.step(*grids, self.parameters)
        return grids


class Jax:
    """lax.scan over the step under jit; training keeps a state per step and recomputes the rest (jax.checkpoint).

    The step is written in two ways, and each kind of work takes the faster one, measured here: cells as rows of
    matrices (channels last), or as their columns (planar). Stencils are sums of shifted slices, which XLA fuses. Its
    convolutions, depthwise or 1x1, made a step take three to ten times as long on a CPU, so none is used.
    """

    def __init__(self, problem):
        import jax

        self.jax = jax
        self.problem = problem
        self.weights = [p.detach().numpy() for p in problem.model.parameters()]
        self.weights = [w.reshape(w.shape[:2]) if w.ndim == 4 else w for w in self.weights]
        self.grids = _numpy(problem.grids)
        self.targets = _numpy(problem.targets)
        self.layout = {}

    def _arguments(self, channels_last):
        put = self.jax.device_put
        grids = [put(grid.transpose(0, 2, 3, 1) if channels_last else grid) for grid in self.grids]
        return [put(w) for w in self.weights], grids, [put(target) for target in self.targets]

    def _rollout(self, channels_last, step, num_steps, weights, grids):
        step = partial(step, self.jax, channels_last, weights)
        return self.jax.lax.scan(lambda grids, _: ([step(g) for g in grids], None), grids, None, length=num_steps)[0]

    def _forward(self, channels_last, num_steps, weights, grids, targets):
        final = self._rollout(channels_last, _jax_step, num_steps, weights, grids)
        return [self.jax.numpy.moveaxis(g, -1, 1) for g in final] if channels_last else final

    def _training(self, channels_last, num_steps, weights, grids, targets):
        jnp = self.jax.numpy
        step = self.jax.checkpoint(_jax_step, static_argnums=(0, 1))

        def loss(weights):
            final = self._rollout(channels_last, step, num_steps, weights, grids)
            values = [grid[..., 0] if channels_last else grid[:, 0] for grid in final]
            return sum(jnp.abs(jnp.tanh(v) * 40.0 - 40.0 - t).mean() for v, t in zip(values, targets))

        return self.jax.grad(loss)(weights)

    def _compile(self, work, channels_last, num_steps):
        arguments = self._arguments(channels_last)
        compiled = self.jax.jit(partial(work, channels_last, num_steps)).lower(*arguments).compile()
        return lambda: self.jax.block_until_ready(compiled(*arguments))

    def _fastest_layout(self, work):
        seconds = {}
        for channels_last in (False, True):
            call = self._compile(work, channels_last, 2)
            call()
            times = []
            for _ in range(3):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            seconds[channels_last] = min(times)
        return min(seconds, key=seconds.get)

    def _prepare(self, work, num_steps):
        if work not in self.layout:
            self.layout[work] = self._fastest_layout(work)
        return self._compile(work, self.layout[work], num_steps)

    def forward(self, num_steps):
        return self._prepare(self._forward, num_steps)

    def training(self, num_steps):
        return self._prepare(self._training, num_steps)

    def outputs(self, arrays):
        import numpy as np

        arrays = [np.asarray(array) for array in arrays]
        return [a[..., None, None] if a.ndim == 2 else a for a in arrays]


def _jax_step(jax, channels_last, weights, s):
    jnp = jax.numpy
    w1, b1, w2, b2, w3, b3 = weights
    y_axis, x_axis, channel_axis = (1, 2, 3) if channels_last else (2, 3, 1)

    def shifted(x, outside):
        """The 3 x 3 neighbours of every cell, [row][column]."""
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


# name: (how to build it, why it cannot run here or None). In the order of the tables.
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


def build(name, problem, **options):
    return IMPLEMENTATIONS[name][0](problem, **options)

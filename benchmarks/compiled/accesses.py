"""The memory that the Triton kernels touch, counted while Triton's interpreter runs them: needs TRITON_INTERPRET=1.

For a tile in the middle of a grid, in bytes per cell: what its loads and stores ask for; what of that lies in different
sectors of 32 bytes, which is what must come from beyond the first-level cache if that holds the tile with its halo; and
what the whole launch touches at least once. The network's parameters are counted apart, because a program that keeps
them on chip reads them once for all its tiles.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch

from fastnca.automaton import ops, triton
from fastnca.automaton.rule import CHANNELS, weight_shapes

SECTOR = 32
_NUM_STEPS = 2  # the first reads a state without a life mask, the second is like all others
_PARAMETERS = ("weights", "biases", "gradient_groups")


@dataclass
class Launch:
    """One kernel launch: its constants, its tensors, and what each program loaded and stored."""

    kernel: str
    constants: dict
    tensors: dict  # parameter: (first address, end)
    accesses: list = field(default_factory=list)  # (program, "read" or "write", addresses, bytes of an element)

    def tiles(self, *grids):
        """How many tiles of this kernel cover grids of these (height, width)."""
        height, width = self.constants["TILE_HEIGHT"], self.constants["TILE_WIDTH"]
        return sum(-(-h // height) * -(-w // width) for h, w in grids)

    def of(self, direction, parameters, program=None):
        """(addresses, bytes of an element) of what was loaded or stored through these parameters, or through others."""
        ranges = [self.tensors[name] for name in _PARAMETERS if name in self.tensors]
        for number, kind, addresses, size in self.accesses:
            if kind == direction and program in (None, number) and addresses.size:
                inside = any(first <= addresses.flat[0] < end for first, end in ranges)
                if inside == parameters:
                    yield addresses, size


@contextmanager
def recorded():
    """-> a list that receives a :class:`Launch` for everything the interpreter runs in the block."""
    from triton.runtime import interpreter

    launches = []
    builder = interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def note(self, direction, pointers, mask):
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        launches[-1].accesses.append((self.grid_idx[0], direction, addresses.astype(np.int64), size))

    def noted_load(self, pointers, mask, *rest):
        note(self, "read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(self, "write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_run(self, *arguments, **options):
        named = {**dict(zip(self.arg_names, arguments)), **options}
        tensors = {n: (t.data_ptr(), t.data_ptr() + t.nbytes) for n, t in named.items() if isinstance(t, torch.Tensor)}
        constants = {name: named[name] for name in self.constexprs}
        launches.append(Launch(self.fn.__name__, constants, tensors))
        return run(self, *arguments, **options)

    with (
        mock.patch.object(builder, "create_masked_load", noted_load),
        mock.patch.object(builder, "create_masked_store", noted_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", noted_run),
    ):
        yield launches


def _run(configuration, precision, programs, grids):
    """All launches of a short rollout of two grids (height, width) and its backward pass."""
    configuration = replace(configuration, programs=programs, groups=programs)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.1).requires_grad_()

    mel, linear = (draw(1, CHANNELS, *grid) for grid in grids)
    weights = [draw(*shape) for shape in weight_shapes()]
    with mock.patch.object(triton, "configuration", lambda *_: configuration), recorded() as launches:
        final = ops.rollout(mel, linear, weights, _NUM_STEPS, precision=precision, backend="triton")
        sum(grid.square().sum() for grid in final).backward()
    return launches


def _unique_bytes(pieces, grain=None):
    """Bytes in different blocks of ``grain`` bytes, of an element if None."""
    pieces = list(pieces)
    if not pieces:
        return 0
    grain = grain or pieces[0][1]
    return np.unique(np.concatenate([addresses // grain for addresses, _ in pieces])).size * grain


def _parameter_bytes(launch, direction, program, precision):
    """The interpreter has bf16 weights in float32."""
    first, end = launch.tensors.get("weights", (0, 0))
    total = 0.0
    for addresses, size in launch.of(direction, True, program):
        halved = precision == "bf16" and first <= addresses.flat[0] < end
        total += addresses.size * (size / 2 if halved else size)
    return total


def count(architecture, precision):
    """The accesses of each kernel as the architecture's configuration has it.

    -> {"launches": {kernel: launches per step}, "kernels": {kernel: {"cells": of a tile, "read": ..., "write": ...}}},
    of the masked variants. "read" and "write" are {"requested", "sectors", "compulsory": bytes per cell,
    "parameters_tile", "parameters_program": bytes per tile and once per program}.
    """
    configuration = triton.configuration(architecture, precision)
    shapes = configuration.step, configuration.backward
    height, width = (max(8, *(shape.tile[axis] for shape in shapes)) for axis in (0, 1))
    small, large = (height, width), (3 * height, 3 * width)
    launches = _run(configuration, precision, 1 << 20, (small, large))
    alone = _run(configuration, precision, 1, (small, (1, 1)))
    kernels = {}
    for launch, single in zip(launches, alone, strict=True):
        if not launch.constants.get("MASKED") or launch.kernel in kernels:
            continue
        across = launch.tiles((1, large[1]))
        middle = launch.tiles(small) + launch.tiles((large[0], 1)) // 2 * across + across // 2
        cells = launch.constants["TILE_HEIGHT"] * launch.constants["TILE_WIDTH"]
        numbers = {"cells": cells}
        for direction in ("read", "write"):
            own = list(launch.of(direction, False, middle))
            numbers[direction] = {
                "requested": sum(addresses.size * size for addresses, size in own) / cells,
                "sectors": _unique_bytes(own, SECTOR) / cells,
                "compulsory": _unique_bytes(launch.of(direction, False)) / (10 * height * width),
            }
            # Of a program with one tile, and of one with several: the difference is what every further tile costs.
            one = _parameter_bytes(launch, direction, middle, precision)
            further = 0.0
            if one:
                several = _parameter_bytes(single, direction, 0, precision)
                further = (several - one) / (single.tiles(small, (1, 1)) - 1)
            numbers[direction] |= {"parameters_tile": further, "parameters_program": one - further}
        kernels[launch.kernel] = numbers
    counts = Counter(launch.kernel for launch in launches)
    return {"launches": {kernel: number / _NUM_STEPS for kernel, number in counts.items()}, "kernels": kernels}

"""The Triton kernels on tensors: when they can run, how they are configured, and the rollouts they make up.

Importing this module does not import Triton: the first launch does.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec

import torch

PRECISIONS = ("fp32", "tf32", "bf16")

# Addresses within a tile are 32-bit: (tile height + 4) * width * 64 must stay below 2^31.
MAX_WIDTH = 1 << 20

# What tl.dot is asked for. Split products (tf32x3, bf16x6) would bring fp32 to tensor cores too, but how these round
# their sums is not specified: "ieee" needs no GPU to show that it has the accuracy of float32.
_DOT = {"fp32": "ieee", "tf32": "tf32", "bf16": "bf16"}

INSTALLED = find_spec("triton") is not None

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Shape:
    """How a kernel is compiled: cells per tile, warps per program, and how many of the 128 units of the first hidden
    layer it computes at once. With all 128 the weights, and in the backward pass the sums of their gradients, stay on
    chip; with fewer they go to and from the second-level cache for every tile."""

    tile: tuple[int, int]
    warps: int
    chunk: int = 128
    max_registers: int | None = None


@dataclass(frozen=True)
class Configuration:
    """Of one architecture and precision. ``programs`` and ``groups`` are the programs of a forward and of a backward
    launch, where there are as many tiles; the groups, and nothing else, decide in which order a weight's gradient is
    added up, so that it is the same to the last bit on every device of one architecture."""

    step: Shape
    backward: Shape
    programs: int
    groups: int


# Kernels that only move data: enough warps in flight to hide the memory's latency.
COPY = Shape((8, 8), 4)

# Multiprocessors of the largest common part: A100, RTX 3090 Ti, RTX 4090, H100, B200, RTX 5090; and on AMD the compute
# units of MI250X (one die), MI300X and RX 7900 XTX.
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx90a": 110, "gfx942": 304, "gfx1100": 96}


def configuration(architecture, precision):
    """The fixed choice for an architecture, one of ``NVIDIA`` or ``AMD``, and a precision."""
    processors = _PROCESSORS[architecture]
    if precision == "fp32":
        # Fused multiply-adds from registers: with larger tiles, or larger slices of the weights, operands spill.
        step, backward = Shape((8, 8), 4, chunk=16), Shape((8, 2), 8, chunk=16)
        return Configuration(step, backward, programs=4 * processors, groups=processors)
    # Tensor cores. 64 cells are the height of one wgmma or tcgen05 product, and one program of four warps leaves room
    # for a second on the same multiprocessor, but for weights in tf32 (86 KB) where that has 100 KB.
    step = Shape((8, 8), 4)
    programs = processors if architecture in (86, 89, 120) and precision == "tf32" else 2 * processors
    # 17,408 sums of weight gradients take 68 registers in each of 256 threads: beside them there is room for 32 cells.
    backward = Shape((8, 4), 8)
    if architecture in (80, 86, 89, 120) and (precision == "tf32" or architecture == 120):
        # Operands pass through registers, and what is left of these does not do. Both forms of the weights in tf32
        # would need 150 KB of shared memory besides, where all but the first of these parts have 99 KB.
        backward = Shape((8, 4), 8, chunk=64)
    elif architecture == 100:
        backward = Shape((8, 4), 8, max_registers=255)  # by itself the compiler stops at 128 registers and spills
    return Configuration(step, backward, programs, groups=processors)


def architecture_of(device):
    """The key of the device's configuration: the listed capability at or below its own, or AMD's name of it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in NVIDIA if known <= 10 * major + minor), default=10 * major + minor)


def interpreting():
    """Whether kernels run in Triton's interpreter, on the CPU: the variable TRITON_INTERPRET, read at first use."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(device, dtype, num_channels, precision):
    """None if the kernels can run this request, else the reason as a clause."""
    if not INSTALLED:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if num_channels != 16:
        return f"its kernels are written for 16 channels, not for {num_channels}"
    if precision not in PRECISIONS:
        return f"it knows the precisions {', '.join(PRECISIONS)}, not {precision!r}"
    if interpreting():
        return None
    if device.type != "cuda":
        here = "" if torch.cuda.is_available() else ", and this PyTorch finds no GPU"
        return f"it runs on GPU tensors, not on {device.type}{here}"
    return _gpu_why_not(device, precision)


def _gpu_why_not(device, precision):
    if not torch.cuda.is_available():
        return "this PyTorch finds no GPU (torch.cuda.is_available() is False)"
    architecture = architecture_of(device)
    if architecture not in _PROCESSORS:
        name = torch.cuda.get_device_name(device)
        if torch.version.hip:
            return f"it has configurations for {', '.join(AMD)}, and {name} is {architecture}"
        return f"it needs compute capability 8.0 or later, and {name} has {architecture / 10}"
    if torch.version.hip and precision == "tf32":
        return "Triton has no tf32 products on AMD"
    return None


# While torch.compile traces, what a GPU is must not be traced. This is all that torch.compiler.assume_constant_result
# does, without importing the compiler.
_gpu_why_not._dynamo_marked_constant = True


_SIZES = ("batch", "mel_height", "mel_width", "lin_height", "lin_width")


def compilations(architecture, precision):
    """Every kernel that a rollout and its backward pass can launch, compiled as the launcher asks for it.

    Args:
        architecture: a compute capability of ``NVIDIA`` as a number, or a name of ``AMD``.
        precision: "fp32", "tf32" (not on AMD) or "bf16".

    Yields:
        (name, fn, signature, constexprs, attrs, options): a readable name, unique here; the ``triton.jit`` function;
        and what ``triton.compile(ASTSource(fn, signature, constexprs, attrs), target=..., options=options)`` takes.
        Nothing else is ever compiled: no kernel is specialised on a size or on the address of a caller's tensor.
    """
    from . import triton_kernels as kernels

    config = configuration(architecture, precision)
    for name, fn, constexprs, shape in _variants(kernels, config, _DOT[precision]):
        signature, attrs = {}, {}
        for position, parameter in enumerate(fn.arg_names):
            if parameter in constexprs:
                signature[parameter] = "constexpr"
            elif parameter in (*_SIZES, "groups"):
                signature[parameter] = "i32"
            else:
                signature[parameter] = "*bf16" if parameter == "weights" and precision == "bf16" else "*fp32"
                if parameter not in ("mel", "lin"):
                    attrs[(position,)] = [["tt.divisibility", 16]]
        yield name, fn, signature, constexprs, attrs, _options(shape)


def _variants(kernels, config, dot):
    for masked in (True, False):
        word = "masked" if masked else "unmasked"
        for life_mask in (True, False) if not masked else (True,):
            suffix = word if masked or life_mask else "no life mask"
            for kernel, shape in ((kernels.step, config.step), (kernels.network_backward, config.backward)):
                constexprs = {"MASKED": masked, "LIFE_MASK": life_mask, **_network(shape, dot)}
                yield f"{kernel.__name__}, {suffix}", kernel, constexprs, shape
        for kernel in (kernels.stencil_backward, kernels.load_planar, kernels.store_planar):
            yield f"{kernel.__name__}, {word}", kernel, {"MASKED": masked, **_tile(COPY)}, COPY
    yield "sum_groups", kernels.sum_groups, {"BLOCK": _SUM_BLOCK}, COPY


_SUM_BLOCK = 128


def _tile(shape):
    return {"TILE_HEIGHT": shape.tile[0], "TILE_WIDTH": shape.tile[1]}


def _network(shape, dot):
    return {**_tile(shape), "CHUNK": shape.chunk, "DOT": dot}


def _options(shape):
    # One stage: the loop over tiles would otherwise be pipelined with copies of tiles that do not fit on chip.
    options = {"num_warps": shape.warps, "num_stages": 1}
    if shape.max_registers:
        options["maxnreg"] = shape.max_registers
    return options


class _Launcher:
    """The kernels' launches for one rollout, on the current stream: nothing here waits for the device."""

    def __init__(self, mel, lin, life_mask, precision):
        from . import triton_kernels as kernels

        for name, grid in (("mel", mel), ("lin", lin)):
            if grid.shape[3] > MAX_WIDTH:
                raise ValueError(
                    f"{name} must have at most {MAX_WIDTH} frames for the Triton kernels, got {grid.shape[3]}"
                )
        self.kernels = kernels
        self.sizes = (mel.shape[0], *mel.shape[2:], *lin.shape[2:])
        self.shapes = mel.shape, lin.shape
        self.life_mask = life_mask
        self.dot = _DOT[precision]
        if interpreting():
            self.config = configuration(80, precision)
            if precision == "bf16":
                self.dot = "bf16 in fp32"
        else:
            self.config = configuration(architecture_of(mel.device), precision)
        self.groups = min(self.config.groups, self._tiles(self.config.backward))

    def _tiles(self, shape):
        batch, mel_height, mel_width, lin_height, lin_width = self.sizes
        height, width = shape.tile
        tiles = sum(-(-h // height) * -(-w // width) for h, w in ((mel_height, mel_width), (lin_height, lin_width)))
        return batch * tiles

    def _launch(self, kernel, programs, *arguments, **options):
        kernel[(programs,)](*arguments, *self.sizes, **options)

    def load(self, mel, lin, rows, state=None):
        """The grids into a row; as the gradient of ``state`` if that was read through its life mask."""
        masked = state is not None
        state = rows if state is None else state
        options = {"MASKED": masked, **_tile(COPY), **_options(COPY)}
        self._launch(self.kernels.load_planar, self._tiles(COPY), mel, lin, state, rows, **options)

    def store(self, rows, masked):
        mel, lin = (rows.new_empty(shape) for shape in self.shapes)
        options = {"MASKED": masked, **_tile(COPY), **_options(COPY)}
        self._launch(self.kernels.store_planar, self._tiles(COPY), rows, mel, lin, **options)
        return mel, lin

    def step(self, state_from, state_to, network, masked):
        shape = self.config.step
        options = {"MASKED": masked, "LIFE_MASK": self.life_mask, **_network(shape, self.dot), **_options(shape)}
        programs = min(self.config.programs, self._tiles(shape))
        self._launch(self.kernels.step, programs, state_from, state_to, *network, **options)

    def step_back(self, state_from, gradient_to, perception, gradient_from, groups, network, masked):
        """``perception`` is memory for the gradient of the perception."""
        shape = self.config.backward
        options = {"MASKED": masked, "LIFE_MASK": self.life_mask, **_network(shape, self.dot), **_options(shape)}
        arguments = state_from, gradient_to, perception, groups, *network
        self._launch(self.kernels.network_backward, self.groups, *arguments, **options)
        options = {"MASKED": masked, **_tile(COPY), **_options(COPY)}
        arguments = state_from, perception, gradient_from
        self._launch(self.kernels.stencil_backward, self._tiles(COPY), *arguments, **options)

    def sum_groups(self, groups):
        total = groups.new_empty(groups.shape[1])
        programs = -(-groups.shape[1] // _SUM_BLOCK)
        options = {"BLOCK": _SUM_BLOCK, **_options(COPY)}
        self.kernels.sum_groups[(programs,)](groups, total, groups.shape[0], **options)
        return total


def state_floats(mel, lin, life_mask):
    """Floats of one state: 16 values per cell, with the life mask also alpha before the clamp and the mask itself."""
    cells = (mel.numel() + lin.numel()) // 16
    # Whole cache lines, so that all rows of a tensor of states begin at one.
    return -(-cells * (18 if life_mask else 16) // 32) * 32


_MATRICES = (64 * 128, 128 * 64, 64 * 16)


def _pack(weights, precision):
    """-> the matrices [in, out] and then [out, in], the first layer's inputs in the kernels' order; and the biases."""
    w1, b1, w2, b2, w3, b3 = (weight.detach() for weight in weights)
    matrices = w1.view(128, 4, 16).transpose(1, 2).reshape(128, 64), w2.view(64, 128), w3.view(16, 64)
    packed = torch.cat([m.t().reshape(-1) for m in matrices] + [m.reshape(-1) for m in matrices])
    if precision == "bf16" and not interpreting():
        packed = packed.bfloat16()
    return packed, torch.cat([b1, b2, b3])


def _unpack(total):
    """From the sums over all groups to the gradients of w1, b1, w2, b2, w3, b3."""
    w1, w2, w3, b1, b2, b3 = total.split([*_MATRICES, 128, 64, 16])
    w1 = w1.view(16, 4, 128).permute(2, 1, 0).reshape(128, 64, 1, 1)
    w2, w3 = (w.view(inputs, -1).t().contiguous()[..., None, None] for w, inputs in ((w2, 128), (w3, 64)))
    return [w1, b1.clone(), w2, b2.clone(), w3, b3.clone()]


def _on_device_of_first(function):
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(function)
    def wrapped(tensor, *arguments):
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            return function(tensor, *arguments)

    return wrapped


@_on_device_of_first
def rollout(mel, lin, weights, num_steps, save_every, life_mask, precision, states):
    """-> final (mel, lin). ``states`` receives every ``save_every``-th state and the last, or is None."""
    launcher = _Launcher(mel, lin, life_mask, precision)
    network = _pack(weights, precision)
    unsaved = None
    if states is None or save_every > 1:
        unsaved = mel.new_empty(2, state_floats(mel, lin, life_mask))

    def state(step):
        if states is not None and step == num_steps:
            return states[-1]
        if states is not None and step % save_every == 0:
            return states[step // save_every]
        return unsaved[step % 2]

    if states is not None:
        # What no kernel writes, and none reads: equal inputs must give equal states.
        cells = (mel.numel() + lin.numel()) // 16
        states[:, cells * (18 if life_mask else 16) :].zero_()
        states[0, cells * 16 :].zero_()
    launcher.load(mel.contiguous(), lin.contiguous(), state(0))
    for step in range(num_steps):
        launcher.step(state(step), state(step + 1), network, life_mask and step > 0)
    return launcher.store(state(num_steps), life_mask)


@_on_device_of_first
def rollout_backward(grad_mel, grad_lin, states, weights, num_steps, save_every, life_mask, precision):
    """-> gradients of the initial mel, of the initial linear and of the weights, a list."""
    launcher = _Launcher(grad_mel, grad_lin, life_mask, precision)
    network = _pack(weights, precision)
    floats = states.shape[1]
    replayed = states.new_empty(min(save_every, num_steps) - 1, floats)
    gradients = states.new_empty(2, floats)
    perception = states.new_empty((grad_mel.numel() + grad_lin.numel()) * 4)
    groups = states.new_zeros(launcher.groups, sum(_MATRICES) + 128 + 64 + 16)

    grads = grad_mel.contiguous(), grad_lin.contiguous()
    launcher.load(*grads, gradients[num_steps % 2], states[-1] if life_mask else None)
    for begin in reversed(range(0, num_steps, save_every)):
        end = min(begin + save_every, num_steps)
        segment = [states[begin // save_every], *replayed[: end - begin - 1]]
        for step in range(begin, end - 1):
            launcher.step(segment[step - begin], segment[step - begin + 1], network, life_mask and step > 0)
        if end - begin > 1 and life_mask:
            launcher.store(segment[-1], True)  # for its life mask, which no replayed step has left there
        for step in reversed(range(begin, end)):
            launcher.step_back(
                segment[step - begin],
                gradients[(step + 1) % 2],
                perception,
                gradients[step % 2],
                groups,
                network,
                life_mask and step > 0,
            )
    grad_initial = launcher.store(gradients[0], False)
    return *grad_initial, _unpack(launcher.sum_groups(groups))

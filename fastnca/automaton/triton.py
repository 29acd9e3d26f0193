"""The Triton kernels on tensors: when they can run, how they are configured, and the rollouts they make up.

Importing this module does not import Triton: the first launch does.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from itertools import pairwise, product

import torch

from .rule import CHANNELS, HIDDEN1, HIDDEN2, STENCILS, perception, saved_steps, weight_shapes

PRECISIONS = ("fp32", "tf32", "bf16")

# Addresses within a tile are 32-bit: (tile height + 4) * width * 64 must stay below 2^31.
MAX_WIDTH = 1 << 20

# What tl.dot is asked for. Split products (tf32x3, bf16x6) would bring fp32 to tensor cores too, but how these round
# their sums is not specified: "ieee" needs no GPU to show that it has the accuracy of float32.
_DOT = {"fp32": "ieee", "tf32": "tf32", "bf16": "bf16"}

INSTALLED = find_spec("triton") is not None

# Compute capability times ten: multiprocessors of its largest common part, which are A100, RTX 3090 Ti, RTX 4090, H100,
# B200 and RTX 5090.
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(_PROCESSORS)


@dataclass(frozen=True)
class LaunchShape:
    """How a kernel is compiled: the height and width of a tile in cells, the warps of a program, and how many of the
    128 units of the first hidden layer it computes at once.

    With all 128 units the weights, and in the backward pass the sums of their gradients, stay on chip. With fewer they
    go to and from the second-level cache for every tile."""

    tile: tuple[int, int]
    warps: int
    chunk: int = HIDDEN1
    max_registers: int | None = None


@dataclass(frozen=True)
class Configuration:
    """The launch shapes for one architecture and precision, and how many programs are launched at most.

    ``programs`` is that limit for a step and ``groups`` for its backward pass. Each program of the backward pass adds
    up a gradient of the weights of its own, so the groups alone decide the order of these sums: it is the same, to the
    last bit, on devices of one architecture with equally many multiprocessors."""

    step: LaunchShape
    backward: LaunchShape
    programs: int
    groups: int


# For the kernels that compute nothing with the network: enough warps in flight to hide the latency of memory.
MEMORY_BOUND_SHAPE = LaunchShape((8, 8), 4)


def configuration(architecture, precision, processors=None):
    """The fixed choice for one of ``ARCHITECTURES`` and a precision.

    ``processors`` are the device's multiprocessors; without them, those of the architecture's largest common part."""
    processors = processors or _PROCESSORS[architecture]
    if precision == "fp32":
        # Fused multiply-adds from registers: with larger tiles, or larger slices of the weights, operands spill.
        step, backward = LaunchShape((8, 8), 4, chunk=16), LaunchShape((8, 2), 8, chunk=16)
        if architecture == 90:  # where that was measured to be faster all the same: docs/performance.md
            step, backward = LaunchShape((8, 8), 4, chunk=32), LaunchShape((8, 4), 8, chunk=16)
        return Configuration(step, backward, programs=4 * processors, groups=processors)
    # Tensor cores. 64 cells are the height of one wgmma or tcgen05 product. A program of four warps leaves room for a
    # second one on its multiprocessor, except where the weights in tf32 (86 KB) take most of 100 KB of shared memory.
    step = LaunchShape((8, 8), 4)
    programs = processors if architecture in (86, 89, 120) and precision == "tf32" else 2 * processors
    # 17,408 sums of weight gradients take 68 registers in each of 256 threads: beside them there is room for 32 cells.
    backward = LaunchShape((8, 4), 8)
    if architecture in (80, 86, 89, 120) and (precision == "tf32" or architecture == 120):
        # Here operands pass through registers, and the sums leave too few of them. Both forms of the weights in tf32
        # would also need 150 KB of shared memory, and only the first of these architectures has more than 99 KB.
        backward = LaunchShape((8, 4), 8, chunk=64)
    elif architecture == 90 and precision == "bf16":
        # Three programs fit a multiprocessor. 128 cells are two wgmma products, and their 376 bytes of spills for each
        # thread were measured to cost less than the smaller tile does: docs/performance.md.
        programs, backward = 3 * processors, LaunchShape((16, 8), 8)
    elif architecture == 100:
        # Without a limit of its own the compiler stops at 128 registers and spills.
        backward = LaunchShape((8, 4), 8, max_registers=255)
    return Configuration(step, backward, programs, groups=processors)


def architecture_of(device):
    """The key of the device's configuration: the largest listed capability that is not above the device's own. A device
    below all of them gets its own capability, which is not in the list."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return max((known for known in ARCHITECTURES if known <= capability), default=capability)


def interpreting():
    """Whether kernels run in Triton's interpreter, on the CPU: the variable TRITON_INTERPRET, read at first use."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(device, dtype, num_channels, precision):
    """None if the kernels can run this request, else the reason as a clause."""
    if not INSTALLED:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if num_channels != CHANNELS:
        return f"its kernels are written for {CHANNELS} channels, not for {num_channels}"
    if precision not in PRECISIONS:
        return f"it knows the precisions {', '.join(PRECISIONS)}, not {precision!r}"
    if interpreting():
        return None
    if device.type != "cuda":
        here = "" if torch.cuda.is_available() else ", and this PyTorch finds no GPU"
        return f"it runs on GPU tensors, not on {device.type}{here}"
    return _gpu_why_not(device)


def _gpu_why_not(device):
    if not torch.cuda.is_available():
        return "this PyTorch finds no GPU (torch.cuda.is_available() is False)"
    if torch.version.hip:
        return "it is configured for NVIDIA GPUs alone, and this PyTorch is built for AMD's"
    capability = architecture_of(device)
    if capability not in ARCHITECTURES:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 or later, and {name} has {capability / 10}"
    return None


# While torch.compile traces, what a GPU is must not be traced. This is all that torch.compiler.assume_constant_result
# does, without importing the compiler.
_gpu_why_not._dynamo_marked_constant = True


def compilations(architecture, precision):
    """Every kernel that a rollout and its backward pass can launch, compiled as the launcher asks for it.

    Args:
        architecture: one of ``ARCHITECTURES``.
        precision: "fp32", "tf32" or "bf16".

    Yields:
        (name, fn, signature, constexprs, attrs, options): a readable name, unique here; the ``triton.jit`` function;
        and what ``triton.compile(ASTSource(fn, signature, constexprs, attrs), target=..., options=options)`` takes.
        Nothing else is ever compiled: no kernel is specialized on a size or on the address of a caller's tensor.
    """
    from . import triton_kernels as kernels

    config = configuration(architecture, precision)
    for name, fn, constexprs, shape in _variants(kernels, config, _DOT[precision]):
        signature, attrs = {}, {}
        for position, parameter in enumerate(fn.arg_names):
            if parameter in constexprs:
                signature[parameter] = "constexpr"
            elif parameter in (*kernels.SIZES, "groups"):
                signature[parameter] = "i32"
            else:
                packed = parameter in ("weights", "context")
                signature[parameter] = "*bf16" if packed and precision == "bf16" else "*fp32"
                if parameter not in kernels.CALLERS_TENSORS:
                    attrs[(position,)] = [["tt.divisibility", 16]]
        yield name, fn, signature, constexprs, attrs, _options(shape)


def _variants(kernels, config, dot):
    for masked in (True, False):
        word = "masked" if masked else "unmasked"
        for life_mask in (True, False) if not masked else (True,):
            suffix = word if masked or life_mask else "no life mask"
            for context, growth in product((False, True), (False, True) if life_mask else (False,)):
                name = suffix + ", context" * context + ", growth" * growth
                rule = {"MASKED": masked, "LIFE_MASK": life_mask, "GROWTH": growth}
                for kernel, shape in ((kernels.step, config.step), (kernels.network_backward, config.backward)):
                    nothing = {} if context else {key: None for key in _CONTEXT if key in kernel.arg_names}
                    constexprs = {**nothing, **rule, **_network(shape, dot)}
                    yield f"{kernel.__name__}, {name}", kernel, constexprs, shape
        for kernel in (kernels.stencil_backward, kernels.load_planar, kernels.store_planar):
            constexprs = {"MASKED": masked, **_tile(MEMORY_BOUND_SHAPE)}
            yield f"{kernel.__name__}, {word}", kernel, constexprs, MEMORY_BOUND_SHAPE
    yield "sum_groups", kernels.sum_groups, {"BLOCK": _SUM_BLOCK}, MEMORY_BOUND_SHAPE
    yield "sum_places", kernels.sum_places, _tile(config.backward), MEMORY_BOUND_SHAPE


_SUM_BLOCK = 128
_CONTEXT = ("context", "gradient_places")  # arguments that are None without context


def _tile(shape):
    return {"TILE_HEIGHT": shape.tile[0], "TILE_WIDTH": shape.tile[1]}


def _network(shape, dot):
    return {**_tile(shape), "CHUNK": shape.chunk, "DOT": dot}


def _options(shape):
    # With more than one stage the loop over tiles would be pipelined, with copies of tiles that do not fit on chip.
    options = {"num_warps": shape.warps, "num_stages": 1}
    if shape.max_registers:
        options["maxnreg"] = shape.max_registers
    return options


class _Launcher:
    """The kernels' launches for one rollout, on the current stream: nothing here waits for the device."""

    def __init__(self, mel, linear, life_mask, growth, precision):
        from . import triton_kernels as kernels

        for name, grid in (("mel", mel), ("linear", linear)):
            if grid.shape[3] > MAX_WIDTH:
                raise ValueError(
                    f"{name} must have at most {MAX_WIDTH} frames for the Triton kernels, got {grid.shape[3]}"
                )
        self.kernels = kernels
        self.sizes = (mel.shape[0], *mel.shape[2:], *linear.shape[2:])
        self.grid_shapes = mel.shape, linear.shape
        self.rule = {"LIFE_MASK": life_mask, "GROWTH": growth}
        self.dot = _DOT[precision]
        if interpreting():
            self.config = configuration(80, precision)
            if precision == "bf16":
                self.dot = "bf16 in fp32"
        else:
            processors = torch.cuda.get_device_properties(mel.device).multi_processor_count
            self.config = configuration(architecture_of(mel.device), precision, processors)
        self.groups = min(self.config.groups, self._tiles(self.config.backward))

    def _tiles(self, shape):
        batch, *grid_sizes = self.sizes
        height, width = shape.tile
        return batch * sum(-(-h // height) * -(-w // width) for h, w in (grid_sizes[:2], grid_sizes[2:]))

    def _launch(self, kernel, programs, *arguments, **options):
        kernel[(programs,)](*arguments, *self.sizes, **options)

    def _launch_memory_bound(self, kernel, *arguments, masked):
        shape = MEMORY_BOUND_SHAPE
        self._launch(kernel, self._tiles(shape), *arguments, MASKED=masked, **_tile(shape), **_options(shape))

    def _launch_network(self, kernel, shape, programs, *arguments, masked):
        constexprs = {"MASKED": masked, **self.rule, **_network(shape, self.dot)}
        self._launch(kernel, programs, *arguments, **constexprs, **_options(shape))

    def load(self, mel, linear, rows, state=None):
        """The grids into a row; as the gradient of ``state`` if that was read through its life mask."""
        masked = state is not None
        self._launch_memory_bound(self.kernels.load_planar, mel, linear, state if masked else rows, rows, masked=masked)

    def store(self, rows, masked):
        mel, linear = (rows.new_empty(shape) for shape in self.grid_shapes)
        self._launch_memory_bound(self.kernels.store_planar, rows, mel, linear, masked=masked)
        return mel, linear

    def step(self, state_from, state_to, network, masked):
        shape = self.config.step
        programs = min(self.config.programs, self._tiles(shape))
        self._launch_network(self.kernels.step, shape, programs, state_from, state_to, *network, masked=masked)

    def step_back(self, state_from, gradient_to, grad_perception, gradient_from, sums, network, masked):
        """``grad_perception`` is memory that one step's two launches share."""
        arguments = state_from, gradient_to, grad_perception, *sums, *network
        shape = self.config.backward
        self._launch_network(self.kernels.network_backward, shape, self.groups, *arguments, masked=masked)
        self._launch_memory_bound(
            self.kernels.stencil_backward, state_from, grad_perception, gradient_from, masked=masked
        )

    def sum_groups(self, groups):
        total = groups.new_empty(groups.shape[1])
        programs = -(-groups.shape[1] // _SUM_BLOCK)
        options = {"BLOCK": _SUM_BLOCK, **_options(MEMORY_BOUND_SHAPE)}
        self.kernels.sum_groups[(programs,)](groups, total, groups.shape[0], **options)
        return total

    def new_places(self, states):
        """Memory for the sums of the context's gradient: of each row and each column of each tile."""
        shape = self.config.backward
        return states.new_zeros(self._tiles(shape), sum(shape.tile), HIDDEN1)

    def sum_places(self, places):
        batch, mel_height, width, linear_height, _ = self.sizes
        lengths = mel_height, linear_height, width
        total = places.new_empty(batch, sum(lengths), HIDDEN1)
        options = {**_tile(self.config.backward), **_options(MEMORY_BOUND_SHAPE)}
        self._launch(self.kernels.sum_places, batch * sum(lengths), places, total, **options)
        return [table.transpose(1, 2).contiguous() for table in total.split(lengths, dim=1)]


def _cells(mel, linear):
    return (mel.numel() + linear.numel()) // CHANNELS


def _used_floats(mel, linear, life_mask):
    """Floats of a state that the kernels use: its values, with the life mask also alpha before the clamp and the mask
    itself."""
    return _cells(mel, linear) * (CHANNELS + 2 if life_mask else CHANNELS)


def state_floats(mel, linear, life_mask):
    """Floats of one saved state: whole cache lines, so that every row of a tensor of states begins with one."""
    return -(-_used_floats(mel, linear, life_mask) // 32) * 32


# Numbers in each part of the sums of weight gradients: w1, w2, w3, b1, b2, b3.
_PARTS = [math.prod(shape) for shape in weight_shapes()[::2] + weight_shapes()[1::2]]


def _pack(weights, context, precision):
    """-> the matrices [in, out] and then [out, in], the first layer's inputs in the kernels' order; the biases; and the
    context by place, or None."""
    w1, b1, w2, b2, w3, b3 = (weight.detach() for weight in weights)
    w1 = w1.view(HIDDEN1, STENCILS, CHANNELS).transpose(1, 2).reshape(HIDDEN1, perception())
    matrices = w1, w2.view(HIDDEN2, HIDDEN1), w3.view(CHANNELS, HIDDEN2)
    packed = torch.cat([m.t().reshape(-1) for m in matrices] + [m.reshape(-1) for m in matrices])
    if precision == "bf16" and not interpreting():
        packed = packed.bfloat16()
    return packed, torch.cat([b1, b2, b3]), _pack_context(context, precision) if context else None


def _pack_context(context, precision):
    """[N, places, 128] in fp32. Else [N, places, 2, 128], two terms, of which products keep 16 bits in all."""
    tables = torch.cat([table.detach() for table in context], dim=2).transpose(1, 2)
    if precision == "fp32":
        return tables.contiguous()
    high = tables.bfloat16().float()
    packed = torch.stack([high, tables - high], dim=2)
    return packed.bfloat16() if precision == "bf16" and not interpreting() else packed


def _unpack(total):
    """From the sums over all groups to the gradients of w1, b1, w2, b2, w3, b3."""
    w1, w2, w3, b1, b2, b3 = total.split(_PARTS)
    w1 = w1.view(CHANNELS, STENCILS, HIDDEN1).permute(2, 1, 0).reshape(HIDDEN1, perception(), 1, 1)
    w2, w3 = (w.view(inputs, -1).t().contiguous()[..., None, None] for w, inputs in ((w2, HIDDEN1), (w3, HIDDEN2)))
    return [w1, b1.clone(), w2, b2.clone(), w3, b3.clone()]


def _on_device_of_first(function):
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(function)
    def wrapped(tensor, *arguments):
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            return function(tensor, *arguments)

    return wrapped


@_on_device_of_first
def rollout(mel, linear, weights, context, num_steps, save_every, life_mask, growth, precision, states):
    """-> final (mel, linear). ``states`` receives every ``save_every``-th state and the last, or is None."""
    launcher = _Launcher(mel, linear, life_mask, growth, precision)
    network = _pack(weights, context, precision)
    saved = {} if states is None else dict(zip(saved_steps(num_steps, save_every), states))
    unsaved = None
    if len(saved) <= num_steps:
        unsaved = mel.new_empty(2, state_floats(mel, linear, life_mask))

    def state(step):
        return saved[step] if step in saved else unsaved[step % 2]

    if states is not None:
        # No kernel writes these floats and none reads them, but equal inputs must give equal states.
        states[:, _used_floats(mel, linear, life_mask) :].zero_()
        states[0, _cells(mel, linear) * CHANNELS :].zero_()
    launcher.load(mel.contiguous(), linear.contiguous(), state(0))
    for step in range(num_steps):
        launcher.step(state(step), state(step + 1), network, life_mask and step > 0)
    return launcher.store(state(num_steps), life_mask)


@_on_device_of_first
def rollout_backward(
    grad_mel, grad_linear, states, weights, context, num_steps, save_every, life_mask, growth, precision
):
    """-> gradients of the initial mel, of the initial linear, of the weights and of the context, the last two lists."""
    launcher = _Launcher(grad_mel, grad_linear, life_mask, growth, precision)
    network = _pack(weights, context, precision)
    floats = states.shape[1]
    replayed = states.new_empty(min(save_every, num_steps) - 1, floats)
    gradients = states.new_empty(2, floats)
    grad_perception = states.new_empty(_cells(grad_mel, grad_linear) * perception())
    groups = states.new_zeros(launcher.groups, sum(_PARTS))
    places = launcher.new_places(states) if context else None

    grads = grad_mel.contiguous(), grad_linear.contiguous()
    launcher.load(*grads, gradients[num_steps % 2], states[-1] if life_mask else None)
    segments = pairwise(saved_steps(num_steps, save_every))
    for (begin, end), saved in reversed(list(zip(segments, states))):
        segment = [saved, *replayed[: end - begin - 1]]
        for step in range(begin, end - 1):
            launcher.step(segment[step - begin], segment[step - begin + 1], network, life_mask and step > 0)
        if end - begin > 1 and life_mask:
            # No replayed step has read the last state of the segment and left its life mask there, so this does.
            launcher.store(segment[-1], True)
        for step in reversed(range(begin, end)):
            launcher.step_back(
                segment[step - begin],
                gradients[(step + 1) % 2],
                grad_perception,
                gradients[step % 2],
                (groups, places),
                network,
                life_mask and step > 0,
            )
    grad_initial = launcher.store(gradients[0], False)
    grad_weights = _unpack(launcher.sum_groups(groups))
    grad_context = launcher.sum_places(places) if context else []
    if context:
        # Every cell is in one row of one grid, and is told b1 beside that row's context.
        grad_weights[1] = sum(rows.sum((0, 2)) for rows in grad_context[:2])
    return *grad_initial, grad_weights, grad_context

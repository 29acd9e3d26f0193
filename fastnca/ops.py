"""The fused rollout as PyTorch operators: schema, shapes for tracing, autograd. The backends plug in their kernels.

One autograd node covers the whole rollout of both grids. It keeps states only, 16 or 18 floats per cell, and the
backward kernels recompute the rest.
"""

import torch
from torch import Tensor
from torch.library import infer_schema

from . import _cpu, _triton

_KERNELS = {"cpu": _cpu, "triton": _triton}


def rollout(mel, lin, weights, num_steps, *, life_mask=True, checkpoint_every=None, precision="fp32", backend=None):
    """``num_steps`` steps of both grids -> final (mel, lin). Equivalent to::

        tuple(reference.rollout(grid, weights, num_steps, life_mask) for grid in (mel, lin))

    and differentiable in both grids and all parameters, once. Gradients that are finite or NaN spread as the
    reference's; next to an infinite one the CPU kernels leave out the products of the stencils' zeros, which are NaN in
    PyTorch, and may have an infinity there.

    Args:
        mel, lin: float32 grids [N, 16, H, W], H and W free for each.
        weights: (w1, b1, w2, b2, w3, b3), float32, the w's [128, 64, 1, 1], [64, 128, 1, 1] and [16, 64, 1, 1].
        checkpoint_every: k keeps every k-th state for the backward pass, which replays the steps between. The
            gradient is the same.
        precision: of the matrix products, a name that the device's backend knows. Whether "bf16" is faster on a CPU
            depends on the processor: ``_C.peak_flops(1, True)`` against ``_C.peak_flops(1)`` says it.
        backend: "cpu" or "triton"; None is "cpu" for tensors there and "triton" for all others.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit. RuntimeError: the backend cannot run, and why.
    """
    _check(mel, lin, weights, num_steps, checkpoint_every)
    if num_steps == 0:
        return mel.clone(), lin.clone()
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (mel, lin, *weights))
    save_every = min(checkpoint_every or 1, num_steps) if differentiable else 0
    backend = backend or ("cpu" if mel.device.type == "cpu" else "triton")
    final_mel, final_lin, _ = rollout_op(mel, lin, *weights, num_steps, save_every, life_mask, precision, backend)
    return final_mel, final_lin


_WEIGHT_SHAPES = ((128, 64, 1, 1), (128,), (64, 128, 1, 1), (64,), (16, 64, 1, 1), (16,))


def _check(mel, lin, weights, num_steps, checkpoint_every):
    for name, grid in (("mel", mel), ("lin", lin)):
        if grid.dim() != 4 or grid.shape[1] != 16 or 0 in grid.shape:
            raise ValueError(f"{name} must have shape [N, 16, H, W] without an empty axis, got {list(grid.shape)}")
    if mel.shape[0] != lin.shape[0]:
        raise ValueError(f"mel and lin must have the same batch size, got {mel.shape[0]} and {lin.shape[0]}")
    if len(weights) != len(_WEIGHT_SHAPES):
        raise ValueError(f"weights must be (w1, b1, w2, b2, w3, b3), got {len(weights)} tensors")
    for name, weight, shape in zip(("w1", "b1", "w2", "b2", "w3", "b3"), weights, _WEIGHT_SHAPES):
        if weight.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
    for tensor in (mel, lin, *weights):
        if tensor.dtype != torch.float32 or tensor.device != mel.device:
            raise ValueError(
                f"grids and weights must be float32 on one device, got {tensor.dtype} on {tensor.device} "
                f"beside mel on {mel.device}"
            )
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be None or at least 1, got {checkpoint_every}")


def _new_states(mel, lin, num_steps, save_every, life_mask, backend):
    """Room for the states 0, save_every, 2 save_every, ... and the last; save_every=0 saves nothing."""
    if save_every == 0:
        return mel.new_empty(0)
    count = (num_steps + save_every - 1) // save_every + 1
    return mel.new_empty(count, _KERNELS[backend].state_floats(mel, lin, life_mask))


def _operator(function):
    """Defines ``torch.ops.fastnca.<name>``. (``torch.library.custom_op`` would import TorchDynamo, and with it Triton,
    at the first call: a second on a CPU that needs neither.)"""
    name = f"fastnca::{function.__name__.removesuffix('_op')}"
    torch.library.define(name, infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default")(function)
    return getattr(torch.ops.fastnca, name.removeprefix("fastnca::")).default


@_operator
def rollout_op(
    mel: Tensor,
    lin: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    num_steps: int,
    save_every: int,
    life_mask: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> final mel, final lin, saved states in the backend's own layout."""
    kernels = _kernels(backend, mel.device, precision)
    states = _new_states(mel, lin, num_steps, save_every, life_mask, backend)
    weights = (w1, b1, w2, b2, w3, b3)
    saved = states if save_every else None
    options = num_steps, max(save_every, 1), life_mask, precision
    final_mel, final_lin = kernels.rollout(mel, lin, weights, *options, saved)
    return final_mel, final_lin, states


@torch.library.register_fake("fastnca::rollout")
def _(mel, lin, w1, b1, w2, b2, w3, b3, num_steps, save_every, life_mask, precision, backend):
    final = [torch.empty_like(grid, memory_format=torch.contiguous_format) for grid in (mel, lin)]
    return *final, _new_states(mel, lin, num_steps, save_every, life_mask, backend)


@_operator
def rollout_backward_op(
    grad_mel: Tensor,
    grad_lin: Tensor,
    states: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    num_steps: int,
    save_every: int,
    life_mask: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of the initial mel and lin and of w1, b1, w2, b2, w3, b3."""
    kernels = _kernels(backend, grad_mel.device, precision)
    weights = (w1, b1, w2, b2, w3, b3)
    options = num_steps, save_every, life_mask, precision
    return tuple(kernels.rollout_backward(grad_mel, grad_lin, states, weights, *options))


@torch.library.register_fake("fastnca::rollout_backward")
def _(grad_mel, grad_lin, states, w1, b1, w2, b2, w3, b3, num_steps, save_every, life_mask, precision, backend):
    inputs = (grad_mel, grad_lin, w1, b1, w2, b2, w3, b3)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(ctx, inputs, output):
    mel, lin, *weights, num_steps, save_every, life_mask, precision, backend = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    # A zero gradient for the states would be as large as they are.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(states, *weights)
    ctx.shapes = mel.shape, lin.shape
    ctx.arguments = num_steps, save_every, life_mask, precision, backend


def _backward(ctx, grad_mel, grad_lin, _):
    states, *weights = ctx.saved_tensors
    if ctx.arguments[1] == 0:
        raise RuntimeError("this rollout saved no states (save_every=0): it cannot be differentiated")
    grads = [states.new_zeros(shape) if grad is None else grad for grad, shape in zip((grad_mel, grad_lin), ctx.shapes)]
    return *rollout_backward_op(*grads, states, *weights, *ctx.arguments), None, None, None, None, None


torch.library.register_autograd("fastnca::rollout", _backward, setup_context=_setup_context)


def _kernels(backend, device, precision):
    """The module with the backend's kernels. Raises RuntimeError, with the reason, if they cannot run."""
    reason = _KERNELS[backend].why_not(device, torch.float32, 16, precision)
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return _KERNELS[backend]

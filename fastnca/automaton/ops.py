"""The rollout of both grids: the one door at which inputs are checked, and the fused backends as PyTorch operators.

One autograd node covers the whole rollout of both grids. It keeps states only, 16 or 18 floats per cell, and the
backward kernels recompute the rest.
"""

import numbers
from typing import List, Sequence  # noqa: UP035 (the forms that torch.library of torch 2.6 knows)

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import infer_schema

from . import reference
from .backends import BACKENDS, choose_backend
from .rule import CONTEXT_NAMES, HIDDEN1, WEIGHT_NAMES, saved_steps, weight_shapes


def rollout(
    mel,
    linear,
    weights,
    num_steps,
    *,
    context=None,
    growth=False,
    life_mask=True,
    checkpoint_every=None,
    precision="fp32",
    backend="auto",
):
    """``num_steps`` steps of both grids -> final (mel, linear). Equivalent to::

        mel_rows, linear_rows, columns = context
        reference.rollout(mel, weights, num_steps, life_mask, (mel_rows, columns), growth)
        reference.rollout(linear, weights, num_steps, life_mask, (linear_rows, columns), growth)

    and differentiable in both grids, all weights and the context, once. Gradients that are finite or NaN are the
    reference's. Next to an infinite gradient PyTorch multiplies the stencils' zeros by infinity, which gives NaN; the
    CPU kernels leave these products out and may have an infinity there instead.

    Args:
        mel, linear: grids [N, 16, H, W], H and W free for each; float32 for the fused backends. The reference takes
            any number of channels and any floating point type.
        weights: (w1, b1, w2, b2, w3, b3); for 16 channels the w's are [128, 64, 1, 1], [64, 128, 1, 1] and
            [16, 64, 1, 1].
        context: None or (mel_rows [N or 1, 128, mel H], linear_rows [N or 1, 128, linear H], columns [N or 1, 128, W]):
            what every cell is told at every step. Both grids then have the same W.
        growth: a cell in whose neighborhood nothing lives does not change; needs the life mask.
        checkpoint_every: k keeps every k-th state for the backward pass, which replays the steps between. The
            gradient is the same.
        precision: of the matrix products, a name that the backend knows.
        backend: "auto" or a name of ``backends.BACKENDS``.

    Raises:
        TypeError, ValueError: a type, shape, dtype, device or number that does not fit. RuntimeError: the backend
        cannot run, and why; or a derivative is asked for that it does not have.
    """
    weights = tuple(weights)
    context = None if context is None else tuple(context)
    _check(mel, linear, weights, context, num_steps, checkpoint_every)
    if growth and not life_mask:
        raise ValueError("growth needs the life mask: without it nothing says what lives")
    backend = choose_backend(
        backend, device=mel.device, dtype=mel.dtype, num_channels=mel.shape[1], precision=precision
    )
    if backend == "reference":
        contexts = (None, None) if context is None else ((rows, context[2]) for rows in context[:2])
        return tuple(
            _reference_rollout(grid, num_steps, checkpoint_every, weights, life_mask, context_of_grid, growth)
            for grid, context_of_grid in zip((mel, linear), contexts)
        )
    if not torch.compiler.is_compiling():
        _check_differentiation((mel, linear, *weights, *(context or ())))
    if num_steps == 0:
        return mel.clone(), linear.clone()
    context = [table.expand(mel.shape[0], -1, -1) for table in context or ()]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (mel, linear, *weights, *context))
    save_every = min(checkpoint_every or 1, num_steps) if differentiable else 0
    rule = life_mask, growth, precision, backend
    final_mel, final_linear, _ = rollout_op(mel, linear, weights, context, num_steps, save_every, *rule)
    return final_mel, final_linear


def _check(mel, linear, weights, context, num_steps, checkpoint_every):
    if len(weights) != len(WEIGHT_NAMES):
        raise ValueError(f"weights must be ({', '.join(WEIGHT_NAMES)}), got {len(weights)} tensors")
    if context is not None and len(context) != len(CONTEXT_NAMES):
        raise ValueError(f"context must be ({', '.join(CONTEXT_NAMES)}), got {len(context)} tensors")
    tables = tuple(zip(CONTEXT_NAMES, context or ()))
    named = (("mel", mel), ("linear", linear), *zip(WEIGHT_NAMES, weights), *tables)
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    num_channels = weights[-1].shape[0] if weights[-1].dim() == 1 else 0
    for name, grid in named[:2]:
        if grid.dim() != 4 or grid.shape[1] != num_channels or 0 in grid.shape:
            raise ValueError(
                f"{name} must have shape [N, {num_channels}, H, W] without an empty axis, got {list(grid.shape)}"
            )
    if mel.shape[0] != linear.shape[0]:
        raise ValueError(f"mel and linear must have the same batch size, got {mel.shape[0]} and {linear.shape[0]}")
    for (name, weight), shape in zip(named[2:], weight_shapes(num_channels)):
        if weight.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
    if tables and mel.shape[3] != linear.shape[3]:
        raise ValueError(
            f"with context mel and linear must have the same width, got {mel.shape[3]} and {linear.shape[3]}"
        )
    for (name, table), length in zip(tables, (mel.shape[2], linear.shape[2], mel.shape[3])):
        if table.dim() != 3 or table.shape[0] not in (1, mel.shape[0]) or table.shape[1:] != (HIDDEN1, length):
            batch = f"{mel.shape[0]} or 1" if mel.shape[0] > 1 else "1"
            raise ValueError(f"{name} must have shape [{batch}, {HIDDEN1}, {length}], got {list(table.shape)}")
    dtype, device = weights[0].dtype, weights[0].device
    for name, tensor in named:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have the weights' dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the weights' device {device}, got {tensor.device}")
    if not isinstance(num_steps, numbers.Integral) or num_steps < 0:
        raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
    if checkpoint_every is not None and (not isinstance(checkpoint_every, numbers.Integral) or checkpoint_every < 1):
        raise ValueError(f"checkpoint_every must be None or an integer of at least 1, got {checkpoint_every!r}")


def _check_differentiation(tensors):
    """Raises RuntimeError for what would run without an error and lose the derivative."""
    way = "backward() and torch.autograd.grad are what a fused rollout has; backend='reference' has all of PyTorch's"
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"torch.func does not reach into a fused rollout: {way}")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"a fused rollout has no forward-mode derivative: {way}")


def _reference_rollout(grid, num_steps, checkpoint_every, weights, *rule):
    if checkpoint_every is None or not torch.is_grad_enabled():
        return reference.rollout(grid, weights, num_steps, *rule)
    from torch.utils.checkpoint import checkpoint

    for done in range(0, num_steps, checkpoint_every):
        steps = min(checkpoint_every, num_steps - done)
        grid = checkpoint(reference.rollout, grid, weights, steps, *rule, use_reentrant=False)
    return grid


def _new_states(mel, linear, num_steps, save_every, life_mask, backend):
    """Memory for the saved states of a rollout, none with ``save_every=0``."""
    if save_every == 0:
        return mel.new_empty(0)
    floats = BACKENDS[backend].state_floats(mel, linear, life_mask)
    return mel.new_empty(len(saved_steps(num_steps, save_every)), floats)


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
    linear: Tensor,
    weights: Sequence[Tensor],
    context: Sequence[Tensor],
    num_steps: int,
    save_every: int,
    life_mask: bool,
    growth: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> final mel, final linear, saved states in the backend's own layout. ``context`` is empty or three tables whose
    batch is that of the grids."""
    states = _new_states(mel, linear, num_steps, save_every, life_mask, backend)
    saved = states if save_every else None
    options = num_steps, max(save_every, 1), life_mask, growth, precision
    final_mel, final_linear = BACKENDS[backend].rollout(mel, linear, weights, context, *options, saved)
    return final_mel, final_linear, states


@torch.library.register_fake("fastnca::rollout")
def _(mel, linear, weights, context, num_steps, save_every, life_mask, growth, precision, backend):
    final = [torch.empty_like(grid, memory_format=torch.contiguous_format) for grid in (mel, linear)]
    return *final, _new_states(mel, linear, num_steps, save_every, life_mask, backend)


@_operator
def rollout_backward_op(
    grad_mel: Tensor,
    grad_linear: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    context: Sequence[Tensor],
    num_steps: int,
    save_every: int,
    life_mask: bool,
    growth: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, List[Tensor], List[Tensor]]:  # noqa: UP006
    """-> gradients of the initial mel, of the initial linear, of the weights and of the context."""
    options = num_steps, save_every, life_mask, growth, precision
    return BACKENDS[backend].rollout_backward(grad_mel, grad_linear, states, weights, context, *options)


@torch.library.register_fake("fastnca::rollout_backward")
def _(grad_mel, grad_linear, states, weights, context, *_):
    def empty(tensors):
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]

    return *empty((grad_mel, grad_linear)), empty(weights), empty(context)


def _setup_context(ctx, inputs, output):
    mel, linear, weights, context, *ctx.arguments = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    # A zero gradient for the states would be as large as they are.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(states, *weights, *context)
    ctx.num_weights = len(weights)
    ctx.shapes = mel.shape, linear.shape


def _backward(ctx, grad_mel, grad_linear, _):
    states, *tensors = ctx.saved_tensors
    weights, context = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
    save_every = ctx.arguments[1]
    if save_every == 0:
        raise RuntimeError("this rollout saved no states (save_every=0): it cannot be differentiated")
    grads = [
        states.new_zeros(shape) if grad is None else grad for grad, shape in zip((grad_mel, grad_linear), ctx.shapes)
    ]
    return *rollout_backward_op(*grads, states, weights, context, *ctx.arguments), *(None for _ in ctx.arguments)


torch.library.register_autograd("fastnca::rollout", _backward, setup_context=_setup_context)


def _backward_of_backward(ctx, *grads):
    raise RuntimeError(
        "a fused rollout can be differentiated once, not twice; backend='reference' can, as often as you like"
    )


torch.library.register_autograd(
    "fastnca::rollout_backward", _backward_of_backward, setup_context=lambda ctx, inputs, output: None
)

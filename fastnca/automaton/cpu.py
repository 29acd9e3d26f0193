"""The CPU kernels (csrc/) on tensors. The extension takes addresses, so everything is made contiguous here."""

import threading
from functools import cache

import torch

from .rule import CHANNELS

try:
    from .. import _C
except ImportError as error:
    _C = None
    _import_error = error

PRECISIONS = ("fp32", "bf16")


def why_not(device, dtype, num_channels, precision):
    """None if the kernels can run this request, else the reason as a clause."""
    if _C is None:
        return f"the extension fastnca._C could not be loaded ({_import_error})"
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    if dtype != torch.float32:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if num_channels != CHANNELS:
        return f"it is compiled for {CHANNELS} channels, not for {num_channels}"
    if precision not in PRECISIONS:
        return f"it knows the precisions {', '.join(PRECISIONS)}, not {precision!r}"
    if precision == "bf16" and not _C.has_bf16():
        return f"precision='bf16' needs the instruction set avx512_bf16 or amx_bf16, and {capability()} is in use"
    return None


def capability():
    """Name of the instruction set in use; the variable FASTNCA_CPU_CAPABILITY chooses it at import."""
    return _C.capability()


def bf16_speedup():
    """How many times as fast as float32 this processor multiplies in bf16, measured once in 0.2 s; 0 where it cannot.

    Some start a bf16 multiply-add as often as one of float32, which is twice the rate, and some every other cycle.
    """
    return _bf16_speedup(capability()) if _C.has_bf16() else 0.0


@cache
def _bf16_speedup(capability):
    return _C.peak_flops(1, True) / _C.peak_flops(1)


def state_floats(mel, linear, life_mask):
    """Floats of one saved state."""
    return mel.numel() + linear.numel()


def _problem(mel, linear, num_steps, save_every, life_mask, growth, precision):
    sizes = (mel.shape[0], *mel.shape[2:], *linear.shape[2:])
    handles_signals = threading.get_ident() == threading.main_thread().ident
    rule = life_mask, growth, precision == "bf16"
    return sizes, num_steps, save_every, *rule, torch.get_num_threads(), handles_signals


def _addresses(tensors):
    return tuple(tensor.data_ptr() for tensor in tensors)


def _by_place(context):
    """Context tables [N, 128, length] as the kernels read them: [N, length, 128]."""
    return [table.transpose(1, 2).contiguous() for table in context]


def rollout(mel, linear, weights, context, num_steps, save_every, life_mask, growth, precision, states):
    """-> final (mel, linear). ``states`` receives every ``save_every``-th state and the last, or is None."""
    grids = [mel.contiguous(), linear.contiguous()]
    weights = [weight.contiguous() for weight in weights]
    tables = _by_place(context)
    saved = 0 if states is None else states.data_ptr()
    final = [torch.empty_like(grid) for grid in grids]
    problem = _problem(mel, linear, num_steps, save_every, life_mask, growth, precision)
    _C.rollout(*problem, _addresses(weights), _addresses(tables), _addresses(grids), _addresses(final), saved)
    return final


def rollout_backward(
    grad_mel, grad_linear, states, weights, context, num_steps, save_every, life_mask, growth, precision
):
    """-> gradients of the initial mel, of the initial linear, of the weights and of the context, the last two lists."""
    grads = [grad_mel.contiguous(), grad_linear.contiguous()]
    weights = [weight.contiguous() for weight in weights]
    tables = _by_place(context)
    grad_initial = [torch.empty_like(grad) for grad in grads]
    grad_weights = [torch.empty_like(weight) for weight in weights]
    grad_tables = [torch.empty_like(table) for table in tables]
    problem = _problem(grad_mel, grad_linear, num_steps, save_every, life_mask, growth, precision)
    _C.rollout_backward(
        *problem,
        _addresses(weights),
        _addresses(tables),
        states.data_ptr(),
        _addresses(grads),
        _addresses(grad_initial),
        _addresses(grad_weights),
        _addresses(grad_tables),
    )
    return *grad_initial, grad_weights, [table.transpose(1, 2).contiguous() for table in grad_tables]

"""Which implementation of the rollout runs, and why another one cannot.

A backend is a module with one predicate, ``why_not``: it returns None when the backend can run the request and the
reason, as a clause, when it cannot. ``auto`` takes the first that can; a backend asked for by name raises with its
reason.
"""

import torch

from . import cpu, reference, triton

PRECISIONS = triton.PRECISIONS  # the other backends know some of these

WORTHWHILE = 1.3  # times as fast as fp32: less is eaten up by what has to be done beside the products

# In the order of preference.
BACKENDS = {"triton": triton, "cpu": cpu, "reference": reference}


def _candidates(device):
    """What "auto" tries. Triton's interpreter runs on the CPU too, but only for those who ask for it by name."""
    return tuple(name for name in BACKENDS if name != "triton" or device.type != "cpu")


def check_names(backend, precision):
    """Raises ValueError unless both are names that fastnca knows."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: expected one of auto, {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")


def why_not(backend, *, device="cpu", dtype=torch.float32, num_channels=16, precision="fp32"):
    """None if ``backend`` can run this request, else the reason as a clause."""
    return BACKENDS[backend].why_not(torch.device(device), dtype, num_channels, precision)


def choose_backend(backend="auto", *, device="cpu", dtype=torch.float32, num_channels=16, precision="fp32"):
    """The name of the backend that will run.

    Raises ValueError for an unknown name or precision and RuntimeError, with the reason, where the request cannot run.
    """
    check_names(backend, precision)
    request = {"device": device, "dtype": dtype, "num_channels": num_channels, "precision": precision}
    candidates = _candidates(torch.device(device)) if backend == "auto" else (backend,)
    reasons = {name: why_not(name, **request) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise RuntimeError("; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items()))


def choose_device(backend="auto"):
    """Where a model of that backend goes: "cuda" where PyTorch finds a GPU, unless the backend is "cpu"."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def fastest_precision(backend):
    """The precision to train in: "bf16" where this processor multiplies much faster in it, else "fp32".

    On a GPU sounds that learned for equally long came closest, and stayed, in fp32: docs/performance.md."""
    return "bf16" if backend == "cpu" and cpu.bf16_speedup() >= WORTHWHILE else "fp32"

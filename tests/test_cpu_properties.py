"""The CPU kernels against the reference on shapes, layouts and values that hypothesis chooses.

The default profile is the same on every run; ``HYPOTHESIS_PROFILE=explore`` looks further and elsewhere each time.
"""

import os
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_cpu import assert_errs_as_float32, make_grid, make_weights, reference_rollout, resting_weights, run

from fastnca import _cpu, ops, reference

if _cpu.why_not(torch.device("cpu"), torch.float32, 16, "fp32"):
    pytest.skip("fastnca was installed without its extension", allow_module_level=True)

CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", max_examples=100, derandomize=True, database=None, **CHECKS)
settings.register_profile("explore", max_examples=1000, **CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@contextmanager
def kernels(capability, threads):
    before = _cpu.capability(), torch.get_num_threads()
    _cpu._C.set_capability(capability)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        _cpu._C.set_capability(before[0])
        torch.set_num_threads(before[1])


@pytest.fixture(autouse=True)
def _one_thread():
    """For the reference, whose grids here are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Around vectors (4, 8, 16), blocks and tiles, and anything else.
lengths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 96, 97, 129]))
small_lengths = st.integers(1, 12)
capabilities = st.sampled_from(_cpu._C.capabilities())
thread_counts = st.sampled_from([1, 2])
seeds = st.integers(0, 2**32 - 1)


def make_problem(data, lengths=lengths, alpha_levels=None, weights=make_weights):
    """(grids, weights, gradients) of drawn sizes."""
    generator = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    n = data.draw(st.integers(1, 3), "batch")
    grids = [make_grid(generator, n, data.draw(lengths, "height"), data.draw(lengths, "width")) for _ in range(2)]
    if alpha_levels is not None:
        for grid in grids:
            levels = torch.tensor(data.draw(alpha_levels, "alpha"))
            grid[:, 1] = levels[torch.randint(len(levels), grid[:, 1].shape, generator=generator)]
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    return grids, weights(generator), grads


def contiguous(x):
    return x


def every_second(x):
    wide = x.new_full([2 * size for size in x.shape], float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def offset(x):
    """Not aligned to anything but a float."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def expanded(x):
    """One sample for the whole batch, as if it were many."""
    return x[:1].expand_as(x)


layouts = st.sampled_from([contiguous, every_second, transposed, channels_last, offset, expanded])


def rounding_bound(s, weights, num_steps, life_mask):
    """What each value of a float32 rollout of one grid may err by, to first order, if every sum is rounded once to its
    terms' absolute sum: a running error analysis (Higham 2002, "Accuracy and Stability", section 3.3)."""
    s, (w1, b1, w2, b2, w3, b3) = s.double(), [weight.double() for weight in weights]
    channels = s.shape[1]
    stencils = torch.tensor((reference.SOBEL_X, reference.SOBEL_Y, reference.LAPLACIAN)).double().abs()

    def perceive(x):
        parts = [F.conv2d(x, stencil.expand(channels, 1, 3, 3), padding=1, groups=channels) for stencil in stencils]
        return torch.cat([x, *parts], dim=1)

    def layer(x, error, weight, bias):
        return F.conv2d(x.abs() + error, weight.abs(), bias.abs())

    error = torch.zeros_like(s)
    for _ in range(num_steps):
        p = reference.perceive(s)
        h1, error1 = F.relu(F.conv2d(p, w1, b1)), layer(p, perceive(s.abs() + error), w1, b1)
        h2, error2 = F.relu(F.conv2d(h1, w2, b2)), layer(h1, error1, w2, b2)
        u, error = s + F.conv2d(h2, w3, b3), s.abs() + error + layer(h2, error2, w3, b3)
        s = reference.step(s, [w1, b1, w2, b2, w3, b3], life_mask)
        if life_mask:
            u[:, 1] = u[:, 1].clamp(0, 1)
            life, life_error = (F.max_pool2d(x[:, 1:2], kernel_size=3, stride=1, padding=1) for x in (u, error))
            error = error * life + u.abs() * life_error + s.abs()
    return error * 2**-24


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
@given(data=st.data())
def test_steps_err_as_float32_does(life_mask, data):
    levels = st.sampled_from([(0.0, 1.0), (1.0,), (-0.5, 0.25, 0.25, 1.0, 2.0), (0.0, -0.0)])
    grids, weights, _ = make_problem(data, alpha_levels=levels)
    num_steps = data.draw(st.integers(1, 2), "steps")
    with torch.no_grad():
        with kernels(data.draw(capabilities), data.draw(thread_counts)):
            fused = ops.rollout(*grids, weights, num_steps, life_mask=life_mask)
        eager = reference_rollout(num_steps, life_mask)(*grids, weights)
        doubles = [[x.double() for x in part] for part in (grids, weights)]
        judge = reference_rollout(num_steps, life_mask)(*doubles[0], doubles[1])
    for grid, actual, float32, expected in zip(grids, fused, eager, judge):
        # Roundings cancel in part: over hundreds of examples neither came closer than a fortieth of the bound.
        allowed = rounding_bound(grid, weights, num_steps, life_mask) / 16
        for result in (actual, float32):
            assert ((result - expected).abs() <= allowed).all()


@given(data=st.data())
def test_layout_threads_and_checkpoints_do_not_change_a_bit(data):
    grids, weights, grads = make_problem(data)
    chosen = [data.draw(layouts, "layout") for _ in range(4)]
    grids, grads = ([layout(x) for layout, x in zip(chosen[i:], pair)] for i, pair in ((0, grids), (2, grads)))
    strided = [data.draw(st.sampled_from([contiguous, every_second, offset]))(w) for w in weights]
    num_steps = data.draw(st.integers(1, 5), "steps")
    every = data.draw(st.integers(1, 6), "checkpoint_every")
    name = data.draw(capabilities, "capability")

    def gradients(grids, weights, grads, every=None):
        inputs = [x.detach().requires_grad_() for x in (*grids, *weights)]
        outputs = ops.rollout(*inputs[:2], inputs[2:], num_steps, checkpoint_every=every, precision=precision)
        return *outputs, *torch.autograd.grad(outputs, inputs, grads)

    with kernels(name, 1):
        device = torch.device("cpu")
        available = [p for p in ("fp32", "bf16") if _cpu.why_not(device, torch.float32, 16, p) is None]
        precision = data.draw(st.sampled_from(available), "precision")
        plain = [[x.contiguous().clone() for x in part] for part in (grids, weights, grads)]
        expected = gradients(*plain)
    with kernels(name, data.draw(st.integers(1, 4), "threads")):
        actual = gradients(grids, strided, grads, every)
    for mine, target in zip(actual, expected):
        assert torch.equal(mine, target)


def distance_from_relu_kinks(grid, weights):
    """How far float64 stays from where rounding decides whether a hidden unit passes its gradient."""
    w1, b1, w2, b2, *_ = (w.double() for w in weights)
    h1 = F.conv2d(reference.perceive(grid.double()), w1, b1)
    h2 = F.conv2d(F.relu(h1), w2, b2)
    return min(h.abs().nan_to_num(nan=torch.inf).min() for h in (h1, h2))


@given(data=st.data())
def test_gradients_through_ties_and_clamps(data):
    """Alpha stays exactly at a few levels, so that every window has ties and many gates are at their edge."""
    levels = st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]), min_size=1, max_size=4)
    problem = make_problem(data, small_lengths, levels, resting_weights)
    assume(all(distance_from_relu_kinks(grid, problem[1]) > 4e-7 for grid in problem[0]))
    with kernels(data.draw(capabilities), data.draw(thread_counts)):
        actual = run(lambda *x: ops.rollout(*x, 1), *problem)
    assert_errs_as_float32(actual, problem, 1, slack=2e-6)


def assert_spreads_as_in_the_reference(data, value, where):
    """``value`` at one place of the two grids, or of their gradients: all results are NaN or infinite where the
    reference's are, and close elsewhere."""
    problem = make_problem(data, small_lengths)
    for grid in problem[where]:
        place = [data.draw(st.integers(0, size - 1)) for size in grid.shape]
        grid[tuple(place)] = value
    assume(all(distance_from_relu_kinks(grid, problem[1]) > 4e-7 for grid in problem[0]))
    with kernels(data.draw(capabilities), data.draw(thread_counts)):
        actual = run(lambda *x: ops.rollout(*x, 1), *problem)
    expected = run(reference_rollout(1), *problem)
    for name, target in expected.items():
        scale = target[target.isfinite()].abs().max() if target.isfinite().any() else 1.0
        torch.testing.assert_close(
            actual[name], target, rtol=1e-4, atol=1e-5 * float(scale) + 1e-5, equal_nan=True, msg=f"{name}: {{}}".format
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, -1e-44, 1e36], ids=str)
@settings(max_examples=max(1, settings().max_examples // 4))
@given(data=st.data())
def test_special_values_spread_as_in_the_reference(value, data):
    assert_spreads_as_in_the_reference(data, value, where=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40], ids=str)
@settings(max_examples=max(1, settings().max_examples // 4))
@given(data=st.data())
def test_special_gradients_spread_as_in_the_reference(value, data):
    assert_spreads_as_in_the_reference(data, value, where=2)

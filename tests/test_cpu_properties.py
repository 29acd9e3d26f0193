"""The CPU kernels against the reference on shapes, layouts and values that hypothesis chooses.

The default profile is the same on every run; ``HYPOTHESIS_PROFILE=explore`` looks further and elsewhere each time.
"""

import os

import parity
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from parity import cpu_kernels, reference_rollout

from fastnca.automaton import cpu, ops, reference

if not parity.CAPABILITIES:
    pytest.skip("fastnca was installed without its extension", allow_module_level=True)

CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", max_examples=100, derandomize=True, database=None, **CHECKS)
settings.register_profile("explore", max_examples=1000, **CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan", "one_thread")
CPU = parity.Backend("cpu")

# Around vectors (4, 8, 16), blocks and tiles, and anything else.
lengths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 96, 97, 129]))
small_lengths = st.integers(1, 12)
capabilities = st.sampled_from(parity.CAPABILITIES)
thread_counts = st.sampled_from([1, 2])
seeds = st.integers(0, 2**32 - 1)


def make_problem(data, lengths=lengths, alpha_levels=None, resting=False):
    """A parity.Problem of drawn sizes."""
    seed, n = data.draw(seeds, "seed"), data.draw(st.integers(1, 3), "batch")
    sizes = [(data.draw(lengths, "height"), data.draw(lengths, "width")) for _ in range(2)]
    levels = None if alpha_levels is None else data.draw(alpha_levels, "alpha")
    return parity.make_problem(sizes, n, seed, levels, resting)


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
        with cpu_kernels(data.draw(capabilities), data.draw(thread_counts)):
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

    with cpu_kernels(name, 1):
        device = torch.device("cpu")
        available = [p for p in ("fp32", "bf16") if cpu.why_not(device, torch.float32, 16, p) is None]
        precision = data.draw(st.sampled_from(available), "precision")
        plain = [[x.contiguous().clone() for x in part] for part in (grids, weights, grads)]
        expected = gradients(*plain)
    with cpu_kernels(name, data.draw(st.integers(1, 4), "threads")):
        actual = gradients(grids, strided, grads, every)
    for mine, target in zip(actual, expected):
        assert torch.equal(mine, target)


@given(data=st.data())
def test_gradients_through_ties_and_clamps(data):
    """Alpha stays exactly at a few levels, so that every window has ties and many gates are at their edge."""
    levels = st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]), min_size=1, max_size=4)
    problem = make_problem(data, small_lengths, levels, resting=True)
    assume(parity.distance_from_kinks(problem, 1, life_mask=False) > 4e-7)  # of relu's kinks alone
    with cpu_kernels(data.draw(capabilities), data.draw(thread_counts)):
        actual = parity.run(CPU.rollout(1), problem)
    parity.assert_errs_as_float32(actual, problem, 1, slack=2e-6)


def assert_spreads_as_in_the_reference(data, value, where):
    """``value`` at one place of the two grids, or of their gradients: all results are NaN or infinite where the
    reference's are, and close elsewhere."""
    problem = make_problem(data, small_lengths)
    for grid in getattr(problem, where):
        place = [data.draw(st.integers(0, size - 1)) for size in grid.shape]
        grid[tuple(place)] = value
    assume(parity.distance_from_kinks(problem, 1, life_mask=False) > 4e-7)  # of relu's kinks alone
    with cpu_kernels(data.draw(capabilities), data.draw(thread_counts)):
        actual = parity.run(CPU.rollout(1), problem)
    expected = parity.run(reference_rollout(1), problem)
    parity.assert_spreads_alike(actual, expected, of_the_largest=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, -1e-44, 1e36], ids=str)
@settings(max_examples=max(1, settings().max_examples // 4))
@given(data=st.data())
def test_special_values_spread_as_in_the_reference(value, data):
    assert_spreads_as_in_the_reference(data, value, where="grids")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40], ids=str)
@settings(max_examples=max(1, settings().max_examples // 4))
@given(data=st.data())
def test_special_gradients_spread_as_in_the_reference(value, data):
    assert_spreads_as_in_the_reference(data, value, where="grads")

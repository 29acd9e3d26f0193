"""The CPU kernels against the reference, with float64 as the judge: they may err as float32 PyTorch does, not more."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastnca import _cpu, ops, reference

if _cpu.why_not(torch.device("cpu"), torch.float32, 16, "fp32"):
    pytest.skip("fastnca was installed without its extension", allow_module_level=True)

CAPABILITIES = _cpu._C.capabilities()
# Widths and heights around the block (48 cells) and the tile (64 x 16 cells) and of real grids.
SIZES = [((1, 1), (1, 7)), ((5, 3), (7, 49)), ((80, 8), (513, 8)), ((3, 130), (70, 64)), ((19, 65), (1, 200))]
SIZE_IDS = ["-".join(f"{h}x{w}" for h, w in pair) for pair in SIZES]
NAMES = ("mel", "lin", "w1", "b1", "w2", "b2", "w3", "b3")


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    before = _cpu.capability()
    _cpu._C.set_capability(request.param)
    yield request.param
    _cpu._C.set_capability(before)


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_weights(generator, scale=1.0):
    weights = []
    for shape in ops._WEIGHT_SHAPES:
        fan_in = shape[1] if len(shape) == 4 else 25
        weights.append(torch.randn(shape, generator=generator) * scale * fan_in**-0.5)
    return weights


def make_grid(generator, n, height, width):
    grid = torch.randn(n, 16, height, width, generator=generator)
    grid[:, 1] = torch.rand(n, height, width, generator=generator)
    return grid


def distance_from_kinks(grid, weights, num_steps, life_mask):
    """How far float64 stays from the points where rounding decides a gradient: relu, clamp and pooling."""
    w1, b1, w2, b2, w3, b3 = (w.double() for w in weights)
    s, nearest = grid.double(), torch.tensor(float("inf"))
    for _ in range(num_steps):
        h1 = F.conv2d(reference.perceive(s), w1, b1)
        h2 = F.conv2d(F.relu(h1), w2, b2)
        alpha = (s + F.conv2d(F.relu(h2), w3, b3))[:, 1:2]
        nearest = min(nearest, h1.abs().min(), h2.abs().min())
        if life_mask:
            nearest = min(nearest, alpha.abs().min(), (alpha - 1).abs().min())
            v = alpha.clamp(0, 1)
            windows = F.unfold(F.pad(v, (1, 1, 1, 1), value=-1.0), 3).topk(2, dim=1).values
            gap = windows[:, 0] - windows[:, 1]
            nearest = min(nearest, gap.where(gap > 0, nearest).min())
        s = reference.step(s, [w.double() for w in weights], life_mask)
    return nearest


def make_problem(sizes, num_steps=2, life_mask=True, n=1):
    """The first seed whose rollout keeps away from kinks, so that float32 and float64 must agree tightly."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        weights = make_weights(generator)
        grids = [make_grid(generator, n, *size) for size in sizes]
        if all(distance_from_kinks(grid, weights, num_steps, life_mask) > 4e-7 * num_steps for grid in grids):
            grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
            return grids, weights, grads
    raise AssertionError("no seed keeps away from kinks")


def run(rollout, grids, weights, grads, dtype=torch.float32):
    """-> outputs and the gradients of the inputs, by name."""
    inputs = [x.to(dtype).detach().clone().requires_grad_() for x in (*grids, *weights)]
    outputs = rollout(inputs[0], inputs[1], inputs[2:])
    gradients = torch.autograd.grad(outputs, inputs, [grad.to(dtype) for grad in grads])
    return dict(zip(("final_mel", "final_lin", *NAMES), (*outputs, *gradients)))


def reference_rollout(num_steps, life_mask=True):
    return lambda mel, lin, weights: [reference.rollout(g, weights, num_steps, life_mask) for g in (mel, lin)]


class MeasuredProduct(torch.autograd.Function):
    """A 1x1 convolution that notes what its parameters' gradients sum: ``magnitudes`` of the terms, by name."""

    magnitudes = {}

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def sums(grad, x):
            return torch.einsum("nohw,nihw->oi", grad, x)[..., None, None], grad.sum((0, 2, 3))

        layer = [shape[0] for shape in ops._WEIGHT_SHAPES[::2]].index(weight.shape[0]) + 1
        for name, terms in zip((f"w{layer}", f"b{layer}"), sums(grad.abs(), x.abs())):
            MeasuredProduct.magnitudes[name] = MeasuredProduct.magnitudes.get(name, 0.0) + terms
        return torch.einsum("nohw,oi->nihw", grad, weight[..., 0, 0]), *sums(grad, x)


class MeasuredF:
    relu, max_pool2d = F.relu, F.max_pool2d

    @staticmethod
    def conv2d(x, weight, *args, **kwargs):
        return F.conv2d(x, weight, *args, **kwargs) if kwargs else MeasuredProduct.apply(x, weight, *args)


def run_judge(problem, num_steps, life_mask):
    """-> the float64 reference's results and the largest sum of |terms| in each parameter's gradient, by name."""
    MeasuredProduct.magnitudes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "F", MeasuredF)
        judge = run(reference_rollout(num_steps, life_mask), *problem, dtype=torch.float64)
    return judge, {name: terms.max() for name, terms in MeasuredProduct.magnitudes.items()}


def assert_errs_as_float32(actual, problem, num_steps, life_mask=True, slack=1e-6):
    """The error's norm is within twice float32 PyTorch's, and ``slack`` of the result's norm. The largest error is
    within three times float32 PyTorch's and a few units of rounding: units of the largest value, and for a parameter's
    gradient, a sum over all cells that may cancel, of its terms. (Where they cancel PyTorch's sums in pairs are
    luckier: bias gradients were seen at five times its error. Without rounding before the sum, one over n cells is
    bound by n units, and one over blocks of 48 by 48 + n / 48.)"""
    eager = run(reference_rollout(num_steps, life_mask), *problem)
    judge, magnitudes = run_judge(problem, num_steps, life_mask)
    for name, expected in judge.items():
        error, eager_error = ((x[name] - expected).abs().max() for x in (actual, eager))
        allowed = 3 * eager_error + 8 * 2**-24 * magnitudes.get(name, expected.abs().max())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, float32 PyTorch {eager_error:.2e}"
        error, eager_error = ((x[name] - expected).norm() / expected.norm().clamp(min=1e-30) for x in (actual, eager))
        assert error <= 2 * eager_error + slack, f"{name}: error {error:.2e}, float32 PyTorch {eager_error:.2e}"


def assert_close_to_float64(rollout, problem, num_steps, life_mask=True):
    assert_errs_as_float32(run(rollout, *problem), problem, num_steps, life_mask)


def assert_as_good_as_float32(problem, num_steps, life_mask=True):
    rollout = partial(ops.rollout, num_steps=num_steps, life_mask=life_mask)
    assert_close_to_float64(rollout, problem, num_steps, life_mask)


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_two_steps_and_every_gradient(capability, sizes, life_mask):
    problem = make_problem(sizes, num_steps=2, life_mask=life_mask)
    assert_as_good_as_float32(problem, 2, life_mask)


def test_one_step_of_a_batch(capability):
    assert_as_good_as_float32(make_problem(((6, 70), (21, 66)), num_steps=1, n=3), 1)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 3, 5, 7])
def test_checkpoints_do_not_change_a_bit(checkpoint_every):
    problem = make_problem(((4, 9), (17, 13)), num_steps=1)
    full = run(lambda *x: ops.rollout(*x, 5), *problem)
    replayed = run(lambda *x: ops.rollout(*x, 5, checkpoint_every=checkpoint_every), *problem)
    for name in full:
        assert torch.equal(replayed[name], full[name]), name


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(capability, num_threads, threads):
    problem = make_problem(((33, 70), (50, 41)), num_steps=1, n=2)
    num_threads(1)
    alone = run(lambda *x: ops.rollout(*x, 4, checkpoint_every=3), *problem)
    num_threads(threads)
    team = run(lambda *x: ops.rollout(*x, 4, checkpoint_every=3), *problem)
    for name in alone:
        assert torch.equal(team[name], alone[name]), name


def resting_weights(generator):
    """Weights that leave alpha exactly as it is, whatever the rounding, and give every parameter a gradient."""
    weights = make_weights(generator, scale=0.3)
    weights[4][1] = 0
    weights[5][1] = 0
    return weights


@pytest.mark.parametrize("levels", [(1.0,), (0.0,), (0.0, 1.0), (0.25, 0.5)], ids=str)
def test_ties_send_the_gradient_to_the_first_maximum(capability, levels):
    generator = torch.Generator().manual_seed(1)
    grids = [make_grid(generator, 2, *size) for size in ((11, 20), (30, 35))]
    for grid in grids:
        grid[:, 1] = torch.tensor(levels)[torch.randint(len(levels), grid[:, 1].shape, generator=generator)]
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    assert_as_good_as_float32((grids, resting_weights(generator), grads), 1)


def test_the_clamp_passes_the_gradient_at_both_ends(capability):
    generator = torch.Generator().manual_seed(2)
    grids = [make_grid(generator, 1, *size) for size in ((20, 21), (5, 80))]
    levels = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5])
    for grid in grids:
        grid[:, 1] = levels[torch.randint(5, grid[:, 1].shape, generator=generator)]
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    problem = grids, resting_weights(generator), grads
    assert_as_good_as_float32(problem, 1)
    gradient = run(lambda *x: ops.rollout(*x, 1), *problem)["mel"][:, 1]
    outside = (grids[0][:, 1] < 0) | (grids[0][:, 1] > 1)
    expected = run(reference_rollout(1), *problem)["mel"][:, 1]
    # Outside [0, 1] only the perception passes a gradient to alpha: closing the gate must show.
    torch.testing.assert_close(gradient[outside], expected[outside], rtol=1e-4, atol=1e-5)


def test_long_rollout_flips_no_more_cells_than_float32(capability):
    """Life amplifies rounding: over 96 steps some cells take another path. As few as with float32 PyTorch."""
    generator = torch.Generator().manual_seed(3)
    weights = make_weights(generator)
    weights[4] *= 0.02
    weights[5] = torch.randn(16, generator=generator) * 0.01
    grids = [make_grid(generator, 1, *size) for size in ((20, 24), (40, 24))]

    def flipped(outputs, judge):
        return [((x - y).abs().amax(1) > 1e-3).double().mean().item() for x, y in zip(outputs, judge)]

    with torch.no_grad():
        judge = reference_rollout(96)(*(g.double() for g in grids), [w.double() for w in weights])
        eager = flipped(reference_rollout(96)(*grids, weights), judge)
        fused = flipped(ops.rollout(*grids, weights, 96), judge)
    assert max(x.abs().max() for x in judge) > 0.1, "the automaton died: nothing is compared"
    for ours, theirs in zip(fused, eager):
        assert ours <= 2 * theirs + 0.01


@pytest.mark.parametrize("channel", [0, 1, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40], ids=str)
def test_special_values_spread_as_in_the_reference(capability, value, channel):
    generator = torch.Generator().manual_seed(4)
    weights = make_weights(generator)
    grids = [make_grid(generator, 1, *size) for size in ((9, 12), (6, 70))]
    for grid in grids:
        grid[0, channel, 4, 5] = value
    with torch.no_grad():
        fused = ops.rollout(*grids, weights, 2)
        expected = reference_rollout(2)(*grids, weights)
    for actual, target in zip(fused, expected):
        torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_infinity_meets_the_zeros_of_the_filters(capability):
    """Zero times infinity is NaN. With positive weights nothing else could make one."""
    generator = torch.Generator().manual_seed(6)
    weights = [w.abs() for w in make_weights(generator)]
    grids = [make_grid(generator, 1, *size).abs() for size in ((9, 12), (6, 70))]
    for grid in grids:
        grid[0, 7, 4, 5] = float("inf")
    with torch.no_grad():
        fused = ops.rollout(*grids, weights, 1, life_mask=False)
        expected = reference_rollout(1, life_mask=False)(*grids, weights)
    for actual, target in zip(fused, expected):
        assert target.isnan().any() and torch.equal(actual.isnan(), target.isnan())
        assert torch.equal(actual.isinf(), target.isinf())


class RoundedProduct(torch.autograd.Function):
    """A 1x1 convolution whose three products, value and both gradients, take operands rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = x.bfloat16().to(x.dtype), weight.bfloat16().to(weight.dtype)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.bfloat16().to(grad.dtype)
        grad_weight = torch.einsum("nohw,nihw->oi", grad, x)[..., None, None]
        return torch.einsum("nohw,oi->nihw", grad, weight[..., 0, 0]), grad_weight, grad.sum((0, 2, 3))


class RoundedF:
    relu, max_pool2d = F.relu, F.max_pool2d

    @staticmethod
    def conv2d(x, weight, *args, **kwargs):
        return F.conv2d(x, weight, *args, **kwargs) if kwargs else RoundedProduct.apply(x, weight, *args)


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def bf16(request):
    if request.param not in CAPABILITIES:
        pytest.skip(f"the processor has no {request.param}")
    before = _cpu.capability()
    _cpu._C.set_capability(request.param)
    yield
    _cpu._C.set_capability(before)


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_bf16_rounds_operands_and_nothing_else(bf16, monkeypatch, sizes, life_mask):
    problem = make_problem(sizes, num_steps=2, life_mask=life_mask)
    actual = run(lambda *x: ops.rollout(*x, 2, life_mask=life_mask, precision="bf16"), *problem)
    exact = run(reference_rollout(2, life_mask), *problem, dtype=torch.float64)
    monkeypatch.setattr(reference, "F", RoundedF)
    judge = run(reference_rollout(2, life_mask), *problem, dtype=torch.float64)
    for name, expected in judge.items():
        error, rounding = ((x[name] - expected).norm() / expected.norm() for x in (actual, exact))
        # A float32 sum that falls on the other side of a rounding border than its float64 twin moves by a bf16 unit.
        assert error < 0.25 * rounding, f"{name}: error {error:.2e}, of the rounding itself {rounding:.2e}"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bf16_does_not_depend_on_threads_or_checkpoints(bf16, num_threads, threads):
    problem = make_problem(((33, 70), (50, 41)), num_steps=1, n=2)
    num_threads(1)
    alone = run(lambda *x: ops.rollout(*x, 4, precision="bf16"), *problem)
    num_threads(threads)
    team = run(lambda *x: ops.rollout(*x, 4, checkpoint_every=3, precision="bf16"), *problem)
    for name in alone:
        assert torch.equal(team[name], alone[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bf16_spreads_special_values_as_the_reference(bf16, value):
    generator = torch.Generator().manual_seed(4)
    weights = make_weights(generator)
    grids = [make_grid(generator, 1, *size) for size in ((9, 12), (6, 70))]
    for grid in grids:
        grid[0, 7, 4, 5] = value
    with torch.no_grad():
        fused = ops.rollout(*grids, weights, 1, precision="bf16")
        expected = reference_rollout(1)(*grids, weights)
    for actual, target in zip(fused, expected):
        assert torch.equal(actual.isfinite(), target.isfinite())


def test_bf16_learns_as_fp32_does(bf16):
    losses = {}
    for precision in ("fp32", "bf16"):
        generator = torch.Generator().manual_seed(5)
        weights = [w.requires_grad_() for w in make_weights(generator)]
        with torch.no_grad():
            weights[4] *= 0.1
        grids = [make_grid(generator, 1, *size) for size in ((12, 16), (20, 16))]
        targets = [torch.randn(grid[:, 0].shape, generator=generator) * 0.1 for grid in grids]
        optimizer = torch.optim.Adam(weights, lr=2e-3)
        for _ in range(60):
            optimizer.zero_grad()
            outputs = ops.rollout(*grids, weights, 8, precision=precision)
            loss = sum((x[:, 0] - y).abs().mean() for x, y in zip(outputs, targets))
            loss.backward()
            optimizer.step()
            losses.setdefault(precision, []).append(loss.item())
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert abs(losses["bf16"][-1] / losses["fp32"][-1] - 1) < 0.05


def test_bf16_is_refused_without_its_instructions(capability):
    reason = _cpu.why_not(torch.device("cpu"), torch.float32, 16, "bf16")
    if capability.endswith("bf16"):
        assert reason is None
        return
    assert reason == f"precision='bf16' needs the instruction set avx512_bf16 or amx_bf16, and {capability} is in use"
    grids = [torch.zeros(1, 16, 2, 2)] * 2
    weights = [torch.zeros(shape) for shape in ops._WEIGHT_SHAPES]
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: precision='bf16' needs"):
        ops.rollout(*grids, weights, 1, precision="bf16")
    with pytest.raises(ValueError, match="have no bf16 products"):
        _cpu._C.peak_flops(1, True)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no kernels named 'mmx'"):
        _cpu._C.set_capability("mmx")


def test_why_not_says_why():
    reason = _cpu.why_not(torch.device("cpu"), torch.float64, 16, "fp32")
    assert reason == "it computes in float32, not in float64"
    assert "16 channels" in _cpu.why_not(torch.device("cpu"), torch.float32, 8, "fp32")
    assert "tf32" in _cpu.why_not(torch.device("cpu"), torch.float32, 16, "tf32")
    assert "cuda" in _cpu.why_not(torch.device("cuda"), torch.float32, 16, "fp32")
    assert _cpu.why_not(torch.device("cpu"), torch.float32, 16, "fp32") is None

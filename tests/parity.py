"""How the tests judge a rollout: random problems, the float64 reference, and how far from it float32 may be."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastnca.automaton import backends, cpu, ops, reference
from fastnca.automaton.rule import ALPHA, CHANNELS, CONTEXT_NAMES, HIDDEN1, WEIGHT_NAMES, weight_shapes

INPUTS = ("mel", "linear", *WEIGHT_NAMES)
RESULTS = ("final_mel", "final_linear", *INPUTS)  # the final grids and the gradients of the inputs


@dataclass(frozen=True, eq=False)
class Problem:
    """Both initial grids, the weights, the gradients of both final grids, and the tables of context, if the rule has
    one; all are lists of float32 tensors."""

    grids: list
    weights: list
    grads: list
    context: list = field(default_factory=list)

    def __iter__(self):
        return iter((self.grids, self.weights, self.grads))


def make_problem(sizes, n=1, seed=0, alpha_levels=None, resting=False, context_batch=0):
    """A random Problem of two grids [n, 16, height, width] with those ``sizes``.

    alpha_levels: all that alpha may be, so that windows have ties and gates are at their edges; else 0 to 1.
    resting: weights that leave alpha exactly as it is, whatever the rounding, and give every parameter a gradient.
    context_batch: of the tables of context, n or 1; without it there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for shape in weight_shapes():
        fan_in = shape[1] if len(shape) == 4 else 25
        weights.append(torch.randn(shape, generator=generator) * (0.3 if resting else 1.0) * fan_in**-0.5)
    if resting:
        weights[4][ALPHA] = 0
        weights[5][ALPHA] = 0
    grids = []
    for size in sizes:
        grid = torch.randn(n, CHANNELS, *size, generator=generator)
        alpha = torch.rand(n, *size, generator=generator)
        if alpha_levels is not None:
            alpha = torch.tensor(alpha_levels)[(alpha * len(alpha_levels)).long()]
        grid[:, ALPHA] = alpha
        grids.append(grid)
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    context = []
    if context_batch:
        lengths = *(height for height, _ in sizes), sizes[0][1]
        context = [torch.randn(context_batch, HIDDEN1, length, generator=generator) * 0.5 for length in lengths]
    return Problem(grids, weights, grads, context)


@lru_cache(maxsize=64)
def smooth_problem(sizes, num_steps, life_mask=True, n=1, growth=False, **options):
    """Of ten seeds the Problem whose rollout keeps farthest from kinks: float32 and float64 must agree tightly.

    ``options`` as of :func:`make_problem`.
    """
    problems = [make_problem(sizes, n, seed, **options) for seed in range(10)]
    problems = [
        p for p in problems if all((grid[:, ALPHA] > 0).flatten(1).any(dim=1).all() for grid in p.grids)
    ]  # with life
    with threads(1):
        distances = [distance_from_kinks(problem, num_steps, life_mask, growth) for problem in problems]
    distance = max(distances)
    assert distance > 4e-7 * num_steps, "no seed keeps away from kinks"
    return problems[distances.index(distance)]


def distance_from_kinks(problem, num_steps, life_mask=True, growth=False):
    """How far float64 stays from the points where rounding decides a gradient: of relu, clamp and pooling.

    What is exactly there, as resting weights hold it, no rounding moves.
    """
    nearest = torch.tensor(torch.inf)

    def see(distance):
        nonlocal nearest
        nearest = torch.minimum(nearest, distance.abs().where(distance.isfinite() & (distance != 0), torch.inf).min())

    weights = w1, b1, w2, b2, w3, b3 = [weight.double() for weight in problem.weights]
    for s, context in zip(problem.grids, contexts_of_grids([table.double() for table in problem.context])):
        s = s.double()
        for _ in range(num_steps):
            h1 = F.conv2d(reference.perceive(s), w1, b1)
            if context is not None:
                rows, columns = context
                h1 = h1 + rows[:, :, :, None] + columns[:, :, None, :]
            h2 = F.conv2d(F.relu(h1), w2, b2)
            ds = F.conv2d(F.relu(h2), w3, b3)
            if growth:
                changing = reference.alive(s)
                h1, h2, ds = (x.where(changing, 0.0) for x in (h1, h2, ds))
            alpha = (s + ds)[:, ALPHA : ALPHA + 1]
            see(h1)
            see(h2)
            if life_mask:
                see(alpha)
                see(alpha - 1)
                windows = F.unfold(F.pad(alpha.clamp(0, 1), (1, 1, 1, 1), value=-1.0), 3).topk(2, dim=1).values
                see(windows[:, 0] - windows[:, 1])
            s = reference.step(s, weights, life_mask, context, growth)
    return nearest.item()


def contexts_of_grids(tables):
    """Of the tables (mel_rows, linear_rows, columns), or of none: what the reference takes for each of both grids."""
    if not tables:
        return None, None
    *rows, columns = tables
    return tuple((row, columns) for row in rows)


def reference_rollout(num_steps, life_mask=True, growth=False):
    def rollout(mel, linear, weights, context=None):
        return [
            reference.rollout(grid, weights, num_steps, life_mask, of_grid, growth)
            for grid, of_grid in zip((mel, linear), contexts_of_grids(context))
        ]

    return rollout


@contextmanager
def threads(number):
    """PyTorch, and the CPU kernels with it, with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(rollout, problem, dtype=torch.float32):
    """The RESULTS of ``rollout(mel, linear, weights)``, or ``rollout(mel, linear, weights, context)``, and its backward
    pass, by name; with context also the gradients of its tables."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (*problem.grids, *problem.weights, *problem.context)]
    mel, linear, *weights = leaves[: len(INPUTS)]
    context = leaves[len(INPUTS) :]
    outputs = rollout(mel, linear, weights, *([context] if context else []))
    gradients = torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in problem.grads])
    names = RESULTS + CONTEXT_NAMES[: len(context)]
    return dict(zip(names, (*(x.detach() for x in outputs), *gradients), strict=True))


def assert_same_bits(actual, expected):
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_spreads_alike(actual, expected, of_the_largest=False):
    """NaN and infinite where the reference is, and within 1e-4 elsewhere, or within 1e-5 of the largest value."""
    for name, target in expected.items():
        tolerance = 1e-4
        if of_the_largest:
            tolerance = 1e-5 + 1e-5 * target.where(target.isfinite(), 0.0).abs().max().item()
        torch.testing.assert_close(
            actual[name], target, rtol=1e-4, atol=tolerance, equal_nan=True, msg=f"{name}: {{}}".format
        )


def flipped_cells(grid, judge):
    """The share of cells that took another path than the judge's: where one of them lives, say, and the other not."""
    return ((grid - judge).abs().amax(dim=1) > 1e-3).double().mean().item()


# ---- the judge


class Products(TorchFunctionMode):
    """Within it ``product(x, weight, bias)`` takes the place of the reference's 1x1 convolutions."""

    def __init__(self, product):
        self.product = product

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and not kwargs:
            return self.product(*args)
        return function(*args, **(kwargs or {}))


def product_gradients(grad, x, weight):
    """Of a 1x1 convolution of x: the gradients of x, weight and bias."""
    grad_x = torch.einsum("nohw,oi->nihw", grad, weight[..., 0, 0])
    return grad_x, torch.einsum("nohw,nihw->oi", grad, x)[..., None, None], grad.sum((0, 2, 3))


class MeasuredProduct(torch.autograd.Function):
    """A 1x1 convolution that notes what the gradients of its parameters sum up: the magnitudes of the terms."""

    @staticmethod
    def forward(ctx, x, weight, bias, magnitudes):
        ctx.save_for_backward(x, weight)
        ctx.magnitudes = magnitudes
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        layer = [shape[0] for shape in weight_shapes()[::2]].index(weight.shape[0]) + 1
        _, *sums = product_gradients(grad.abs(), x.abs(), weight)
        for name, terms in zip((f"w{layer}", f"b{layer}"), sums):
            ctx.magnitudes[name] = ctx.magnitudes.get(name, 0.0) + terms
        return *product_gradients(grad, x, weight), None


class RoundedProduct(torch.autograd.Function):
    """A 1x1 convolution whose three products, value and both gradients, take operands rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = x.bfloat16().to(x.dtype), weight.bfloat16().to(weight.dtype)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return product_gradients(grad.bfloat16().to(grad.dtype), *ctx.saved_tensors)


@lru_cache(maxsize=64)
def _judgment(problem, num_steps, life_mask, growth):
    """By name: the float64 reference's results, float32 PyTorch's, and the largest sum of |terms| that make up a
    parameter's gradient."""
    magnitudes = {}
    with threads(1), Products(lambda x, weight, bias: MeasuredProduct.apply(x, weight, bias, magnitudes)):
        judge = run(reference_rollout(num_steps, life_mask, growth), problem, torch.float64)
    with threads(1):
        eager = [run(reference_rollout(num_steps, life_mask, growth), problem)]
        with torch.backends.mkldnn.flags(enabled=False):  # its products are summed in another order
            eager.append(run(reference_rollout(num_steps, life_mask, growth), problem))
    return judge, eager, {name: terms.max() for name, terms in magnitudes.items()}


def assert_errs_as_float32(actual, problem, num_steps, life_mask=True, slack=1e-6, growth=False):
    """Float32 PyTorch's error is that of the worse of its two ways to sum a product: which of them it takes, and how
    lucky it is, differs from processor to processor. The error's norm is within twice that, and ``slack`` of the
    result's norm; the largest error is within three times that. To both a few units of rounding are added: units of the
    largest value or, for a parameter's gradient, a sum over all cells that may cancel, of its terms. (Where they cancel
    PyTorch's sums in pairs are luckier: bias gradients were seen at five times its error. Without rounding before the
    sum, one over n cells is bound by n units, and one over blocks of 48 by 48 + n / 48.)"""
    judge, eager, magnitudes = _judgment(problem, num_steps, life_mask, growth)
    for name, expected in judge.items():
        units = 8 * 2**-24 * magnitudes.get(name, expected.abs().max())
        error, *eager_errors = ((x[name] - expected).abs().max() for x in (actual, *eager))
        allowed = 3 * max(eager_errors) + units
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, float32 PyTorch {eager_errors}"
        error, *eager_errors = ((x[name] - expected).norm() for x in (actual, *eager))
        allowed = 2 * max(eager_errors) + slack * expected.norm() + (units if name in magnitudes else 0.0)
        assert error <= allowed, f"{name}: norm of the error {error:.2e}, allowed {allowed:.2e}, {eager_errors}"


def assert_rounds_operands_alone(actual, problem, num_steps, life_mask=True, bias_bound=0.25, growth=False):
    """The error of bf16 products is that of rounding their operands to bf16, and nothing else. The judge rounds what
    the gradient of a bias sums up and not what that of the context does; a backend may do either for both."""
    exact = run(reference_rollout(num_steps, life_mask, growth), problem, torch.float64)
    with Products(RoundedProduct.apply):
        judge = run(reference_rollout(num_steps, life_mask, growth), problem, torch.float64)
    for name, expected in judge.items():
        if not expected.any():  # nothing lives
            assert not actual[name].any(), name
            continue
        error, rounding = ((x[name] - expected).norm() / expected.norm() for x in (actual, exact))
        # A float32 sum that falls on the other side of a rounding border than its float64 twin moves by a bf16 unit.
        bound = bias_bound if name.startswith("b") or name in CONTEXT_NAMES else 0.25
        assert error < bound * rounding, f"{name}: error {error:.2e}, of the rounding itself {rounding:.2e}"


# ---- the backends under test

if backends.why_not("cpu"):
    CAPABILITIES = []  # fastnca was installed without its extension
else:
    from fastnca import _C

    CAPABILITIES = _C.capabilities()


@contextmanager
def cpu_kernels(capability, number):
    """The CPU kernels in that instruction set, one of CAPABILITIES, and with so many threads."""
    before = cpu.capability()
    _C.set_capability(capability)
    try:
        with threads(number):
            yield
    finally:
        _C.set_capability(before)


@dataclass(frozen=True)
class Backend:
    """A backend of the rollout, and where its tensors are."""

    name: str
    device: str = "cpu"

    def rollout(self, num_steps, **options):
        """The rollout under test; its inputs and outputs are on the CPU."""

        def rollout(mel, linear, weights, context=None):
            mel, linear, *weights = (x.to(self.device) for x in (mel, linear, *weights))
            tables = None if context is None else [table.to(self.device) for table in context]
            final = ops.rollout(mel, linear, weights, num_steps, context=tables, backend=self.name, **options)
            return [x.cpu() for x in final]

        return rollout

    def inputs(self, problem, requires_grad=True):
        """(mel, linear, weights) of the problem, where the backend wants them."""
        mel, linear, *weights = (
            x.to(self.device).detach().requires_grad_(requires_grad) for x in (*problem.grids, *problem.weights)
        )
        return mel, linear, weights

"""What every fused backend promises, judged by the float64 reference: each instruction set of the processor with one
thread and with two, and the Triton kernels, on a GPU where there is one and else interpreted."""

from contextlib import nullcontext
from dataclasses import replace

import interpreter
import parity
import pytest
import torch
from torch.autograd import forward_ad

import fastnca
import fastnca.context
from fastnca.automaton import backends, ops, triton
from fastnca.automaton.rule import ALPHA, CONTEXT_NAMES, HIDDEN1

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [("cpu", capability, threads) for capability in parity.CAPABILITIES for threads in (1, 2)]
KERNELS += [("triton", None, 1)] if triton.INSTALLED else []


BF16_KERNELS = [kernels for kernels in KERNELS if kernels[0] == "triton" or "bf16" in str(kernels[1])]


def kernels_id(kernels):
    return "-".join(str(part) for part in kernels if part)


@pytest.fixture(params=KERNELS, ids=kernels_id)
def backend(request, monkeypatch, num_threads):
    """A parity.Backend."""
    name, capability, threads = request.param
    if name == "triton":
        num_threads(1)
        interpreter.set_shapes(monkeypatch)
        interpreter.patch_once(monkeypatch)
    with parity.cpu_kernels(capability, threads) if capability else nullcontext():
        yield parity.Backend(name, TRITON_DEVICE if name == "triton" else "cpu")


def gradients(inputs, outputs, grads=None):
    mel, linear, weights = inputs
    grads = [torch.ones_like(x) for x in outputs] if grads is None else grads
    return torch.autograd.grad(outputs, [mel, linear, *weights], grads)


def assert_equal(actual, expected):
    for mine, target in zip(actual, expected, strict=True):
        assert torch.equal(mine, target)


# ---- the accuracy of states and gradients

life_masks = pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])


@life_masks
@pytest.mark.parametrize("sizes", [((1, 1), (17, 18)), ((1, 20), (33, 2))], ids=str)
def test_two_steps_and_every_gradient(backend, sizes, life_mask):
    problem = parity.smooth_problem(sizes, 2, life_mask)
    actual = parity.run(backend.rollout(2, life_mask=life_mask), problem)
    parity.assert_errs_as_float32(actual, problem, 2, life_mask)


def test_all_the_bands_of_both_grids(backend, monkeypatch):
    if backend.name == "triton":
        interpreter.set_shapes(monkeypatch, tile=(128, 2))
    problem = parity.smooth_problem(((80, 2), (513, 1)), 1)
    parity.assert_errs_as_float32(parity.run(backend.rollout(1), problem), problem, 1)


def test_a_batch(backend):
    problem = parity.smooth_problem(((6, 17), (9, 3)), 1, n=2)
    parity.assert_errs_as_float32(parity.run(backend.rollout(1), problem), problem, 1)


@life_masks
def test_checkpoints_do_not_change_a_bit(backend, life_mask):
    problem = parity.make_problem(((4, 9), (3, 5)))
    full = parity.run(backend.rollout(3, life_mask=life_mask), problem)
    for checkpoint_every in (2, 7):
        rollout = backend.rollout(3, life_mask=life_mask, checkpoint_every=checkpoint_every)
        parity.assert_same_bits(parity.run(rollout, problem), full)


@pytest.mark.parametrize("levels", [(1.0,), (0.0,), (0.0, 1.0), (0.25, 0.5)], ids=str)
def test_ties_send_the_gradient_to_the_first_maximum(backend, levels):
    sizes, n = (((7, 17), (10, 5)), 1) if backend.name == "triton" else (((11, 20), (30, 35)), 2)
    problem = parity.make_problem(sizes, n, seed=1, alpha_levels=levels, resting=True)
    parity.assert_errs_as_float32(parity.run(backend.rollout(1), problem), problem, 1)


def test_the_clamp_passes_the_gradient_at_both_ends(backend):
    levels = (-0.5, 0.0, 0.25, 1.0, 1.5)
    sizes = ((9, 11), (5, 16)) if backend.name == "triton" else ((20, 21), (5, 80))
    problem = parity.make_problem(sizes, seed=2, alpha_levels=levels, resting=True)
    actual = parity.run(backend.rollout(1), problem)
    parity.assert_errs_as_float32(actual, problem, 1)
    # Outside [0, 1] only the perception passes a gradient to alpha: closing the gate must show.
    expected = parity.run(parity.reference_rollout(1), problem)
    for name, grid in zip(("mel", "linear"), problem.grids):
        outside = (grid[:, 1] < 0) | (grid[:, 1] > 1)
        mine, target = (results[name][:, 1][outside] for results in (actual, expected))
        torch.testing.assert_close(mine, target, rtol=1e-4, atol=1e-5)


def test_long_rollout_flips_no_more_cells_than_float32(backend):
    """Life amplifies rounding: over many steps some cells take another path. As few as with float32 PyTorch."""
    sizes, steps = (((8, 16), (16, 14)), 24) if backend.name == "triton" else (((20, 24), (40, 24)), 96)
    grids, weights, _ = parity.make_problem(sizes, seed=3)
    weights = [*weights[:4], weights[4] * 0.02, weights[5] * 0.05]
    with torch.no_grad(), parity.threads(1):
        judge = parity.reference_rollout(steps)(*(x.double() for x in grids), [x.double() for x in weights])
        eager = parity.reference_rollout(steps)(*grids, weights)
    with torch.no_grad():
        actual = backend.rollout(steps)(*grids, weights)
    assert max(x.abs().max() for x in judge) > 0.1, "the automaton died: nothing is compared"
    for ours, float32, expected in zip(actual, eager, judge):
        assert parity.flipped_cells(ours, expected) <= 2 * parity.flipped_cells(float32, expected) + 0.01


numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's NaN


@numpy_may_warn
@pytest.mark.parametrize("channel", [0, 1, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40], ids=str)
def test_special_values_spread_as_in_the_reference(backend, value, channel):
    problem = parity.make_problem(((9, 12), (6, 8)) if backend.name == "triton" else ((9, 12), (6, 70)), seed=4)
    for grid in problem.grids:
        grid[0, channel, 4, 5] = value
    with torch.no_grad():
        actual, expected = (
            dict(zip(parity.RESULTS, rollout(*problem.grids, problem.weights)))
            for rollout in (backend.rollout(2), parity.reference_rollout(2))
        )
    parity.assert_spreads_alike(actual, expected)


@numpy_may_warn
def test_an_infinity_meets_the_zeros_of_the_filters(backend):
    """Zero times infinity is NaN. With positive weights nothing else could make one."""
    grids, weights, _ = ([x.abs() for x in part] for part in parity.make_problem(((9, 12), (6, 8)), seed=6))
    for grid in grids:
        grid[0, 7, 4, 5] = float("inf")
    with torch.no_grad():
        actual = backend.rollout(1, life_mask=False)(*grids, weights)
        expected = parity.reference_rollout(1, life_mask=False)(*grids, weights)
    for mine, target in zip(actual, expected):
        assert target.isnan().any() and torch.equal(mine.isnan(), target.isnan())
        assert torch.equal(mine.isinf(), target.isinf())


@numpy_may_warn
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40], ids=str)
def test_special_gradients_spread_as_in_the_reference(backend, value):
    problem = parity.make_problem(((5, 9), (3, 8)))
    assert parity.distance_from_kinks(problem, 1) > 4e-7
    for grad in problem.grads:
        grad[0, 3, 2, 5] = value
    actual, expected = (parity.run(rollout, problem) for rollout in (backend.rollout(1), parity.reference_rollout(1)))
    parity.assert_spreads_alike(actual, expected)


@pytest.mark.parametrize("backend", BF16_KERNELS, ids=kernels_id, indirect=True)
@life_masks
def test_bf16_rounds_operands_and_nothing_else(backend, life_mask):
    problem = parity.smooth_problem(((5, 3), (7, 9)) if backend.name == "triton" else ((5, 3), (7, 19)), 2, life_mask)
    actual = parity.run(backend.rollout(2, life_mask=life_mask, precision="bf16"), problem)
    # The judge rounds a bias's gradient too, where the Triton kernels add up what has not been rounded.
    bias_bound = 1.0 if backend.name == "triton" else 0.25
    parity.assert_rounds_operands_alone(actual, problem, 2, life_mask, bias_bound)


# ---- context and growth

SPARSE = (0.0,) * 12 + (0.6,)  # levels of alpha with which some cells have no life around them
RULES = {
    "context": {"context_batch": 1},
    "growth": {"growth": True, "alpha_levels": SPARSE},
    "both": {"context_batch": 1, "growth": True, "alpha_levels": SPARSE},
    "unmasked": {"context_batch": 1, "life_mask": False},
}


@pytest.fixture
def rule(request):
    """(options of parity.make_problem, options of the rollout)."""
    options = dict(RULES[request.param])
    rollout = {name: options.pop(name) for name in ("growth", "life_mask") if name in options}
    return options, rollout


def by_every_rule(kernels):
    """Runs a test with these kernels and each rule; with Triton's, whose interpreter is slow, by both at once.
    test_triton.py has the others, with smaller problems."""
    pairs = [(k, rule) for k in kernels for rule in RULES if k[0] != "triton" or rule == "both"]
    ids = ["-".join((kernels_id(k), rule)) for k, rule in pairs]
    return pytest.mark.parametrize(("backend", "rule"), pairs, ids=ids, indirect=True)


@by_every_rule(KERNELS)
@pytest.mark.parametrize("sizes", [((1, 6), (3, 6)), ((8, 19), (17, 19))], ids=str)
def test_two_steps_and_every_gradient_with_context_and_growth(backend, rule, sizes):
    options, rollout = rule
    problem = parity.smooth_problem(sizes, 2, **options, **rollout)
    actual = parity.run(backend.rollout(2, **rollout), problem)
    parity.assert_errs_as_float32(actual, problem, 2, **rollout)


@pytest.mark.parametrize("context_batch", [1, 2])
def test_a_batch_with_context(backend, context_batch):
    options = {"n": 2, "growth": True}
    problem = parity.smooth_problem(((6, 9), (9, 9)), 1, context_batch=context_batch, alpha_levels=SPARSE, **options)
    actual = parity.run(backend.rollout(1, growth=True), problem)
    assert [actual[name].shape[0] for name in CONTEXT_NAMES] == [context_batch] * 3
    parity.assert_errs_as_float32(actual, problem, 1, growth=True)


@by_every_rule(BF16_KERNELS)
def test_bf16_rounds_operands_with_context_and_growth(backend, rule):
    options, rollout = rule
    problem = parity.smooth_problem(((5, 9), (7, 9)), 1, **options, **rollout)
    actual = parity.run(backend.rollout(1, precision="bf16", **rollout), problem)
    bias_bound = 1.25 if backend.name == "triton" else 0.25  # Triton rounds no terms of b3: its error is the rounding
    parity.assert_rounds_operands_alone(actual, problem, 1, bias_bound=bias_bound, **rollout)


@by_every_rule(KERNELS)
def test_checkpoints_do_not_change_a_bit_with_context_and_growth(backend, rule):
    options, rollout = rule
    problem = parity.make_problem(((4, 3), (3, 3)) if backend.name == "triton" else ((4, 9), (3, 9)), n=2, **options)
    full = parity.run(backend.rollout(3, **rollout), problem)
    for checkpoint_every in (2,) if backend.name == "triton" else (2, 7):
        replayed = parity.run(backend.rollout(3, checkpoint_every=checkpoint_every, **rollout), problem)
        parity.assert_same_bits(replayed, full)


@pytest.mark.parametrize("growth", [False, True], ids=["everywhere", "growth"])
def test_context_of_zeros_is_none(backend, growth):
    problem = parity.make_problem(((6, 9), (4, 9)), seed=5, alpha_levels=SPARSE)
    zeros = [torch.zeros(1, HIDDEN1, length) for length in (6, 4, 9)]
    told = parity.run(backend.rollout(2, growth=growth), replace(problem, context=zeros))
    for name, expected in parity.run(backend.rollout(2, growth=growth), problem).items():
        torch.testing.assert_close(told[name], expected, rtol=1e-4, atol=1e-5, msg=f"{name}: {{}}".format)


def test_life_spreads_by_one_cell_a_step(backend):
    """From one live cell; what is farther away is to the bit what it was."""
    problem = parity.make_problem(((9, 13), (6, 13)), seed=7, context_batch=1)
    problem.weights[5][ALPHA] = 30.0
    seeds = [torch.zeros_like(grid) for grid in problem.grids]
    for seed in seeds:
        seed[:, ALPHA, 4, 6] = 1.0
    for steps in (1, 3):
        with torch.no_grad():
            grown = backend.rollout(steps, growth=True)(*seeds, problem.weights, problem.context)
        for seed, grid in zip(seeds, grown):
            reached = torch.zeros(seed.shape[2:], dtype=torch.bool)
            reached[4 - steps : 5 + steps, 6 - steps : 7 + steps] = True
            assert (grid[0, ALPHA][reached] == 1).all()
            assert torch.equal(grid[..., ~reached], seed[..., ~reached])


def test_without_life_nothing_grows(backend):
    problem = parity.make_problem(((5, 9), (4, 9)), seed=8, context_batch=1)
    empty = replace(problem, grids=[torch.zeros_like(grid) for grid in problem.grids])
    for name, value in parity.run(backend.rollout(3, growth=True), empty).items():
        assert not value.any(), name


@pytest.mark.parametrize("save_every", [0, 1])
def test_opcheck_with_context_and_growth(backend, save_every):
    problem = parity.make_problem(((2, 3), (3, 3)), context_batch=1, alpha_levels=SPARSE)
    inputs = backend.inputs(problem, requires_grad=save_every > 0)
    context = [table.to(backend.device).requires_grad_(save_every > 0) for table in problem.context]
    torch.library.opcheck(ops.rollout_op, (*inputs, context, 1, save_every, True, True, "fp32", backend.name))


def test_opcheck_backward_with_context_and_growth(backend):
    problem = parity.make_problem(((2, 3), (3, 3)), context_batch=1, alpha_levels=SPARSE)
    mel, linear, weights = backend.inputs(problem, requires_grad=False)
    rule = [table.to(backend.device) for table in problem.context], 1, 1, True, True, "fp32", backend.name
    states = ops.rollout_op(mel, linear, weights, *rule)[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, linear, states, weights, *rule))


def test_a_model_with_context_compiles_to_one_graph(backend):
    torch.manual_seed(0)
    places = fastnca.context.Places(2, 2)
    model = fastnca.DualSpecTNCA(n_mels=5, n_linear=4, backend=backend.name, context=places, growth=True)
    model.to(backend.device)
    torch.nn.init.normal_(model.update_mlp[-1].weight, std=0.1)
    grids = model.seed(9)
    results = []
    for rollout in (model.rollout, torch.compile(model.rollout, fullgraph=True, backend="aot_eager")):
        outputs = rollout(*grids, num_steps=2)
        results.append(torch.autograd.grad([x.square().sum() for x in outputs], list(model.parameters())))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


# ---- the operators as torch sees them


@pytest.mark.parametrize("save_every", [0, 1])
def test_opcheck(backend, save_every):
    inputs = backend.inputs(parity.make_problem(((2, 3), (3, 2))), requires_grad=save_every > 0)
    torch.library.opcheck(ops.rollout_op, (*inputs, [], 1, save_every, True, False, "fp32", backend.name))


def test_opcheck_backward(backend):
    mel, linear, weights = backend.inputs(parity.make_problem(((2, 3), (3, 2))), requires_grad=False)
    rule = [], 1, 1, True, False, "fp32", backend.name
    states = ops.rollout_op(mel, linear, weights, *rule)[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, linear, states, weights, *rule))


def test_compiles_to_one_graph(backend):
    mel, linear, weights = inputs = backend.inputs(parity.make_problem(((5, 9), (4, 9))))
    model = fastnca.DualSpecTNCA(n_mels=5, n_linear=4, backend=backend.name).to(backend.device)
    model.load_state_dict(dict(zip(model.state_dict(), weights)))
    expected = gradients(inputs, ops.rollout(*inputs, 2, backend=backend.name))
    compiled = torch.compile(model.rollout, fullgraph=True, backend="aot_eager")
    actual = gradients((mel, linear, model.parameters()), compiled(mel, linear, num_steps=2))
    assert_equal(actual, expected)


def every_second(x):
    wide = x.new_full([2 * size for size in x.shape], float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x):
    """For weights, too: a vector is its own transpose."""
    return x if x.dim() < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(x):
    """Not aligned to anything but a float."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_layouts_do_not_change_a_bit(backend):
    problem = parity.make_problem(((5, 9), (4, 7)))
    expected = parity.run(backend.rollout(1), problem)
    layouts = [every_second, transposed, shifted]
    for first, second, third in (layouts, layouts[1:] + layouts[:1], layouts[2:] + layouts[:2]):
        (mel, linear), weights, (grad_mel, grad_linear) = problem
        laid_out = parity.Problem(
            [first(mel), second(linear)], [third(x) for x in weights], [second(grad_mel), third(grad_linear)]
        )
        parity.assert_same_bits(parity.run(backend.rollout(1), laid_out), expected)


def test_expanded_grids_and_gradients_do_not_change_a_bit(backend):
    grids, weights, grads = parity.make_problem(((5, 9), (4, 7)), n=2)
    expanded = parity.Problem(
        [x[:1].expand_as(x) for x in grids], weights, [torch.ones(()).expand_as(x) for x in grads]
    )
    whole = parity.Problem(*([x.clone() for x in part] for part in expanded))
    parity.assert_same_bits(parity.run(backend.rollout(1), expanded), parity.run(backend.rollout(1), whole))


def test_a_missing_gradient_is_zero(backend):
    inputs = backend.inputs(parity.make_problem(((5, 9), (4, 7))))
    grads = [torch.ones_like(inputs[0]), torch.zeros_like(inputs[1])]
    expected = gradients(inputs, ops.rollout(*inputs, 1, backend=backend.name), grads)
    actual = gradients(inputs, [ops.rollout(*inputs, 1, backend=backend.name)[0].sum()])
    assert_equal(actual, expected)


def test_only_what_asks_for_a_gradient_gets_one(backend):
    mel, linear, weights = backend.inputs(parity.make_problem(((5, 9), (4, 7))), requires_grad=False)
    weights[3].requires_grad_()
    sum(x.sum() for x in ops.rollout(mel, linear, weights, 1, backend=backend.name)).backward()
    assert weights[3].grad.abs().max() > 0
    assert all(x.grad is None for x in (mel, linear, *weights[:3], *weights[4:]))


def test_no_steps_return_copies(backend):
    inputs = backend.inputs(parity.make_problem(((5, 9), (4, 7))))
    outputs = ops.rollout(*inputs, 0, backend=backend.name)
    for before, after in zip(inputs, outputs):
        assert torch.equal(before, after) and before.data_ptr() != after.data_ptr()
    assert torch.equal(torch.autograd.grad(outputs[0].sum(), inputs[0])[0], torch.ones_like(inputs[0]))


def test_states_are_saved_only_for_a_gradient(backend):
    problem = parity.make_problem(((2, 3), (3, 2)))
    inputs = backend.inputs(problem)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        with torch.no_grad():
            ops.rollout(*inputs, 1, backend=backend.name)
        ops.rollout(*backend.inputs(problem, requires_grad=False), 1, backend=backend.name)
        assert saved == []
        ops.rollout(*inputs, 3, checkpoint_every=2, backend=backend.name)
    assert saved[0] == (3, backends.BACKENDS[backend.name].state_floats(*inputs[:2], True))
    if backend.name == "cpu":
        assert saved[0] == (3, 16 * 12)  # the values of 12 cells


def test_unsaved_states_are_reported(backend):
    inputs = backend.inputs(parity.make_problem(((2, 3), (3, 2))))
    outputs = ops.rollout_op(*inputs, [], 1, 0, True, False, "fp32", backend.name)
    with pytest.raises(RuntimeError, match="saved no states"):
        outputs[0].sum().backward()


# ---- the door


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b, w: (a[:, :8], b, w, 1), ValueError, r"mel must have shape \[N, 16, H, W\].*got \[2, 8, 7, 9\]"),
        (lambda a, b, w: (a, b[:, :, :0], w, 1), ValueError, "linear must have shape .* without an empty axis"),
        (lambda a, b, w: (a[:1], b, w, 1), ValueError, "same batch size, got 1 and 2"),
        (lambda a, b, w: (a, b, w[:5], 1), ValueError, r"weights must be \(w1, b1, .*got 5 tensors"),
        (lambda a, b, w: (a, b, [w[0][:, :9], *w[1:]], 1), ValueError, r"w1 must have shape \[128, 64, 1, 1\]"),
        (lambda a, b, w: (a, b.double(), w, 1), TypeError, "linear must have the weights' dtype torch.float32, got"),
        (lambda a, b, w: (a, b.to("meta"), w, 1), ValueError, "linear must be on the weights' device cpu, got meta"),
        (lambda a, b, w: (a.numpy(), b, w, 1), TypeError, "mel must be a torch.Tensor, got ndarray"),
        (lambda a, b, w: (a, b, w, -1), ValueError, "num_steps must be an integer of at least 0, got -1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["auto", *backends.BACKENDS])
def test_wrong_inputs_are_named(name, change, error, message):
    grids, weights, _ = parity.make_problem(((7, 9), (7, 9)), n=2)
    with pytest.raises(error, match=message):
        ops.rollout(*change(*grids, weights), backend=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, n, c: (m, n), ValueError, r"context must be \(mel_rows, linear_rows, columns\), got 2 tensors"),
        (lambda m, n, c: (m, n, c.numpy()), TypeError, "columns must be a torch.Tensor, got ndarray"),
        (lambda m, n, c: (n, m, c), ValueError, r"mel_rows must have shape \[2 or 1, 128, 7\], got \[2, 128, 5\]"),
        (lambda m, n, c: (m, n[0], c), ValueError, r"linear_rows must have shape \[2 or 1, 128, 5\], got \[128, 5\]"),
        (lambda m, n, c: (m, n, c[:, :64]), ValueError, r"columns must have shape .* got \[2, 64, 9\]"),
        (lambda m, n, c: (m, n, c.repeat(2, 1, 1)), ValueError, r"columns must have shape .* got \[4, 128, 9\]"),
        (lambda m, n, c: (m, n.double(), c), TypeError, "linear_rows must have the weights' dtype torch.float32, got"),
        (lambda m, n, c: (m, n, c.to("meta")), ValueError, "columns must be on the weights' device cpu, got meta"),
    ],
)
@pytest.mark.parametrize("name", ["auto", *backends.BACKENDS])
def test_wrong_context_is_named(name, change, error, message):
    problem = parity.make_problem(((7, 9), (5, 9)), n=2, context_batch=2)
    with pytest.raises(error, match=message):
        ops.rollout(*problem.grids, problem.weights, 1, context=change(*problem.context), backend=name)


def test_context_needs_one_width():
    problem = parity.make_problem(((7, 9), (5, 8)), context_batch=1)
    with pytest.raises(ValueError, match="with context mel and linear must have the same width, got 9 and 8"):
        ops.rollout(*problem.grids, problem.weights, 1, context=problem.context)


@pytest.mark.parametrize("name", ["auto", *backends.BACKENDS])
def test_growth_needs_the_life_mask(name):
    grids, weights, _ = parity.make_problem(((7, 9), (5, 8)))
    with pytest.raises(ValueError, match="growth needs the life mask"):
        ops.rollout(*grids, weights, 1, growth=True, life_mask=False, backend=name)


def test_an_unknown_precision_is_refused():
    grids, weights, _ = parity.make_problem(((7, 9), (7, 9)))
    with pytest.raises(ValueError, match="unknown precision 'fp8': expected one of fp32, tf32, bf16"):
        ops.rollout(*grids, weights, 1, precision="fp8")


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"dtype": torch.float64}, "it computes in float32, not in float64"),
        ({"num_channels": 8}, "16 channels, not for 8"),
    ],
)
def test_why_not_says_why(name, request_, words):
    if name == "reference":
        assert backends.why_not(name, **request_) is None
    else:
        assert words in backends.why_not(name, **request_)


# ---- what has no derivative says so


def loss_of(backend):
    grids, weights, _ = parity.make_problem(((3, 4), (4, 4)))
    grids, weights = ([x.to(backend.device) for x in tensors] for tensors in (grids, weights))
    return lambda mel: backend.rollout(2)(mel, grids[1], weights)[0].square().sum(), grids[0]


def test_a_second_derivative_is_refused(backend):
    loss, mel = loss_of(backend)
    mel.requires_grad_()
    (plain,) = torch.autograd.grad(loss(mel), mel)
    (gradient,) = torch.autograd.grad(loss(mel), mel, create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="differentiated once, not twice; backend='reference' can"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_derivative_is_refused(backend, grad):
    loss, mel = loss_of(backend)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(mel, torch.ones_like(mel))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative: .* backend='reference' has all"):
            loss(dual)
        assert torch.equal(loss(mel), loss(mel))  # another tensor's tangent does not matter


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda loss: lambda mel: torch.func.jvp(loss, (mel,), (mel,)),
        lambda loss: lambda mel: torch.func.vmap(loss)(mel[None]),
    ],
    ids=["grad", "jacrev", "jacfwd", "jvp", "vmap"],
)
def test_transforms_of_functions_are_refused(backend, transform):
    loss, mel = loss_of(backend)
    with pytest.raises(RuntimeError, match="torch.func does not reach into a fused rollout: .* backend='reference'"):
        transform(loss)(mel)

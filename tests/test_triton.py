"""The Triton kernels against the reference, with float64 as the judge: on a GPU where there is one, else interpreted.

The interpreter shows what the kernels compute and which memory they touch, and nothing about their speed. It takes some
milliseconds for a tile, so the grids are small here and, where nothing else is said, the tiles large.
"""

import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from test_cpu import (
    RoundedF,
    assert_close_to_float64,
    make_grid,
    make_problem,
    make_weights,
    reference_rollout,
    resting_weights,
    run,
)

import fastnca
from fastnca import _triton, backends, ops, reference

if not _triton.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")

# With tiles of 16 x 16 cells: ragged at every edge, several of them, and whole ones.
SIZES = [((1, 1), (1, 7)), ((5, 3), (7, 19)), ((16, 16), (17, 18)), ((33, 2), (1, 20))]
SIZE_IDS = ["-".join(f"{h}x{w}" for h, w in pair) for pair in SIZES]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    """Triton 3.9 patches its language anew for each call of a device function, which takes a third of the time: what it
    has done for the launch holds for our functions too."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        original = InterpretedFunction.__call__

        def call(function, *args, **kwargs):
            if function.fn.__module__ == "fastnca._triton_kernels":
                return function.rewrite()(*args, **kwargs)
            return original(function, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)


def set_shapes(monkeypatch, tile=(16, 16), programs=3, groups=2):
    """Larger tiles, which take the interpreter hardly more time than small ones, and several of them per program."""
    if DEVICE == "cpu":
        configuration = _triton.Configuration(_triton.Shape(tile, 4), _triton.Shape(tile, 8), programs, groups)
        monkeypatch.setattr(_triton, "configuration", lambda architecture, precision: configuration)
        monkeypatch.setattr(_triton, "COPY", _triton.Shape(tile, 4))


@pytest.fixture
def large_tiles(monkeypatch):
    set_shapes(monkeypatch)


def fused(num_steps, **options):
    """The rollout under test, for inputs on the CPU."""

    def rollout(mel, lin, weights):
        mel, lin, *weights = (x.to(DEVICE) for x in (mel, lin, *weights))
        return [x.cpu() for x in ops.rollout(mel, lin, weights, num_steps, backend="triton", **options)]

    return rollout


def check(problem, num_steps, life_mask=True, **options):
    assert_close_to_float64(fused(num_steps, life_mask=life_mask, **options), problem, num_steps, life_mask)


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_two_steps_and_every_gradient(large_tiles, sizes, life_mask):
    check(make_problem(sizes, num_steps=2, life_mask=life_mask), 2, life_mask)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_in_the_shapes_of_the_table(precision):
    """Interpreted, tf32 products are exact: both precisions' tiles, slices and programs, to the accuracy of float32."""
    if DEVICE != "cpu" and precision == "tf32":
        pytest.skip("tf32 rounds")
    check(make_problem(((3, 9), (9, 2)), num_steps=1), 1, precision=precision)


def test_all_the_bands_of_both_grids(monkeypatch):
    set_shapes(monkeypatch, tile=(128, 2))
    check(make_problem(((80, 2), (513, 1)), num_steps=1), 1)


def test_a_batch(large_tiles):
    check(make_problem(((6, 17), (9, 3)), num_steps=1, n=3), 1)


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("checkpoint_every", [2, 7])
def test_checkpoints_do_not_change_a_bit(large_tiles, checkpoint_every, life_mask):
    problem = make_problem(((4, 9), (3, 5)), num_steps=1)
    full = run(fused(3, life_mask=life_mask), *problem)
    replayed = run(fused(3, life_mask=life_mask, checkpoint_every=checkpoint_every), *problem)
    for name in full:
        assert torch.equal(replayed[name], full[name]), name


def test_the_number_of_programs_does_not_change_a_bit_of_the_states(monkeypatch):
    problem = make_problem(((9, 17), (18, 17)), num_steps=1)
    results = []
    for programs in (1, 100):
        set_shapes(monkeypatch, programs=programs)
        results.append(run(fused(2), *problem))
    for other in results[1:]:
        for name in other:
            assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("levels", [(1.0,), (0.0,), (0.0, 1.0), (0.25, 0.5)], ids=str)
def test_ties_send_the_gradient_to_the_first_maximum(large_tiles, levels):
    generator = torch.Generator().manual_seed(1)
    grids = [make_grid(generator, 2, *size) for size in ((7, 17), (10, 5))]
    for grid in grids:
        grid[:, 1] = torch.tensor(levels)[torch.randint(len(levels), grid[:, 1].shape, generator=generator)]
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    check((grids, resting_weights(generator), grads), 1)


def test_the_clamp_passes_the_gradient_at_both_ends(large_tiles):
    generator = torch.Generator().manual_seed(2)
    grids = [make_grid(generator, 1, *size) for size in ((9, 11), (5, 20))]
    levels = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5])
    for grid in grids:
        grid[:, 1] = levels[torch.randint(5, grid[:, 1].shape, generator=generator)]
    grads = [torch.randn(grid.shape, generator=generator) for grid in grids]
    problem = grids, resting_weights(generator), grads
    check(problem, 1)
    gradient = run(fused(1), *problem)["mel"][:, 1]
    outside = (grids[0][:, 1] < 0) | (grids[0][:, 1] > 1)
    expected = run(reference_rollout(1), *problem)["mel"][:, 1]
    torch.testing.assert_close(gradient[outside], expected[outside], rtol=1e-4, atol=1e-5)


def test_long_rollout_flips_no_more_cells_than_float32(large_tiles):
    generator = torch.Generator().manual_seed(3)
    weights = make_weights(generator)
    weights[4] *= 0.02
    weights[5] = torch.randn(16, generator=generator) * 0.01
    grids = [make_grid(generator, 1, *size) for size in ((8, 16), (16, 14))]

    def flipped(outputs, judge):
        return [((x - y).abs().amax(1) > 1e-3).double().mean().item() for x, y in zip(outputs, judge)]

    with torch.no_grad():
        judge = reference_rollout(96)(*(g.double() for g in grids), [w.double() for w in weights])
        eager = flipped(reference_rollout(96)(*grids, weights), judge)
        ours = flipped(fused(96)(*grids, weights), judge)
    assert max(x.abs().max() for x in judge) > 0.1, "the automaton died: nothing is compared"
    for mine, theirs in zip(ours, eager):
        assert mine <= 2 * theirs + 0.01


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("channel", [0, 1, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40], ids=str)
def test_special_values_spread_as_in_the_reference(large_tiles, value, channel):
    generator = torch.Generator().manual_seed(4)
    weights = make_weights(generator)
    grids = [make_grid(generator, 1, *size) for size in ((9, 12), (6, 8))]
    for grid in grids:
        grid[0, channel, 4, 5] = value
    with torch.no_grad():
        actual = fused(2)(*grids, weights)
        expected = reference_rollout(2)(*grids, weights)
    for mine, target in zip(actual, expected):
        torch.testing.assert_close(mine, target, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40], ids=str)
def test_special_gradients_spread_as_in_the_reference(large_tiles, value):
    grids, weights, grads = make_problem(((5, 9), (3, 8)), num_steps=1)
    for grad in grads:
        grad[0, 3, 2, 5] = value
    actual = run(fused(1), grids, weights, grads)
    for name, target in run(reference_rollout(1), grids, weights, grads).items():
        torch.testing.assert_close(
            actual[name], target, rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"{name}: {{}}".format
        )


@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
def test_bf16_rounds_operands_and_nothing_else(large_tiles, monkeypatch, life_mask):
    problem = make_problem(((5, 3), (7, 19)), num_steps=2, life_mask=life_mask)
    actual = run(fused(2, life_mask=life_mask, precision="bf16"), *problem)
    exact = run(reference_rollout(2, life_mask), *problem, dtype=torch.float64)
    monkeypatch.setattr(reference, "F", RoundedF)
    judge = run(reference_rollout(2, life_mask), *problem, dtype=torch.float64)
    for name, expected in judge.items():
        error, rounding = ((x[name] - expected).norm() / expected.norm() for x in (actual, exact))
        # The judge rounds a bias's gradient too, where the kernels add up what has not been rounded.
        bound = 1.0 if name.startswith("b") else 0.25
        assert error < bound * rounding, f"{name}: error {error:.2e}, of the rounding itself {rounding:.2e}"


def make_inputs(requires_grad=True, height=5, width=9):
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(2, 16, height, width, generator=generator) for _ in range(2)]
    weights = [torch.randn(shape, generator=generator) * 0.1 for shape in ops._WEIGHT_SHAPES]
    inputs = [x.to(DEVICE).requires_grad_(requires_grad) for x in (*grids, *weights)]
    return inputs[0], inputs[1], inputs[2:]


def gradients(inputs, grads=None, **options):
    outputs = ops.rollout(*inputs, 2, backend="triton", **options)
    grads = [torch.ones_like(x) for x in outputs] if grads is None else grads
    return torch.autograd.grad(outputs, [*inputs[:2], *inputs[2]], grads)


@pytest.mark.parametrize("save_every", [0, 1])
def test_opcheck(large_tiles, save_every):
    mel, lin, weights = make_inputs(requires_grad=save_every > 0, height=2, width=3)
    torch.library.opcheck(ops.rollout_op, (mel, lin, *weights, 2, save_every, True, "fp32", "triton"))


def test_opcheck_backward(large_tiles):
    mel, lin, weights = make_inputs(requires_grad=False, height=2, width=3)
    states = ops.rollout_op(mel, lin, *weights, 2, 2, True, "fp32", "triton")[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, lin, states, *weights, 2, 2, True, "fp32", "triton"))


def test_compiles_to_one_graph(large_tiles):
    inputs = make_inputs()
    model = fastnca.DualSpecTNCA(n_mels=5, n_linear=5, backend="triton").to(DEVICE)
    for parameter, weight in zip(model.parameters(), inputs[2]):
        parameter.data.copy_(weight)
    compiled = torch.compile(model.rollout, fullgraph=True, backend="aot_eager")
    outputs = compiled(*inputs[:2], num_steps=2)
    actual = torch.autograd.grad(outputs, [*inputs[:2], *model.parameters()], [torch.ones_like(x) for x in outputs])
    for mine, target in zip(actual, gradients(inputs)):
        assert torch.equal(mine, target)


def test_layouts_do_not_matter(large_tiles):
    inputs = make_inputs()
    expected = gradients(inputs)
    mel, lin, weights = (x.detach() if isinstance(x, torch.Tensor) else [w.detach() for w in x] for x in inputs)
    wide = torch.zeros(2, 32, 10, 18, device=DEVICE)
    wide[:, ::2, ::2, ::2] = mel
    shifted = torch.cat([lin.new_zeros(1), lin.flatten()])[1:].view(lin.shape)
    strided = [torch.stack([w, w], -1)[..., 0].requires_grad_() for w in weights]
    views = wide[:, ::2, ::2, ::2].requires_grad_(), shifted.requires_grad_(), strided
    grads = [torch.ones((), device=DEVICE).expand(x.shape) for x in views[:2]]
    for mine, target in zip(gradients(views, grads), expected):
        assert torch.equal(mine, target)


def test_a_missing_gradient_is_zero(large_tiles):
    inputs = make_inputs()
    expected = gradients(inputs, [torch.ones_like(inputs[0]), torch.zeros_like(inputs[1])])
    output = ops.rollout(*inputs, 2, backend="triton")[0].sum()
    for mine, target in zip(torch.autograd.grad(output, [*inputs[:2], *inputs[2]]), expected):
        assert torch.equal(mine, target)


# ---------------------------------------------------------------------------------------------------------------------
# Launches and memory

KERNELS = ("step", "network_backward", "stencil_backward", "load_planar", "store_planar", "sum_groups")


@contextmanager
def every_launch(seen):
    """Calls ``seen(kernel, arguments by name, launch)`` in place of each launch."""
    from fastnca import _triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            kernel = getattr(_triton_kernels, name)

            def run(*args, kernel=kernel, original=kernel.run, **options):
                arguments = dict(zip(kernel.arg_names, args)) | options
                return seen(kernel, arguments, lambda: original(*args, **options))

            patch.setattr(kernel, "run", run)
        yield


@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_launches_per_step(large_tiles, checkpoint_every):
    def count(num_steps, backward):
        launches = Counter()

        def seen(kernel, arguments, launch):
            launches[kernel.__name__] += 1
            return launch()

        inputs = make_inputs(requires_grad=backward, height=2, width=2)
        with every_launch(seen):
            outputs = ops.rollout(*inputs, num_steps, backend="triton", checkpoint_every=checkpoint_every)
            if backward:
                forward, launches = launches, Counter()
                sum(x.sum() for x in outputs).backward()
                assert forward == {"load_planar": 1, "step": num_steps, "store_planar": 1}
        return launches

    assert count(5, False) == {"load_planar": 1, "step": 5, "store_planar": 1}
    launches = count(6, True)
    each = {"network_backward": 6, "stencil_backward": 6, "load_planar": 1, "sum_groups": 1}
    # A replayed segment of three steps takes two steps and leaves the last one's life mask by a masked read.
    expected = {**each, "store_planar": 1} if checkpoint_every is None else {**each, "store_planar": 3, "step": 4}
    assert launches == expected


def test_memory_is_allocated_once_and_a_rollout_asks_nothing_of_the_device(large_tiles, monkeypatch):
    """So that a CUDA graph can capture it."""

    def refuse(*args, **kwargs):
        raise AssertionError("this waits for the device")

    for name in ("item", "cpu", "tolist", "__bool__", "numpy"):
        if DEVICE != "cpu":  # the interpreter itself copies
            monkeypatch.setattr(torch.Tensor, name, refuse)
    counts = []
    original = torch.Tensor.new_empty
    for num_steps in (1, 3):
        allocated = []

        def new_empty(*args, allocated=allocated, **kwargs):
            if args[1:] != (0,):  # which the interpreter asks for
                allocated.append(args[1:])
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        mel, lin, weights = make_inputs(requires_grad=False, height=2, width=2)
        states = mel.new_zeros(num_steps + 1, _triton.state_floats(mel, lin, True))
        _triton.rollout(mel, lin, weights, num_steps, 1, True, "fp32", states)
        _triton.rollout_backward(mel, lin, states, weights, num_steps, 1, True, "fp32")
        counts.append(len(allocated))
    assert counts[0] == counts[1]


def test_neighbouring_memory_is_left_alone(large_tiles, monkeypatch):
    """All memory of a rollout lies between guards; all of it, and the guards, hold NaN before it is written."""
    expected = run(fused(3, checkpoint_every=2), *make_problem(((3, 9), (9, 2)), num_steps=1))
    guarded = []

    def new_empty(tensor, *size, **kwargs):
        size = torch.Size(size[0] if not isinstance(size[0], int) else size)
        # 64 floats keep the alignment that the allocator gives.
        whole = torch.full((size.numel() + 128,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        guarded.append(whole)
        return whole[64:-64].view(size)

    def new_zeros(tensor, *size, **kwargs):
        return new_empty(tensor, *size).zero_()

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    actual = run(fused(3, checkpoint_every=2), *make_problem(((3, 9), (9, 2)), num_steps=1))
    monkeypatch.undo()
    assert len(guarded) > 5
    for whole in guarded:
        assert whole[:64].isnan().all() and whole[-64:].isnan().all()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


class Memory:
    """Watches what a launch reads and writes: only inside its tensor arguments, and what it writes, how often."""

    def __init__(self, patch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.writes = None
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def checked_load(builder, ptrs, mask, *args):
            self.check("reads", ptrs, mask)
            return load(builder, ptrs, mask, *args)

        def checked_store(builder, ptrs, value, mask, *args):
            self.writes.update(self.check("writes", ptrs, mask).tolist())
            return store(builder, ptrs, value, mask, *args)

        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)

    def check(self, verb, ptrs, mask):
        addresses = ptrs.data[mask.data].astype("int64")
        inside = False
        for begin, end in self.regions.values():
            inside = inside | ((addresses >= begin) & (addresses < end))
        assert (addresses % 4 == 0).all() and (addresses.size == 0 or inside.all()), f"{self.name} {verb} elsewhere"
        return addresses

    def watch(self, kernel, arguments, launch):
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        self.name, self.writes = kernel.__name__, Counter()
        self.regions = {name: (x.data_ptr(), x.data_ptr() + x.numel() * 4) for name, x in tensors.items()}
        result = launch()
        return result

    def written(self, name):
        """How often each element of the argument was written, by the number of elements."""
        begin, end = self.regions[name]
        return [self.writes[address] for address in range(begin, end, 4)]


@interpreted
@pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])
def test_every_access_is_in_bounds_and_every_element_is_written_once(large_tiles, life_mask):
    mel, lin = (torch.rand(2, 16, *size, requires_grad=True) for size in ((3, 9), (9, 2)))
    weights = [torch.randn(shape, requires_grad=True) * 0.1 for shape in ops._WEIGHT_SHAPES]
    cells = (mel.numel() + lin.numel()) // 16
    seen = Counter()

    def seen_launch(kernel, arguments, launch):
        memory.watch(kernel, arguments, launch)
        name, masked = kernel.__name__, arguments.get("MASKED")
        seen[name] += 1

        def assert_written(argument, begin, end):
            """Exactly once in [begin, end), and nowhere else."""
            times = memory.written(argument)
            assert times == [0] * begin + [1] * (end - begin) + [0] * (len(times) - end), f"{name}: {argument}"

        values = 16 * cells
        if name == "step":
            assert_written("state_to", 0, values + (cells if life_mask else 0))
            if masked:
                assert_written("state_from", values + cells, values + 2 * cells)
        elif name == "load_planar":
            assert_written("rows", 0, values + (2 * cells if masked else 0))
        elif name == "store_planar":
            if masked:
                assert_written("rows", values + cells, values + 2 * cells)
            assert_written("mel", 0, mel.numel())
            assert_written("lin", 0, lin.numel())
        elif name == "network_backward":
            assert_written("gradient_perception", 0, 64 * cells)
            groups = arguments["gradient_groups"]
            assert set(memory.writes) == set(
                memory.regions["gradient_perception"][0] + 4 * i for i in range(64 * cells)
            ) | set(groups.data_ptr() + 4 * i for i in range(groups.numel()))
        elif name == "stencil_backward":
            assert_written("gradient_from", 0, values + (2 * cells if masked else 0))
        else:
            assert_written("gradient", 0, arguments["gradient"].numel())

    with pytest.MonkeyPatch.context() as patch, every_launch(seen_launch):
        memory = Memory(patch)
        outputs = ops.rollout(mel, lin, weights, 3, life_mask=life_mask, checkpoint_every=2, backend="triton")
        sum(x.sum() for x in outputs).backward()
    assert set(seen) == set(KERNELS)


@interpreted
@pytest.mark.parametrize("precision", _triton.PRECISIONS)
def test_the_list_of_compilations_is_what_is_launched(precision):
    launched, listed = set(), {}

    def key(kernel, constexprs, options):
        return kernel.__name__, *sorted(constexprs.items()), *sorted(options.items())

    def seen(kernel, arguments, launch):
        constexprs = {name: arguments[name] for name in arguments if name.isupper()}
        if precision == "bf16" and "DOT" in constexprs:
            constexprs["DOT"] = "bf16"
        options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
        launched.add(key(kernel, constexprs, options))
        return launch()

    for name, kernel, signature, constexprs, _, options in _triton.compilations(80, precision):
        assert list(signature) == list(kernel.arg_names)
        listed[key(kernel, constexprs, options)] = name
    inputs = make_inputs(height=1, width=1)
    with every_launch(seen):
        for life_mask in (True, False):
            gradients(inputs, life_mask=life_mask, precision=precision)
    assert launched == set(listed)
    assert len(set(listed.values())) == len(listed)


# ---------------------------------------------------------------------------------------------------------------------
# The backend

GPU_LESS = pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")


@GPU_LESS
def test_without_a_gpu_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    model = fastnca.DualSpecTNCA(n_mels=2, n_linear=2, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it runs on GPU tensors, not on cpu"):
        model(*model.seed(3))
    assert backends.choose_backend("auto") != "triton"
    assert "finds no GPU" in backends.why_not("triton", device="cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it runs on GPU tensors"):
        ops.rollout(*make_inputs(), 1, backend="triton")


def test_auto_takes_it_for_gpus_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not("triton", device="cpu") is None
    assert backends.choose_backend("auto", device="cpu") != "triton"
    assert backends.choose_backend("auto", device="cuda") == "triton"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"dtype": torch.float64}, "it computes in float32, not in float64"),
        ({"num_channels": 8}, "16 channels, not for 8"),
        ({"precision": "fp8"}, "it knows the precisions fp32, tf32, bf16, not 'fp8'"),
    ],
)
def test_why_not_says_why(request_, words):
    assert words in backends.why_not("triton", device=DEVICE, **request_)


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    reason = backends.why_not("triton", device="cuda")
    assert reason == "it needs compute capability 8.0 or later, and a T4 has 7.5"
    for capability[0], architecture in (((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)):
        assert backends.why_not("triton", device="cuda") is None
        assert _triton.architecture_of(torch.device("cuda")) == architecture


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(_triton, "INSTALLED", False)
    assert backends.why_not("triton", device=DEVICE) == "the package triton is not installed"


def test_grids_that_are_too_wide_are_refused():
    mel, lin, weights = make_inputs(requires_grad=False)
    wide = mel[..., :1].expand(-1, -1, -1, _triton.MAX_WIDTH + 1)
    with pytest.raises(ValueError, match=f"lin must have at most {_triton.MAX_WIDTH} frames"):
        ops.rollout(mel, wide, weights, 1, backend="triton")


def test_cpu_work_imports_neither_triton_nor_torchdynamo():
    script = """
import sys, torch, fastnca
fastnca.backends.why_not("triton")
model = fastnca.DualSpecTNCA(n_mels=3, n_linear=4, backend="cpu")
sum(grid.sum() for grid in model.rollout(*model.seed(5), 2)).backward()
print([name for name in ("triton", "torch._dynamo") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"

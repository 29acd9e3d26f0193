"""The Triton kernels against the reference, with float64 as the judge: on a GPU where there is one, else interpreted.

The interpreter shows what the kernels compute and which memory they touch, and nothing about their speed. It takes some
milliseconds for a tile, so the grids are small here and, where nothing else is said, the tiles large.
"""

import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import product

import interpreter
import parity
import pytest
import torch

import fastnca
from fastnca.automaton import backends, ops, triton

if not triton.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan", "one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = parity.Backend("triton", DEVICE)
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    interpreter.patch_once(monkeypatch)


@pytest.fixture
def large_tiles(monkeypatch):
    interpreter.set_shapes(monkeypatch)


def make_inputs(requires_grad=True, height=5, width=9):
    return TRITON.inputs(parity.make_problem(((height, width), (height, width))), requires_grad)


def make_context(height, width):
    """Tables for the grids of make_inputs."""
    return [torch.zeros(1, 128, length, device=DEVICE) for length in (height, height, width)]


SPARSE = (0.0, 0.0, 0.0, 1.0)  # most cells are dead, so that some have no life around them
TOLD = {"context_batch": 1, "alpha_levels": SPARSE, "growth": True}


@pytest.mark.parametrize("options", [{}, TOLD], ids=["plain", "told"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_in_the_shapes_of_the_table(precision, options):
    """Interpreted, tf32 products are exact: both precisions' tiles, slices and programs, to the accuracy of float32."""
    if DEVICE != "cpu" and precision == "tf32":
        pytest.skip("tf32 rounds")
    problem = parity.smooth_problem(((3, 3), (2, 3)), 1, **options)
    growth = options.get("growth", False)
    actual = parity.run(TRITON.rollout(1, precision=precision, growth=growth), problem)
    parity.assert_errs_as_float32(actual, problem, 1, growth=growth)


def test_the_number_of_programs_does_not_change_a_bit_of_the_states(monkeypatch):
    problem = parity.make_problem(((9, 17), (2, 3)))
    results = []
    for programs in (1, 100):
        interpreter.set_shapes(monkeypatch, programs=programs)
        results.append(parity.run(TRITON.rollout(2), problem))
    parity.assert_same_bits(results[1], results[0])


@pytest.mark.parametrize(
    ("sizes", "n", "steps", "checkpoint_every", "options"),
    [
        (((2, 3), (3, 3)), 2, 1, None, {"context_batch": 2}),  # tables for each sample
        (((2, 5), (3, 5)), 2, 2, 2, TOLD),  # tables for both samples
        (((4, 6), (5, 7)), 1, 2, None, {"growth": True}),
        (((3, 9), (9, 9)), 1, 1, None, TOLD),  # grids of several tiles
    ],
    ids=str,
)
def test_context_and_growth(monkeypatch, sizes, n, steps, checkpoint_every, options):
    interpreter.set_shapes(monkeypatch, tile=(8, 8))
    problem = parity.smooth_problem(sizes, steps, n=n, **options)
    growth = options.get("growth", False)
    actual = parity.run(TRITON.rollout(steps, checkpoint_every=checkpoint_every, growth=growth), problem)
    parity.assert_errs_as_float32(actual, problem, steps, growth=growth)


def test_bf16_keeps_sixteen_bits_of_the_context(large_tiles):
    problem = parity.smooth_problem(((5, 4), (3, 4)), 1, context_batch=1, growth=True)
    actual = parity.run(TRITON.rollout(1, precision="bf16", growth=True), problem)
    parity.assert_rounds_operands_alone(actual, problem, 1, bias_bound=2.0, growth=True)


def told_inputs(requires_grad=True):
    problem = parity.make_problem(((2, 3), (3, 3)), context_batch=1, alpha_levels=SPARSE)
    tables = [table.to(DEVICE).requires_grad_(requires_grad) for table in problem.context]
    return *TRITON.inputs(problem, requires_grad), tables


def test_opcheck_with_context_and_growth(large_tiles):
    options = 1, 1, True, True, "fp32", "triton"
    checks = "test_schema", "test_autograd_registration", "test_faketensor"  # what compiles is in the next test
    torch.library.opcheck(ops.rollout_op, (*told_inputs(), *options), test_utils=checks)
    mel, lin, weights, tables = told_inputs(requires_grad=False)
    states = ops.rollout_op(mel, lin, weights, tables, *options)[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, lin, states, weights, tables, *options), test_utils=checks)


def test_context_and_growth_compile_to_one_graph(large_tiles):
    mel, lin, weights, tables = told_inputs()
    inputs = mel, lin, *weights, *tables

    def rollout(mel, lin, weights, tables):
        return sum(x.sum() for x in ops.rollout(mel, lin, weights, 1, context=tables, growth=True, backend="triton"))

    compiled = torch.compile(rollout, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(mel, lin, weights, tables), inputs) for f in (compiled, rollout))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Launches and memory

KERNELS = ("step", "network_backward", "stencil_backward", "load_planar", "store_planar", "sum_groups", "sum_places")


@contextmanager
def every_launch(seen):
    """Calls ``seen(kernel, arguments by name, launch)`` in place of each launch."""
    from fastnca.automaton import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            kernel = getattr(triton_kernels, name)

            def run(*args, kernel=kernel, original=kernel.run, **options):
                arguments = dict(zip(kernel.arg_names, args)) | options
                return seen(kernel, arguments, lambda: original(*args, **options))

            patch.setattr(kernel, "run", run)
        yield


@pytest.mark.parametrize(("checkpoint_every", "steps", "told"), [(None, 3, True), (3, 6, False)])
def test_launches_per_step(large_tiles, checkpoint_every, steps, told):
    def count(num_steps, backward):
        launches = Counter()

        def seen(kernel, arguments, launch):
            launches[kernel.__name__] += 1
            return launch()

        inputs = make_inputs(requires_grad=backward, height=2, width=2)
        rule = {"context": make_context(2, 2), "growth": True} if told else {}
        with every_launch(seen):
            outputs = ops.rollout(*inputs, num_steps, backend="triton", checkpoint_every=checkpoint_every, **rule)
            if backward:
                forward, launches = launches, Counter()
                sum(x.sum() for x in outputs).backward()
                assert forward == {"load_planar": 1, "step": num_steps, "store_planar": 1}
        return launches

    assert count(3, False) == {"load_planar": 1, "step": 3, "store_planar": 1}
    launches = count(steps, True)
    each = {"network_backward": steps, "stencil_backward": steps, "load_planar": 1, "sum_groups": 1}
    # A replayed segment of three steps takes two steps and leaves the last one's life mask by a masked read.
    expected = {**each, "store_planar": 1} if checkpoint_every is None else {**each, "store_planar": 3, "step": 4}
    assert launches == ({**expected, "sum_places": 1} if told else expected)


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
        states = mel.new_zeros(num_steps + 1, triton.state_floats(mel, lin, True))
        options = make_context(2, 2), num_steps, 1, True, True, "fp32"
        triton.rollout(mel, lin, weights, *options, states)
        triton.rollout_backward(mel, lin, states, weights, *options)
        counts.append(len(allocated))
    assert counts[0] == counts[1]


def test_neighboring_memory_is_left_alone(large_tiles, monkeypatch):
    """All memory of a rollout lies between guards; all of it, and the guards, hold NaN before it is written."""
    problem = parity.make_problem(((3, 9), (9, 2)))
    expected = parity.run(TRITON.rollout(3, checkpoint_every=2), problem)
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
    actual = parity.run(TRITON.rollout(3, checkpoint_every=2), problem)
    monkeypatch.undo()
    assert len(guarded) > 5
    for whole in guarded:
        assert whole[:64].isnan().all() and whole[-64:].isnan().all()
    parity.assert_same_bits(actual, expected)


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
@pytest.mark.parametrize(("life_mask", "told"), [(True, True), (False, False)], ids=str)
def test_every_access_is_in_bounds_and_every_element_is_written_once(large_tiles, life_mask, told):
    mel, lin, weights = TRITON.inputs(parity.make_problem(((3, 9), (9, 9 if told else 2)), n=2))
    tables = [torch.zeros(2, 128, length, requires_grad=True) for length in (3, 9, 9)] if told else None
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
            assert_written("linear", 0, lin.numel())
        elif name == "network_backward":
            assert_written("gradient_perception", 0, 64 * cells)
            written = set()
            if told:
                assert_written("gradient_places", 0, arguments["gradient_places"].numel())
                written.update(range(*memory.regions["gradient_places"], 4))
            groups = arguments["gradient_groups"]
            unchanged = 4 * 128 if told else 0  # the place of b1, whose gradient is that of the rows
            b1 = groups.data_ptr() + 4 * sum(triton._PARTS[:3])
            written.update(
                range(*memory.regions["gradient_perception"], 4), range(*memory.regions["gradient_groups"], 4)
            )
            for group in range(len(groups)):
                begin = b1 + 4 * group * groups.shape[1]
                written.difference_update(range(begin, begin + unchanged, 4))
            assert set(memory.writes) == written
        elif name == "stencil_backward":
            assert_written("gradient_from", 0, values + (2 * cells if masked else 0))
        else:
            assert_written("gradient", 0, arguments["gradient"].numel())

    with pytest.MonkeyPatch.context() as patch, every_launch(seen_launch):
        memory = Memory(patch)
        rule = {"life_mask": life_mask, "context": tables, "growth": told}
        outputs = ops.rollout(mel, lin, weights, 3, checkpoint_every=2, backend="triton", **rule)
        sum(x.sum() for x in outputs).backward()
    assert set(seen) == set(KERNELS if told else KERNELS[:-1])


@interpreted
@pytest.mark.parametrize("precision", triton.PRECISIONS)
def test_the_list_of_compilations_is_what_is_launched(precision):
    launched, listed = set(), {}

    def key(kernel, constexprs, options):
        return kernel.__name__, *sorted(constexprs.items()), *sorted(options.items())

    def seen(kernel, arguments, launch):
        constexprs = {name: arguments[name] for name in arguments if name.isupper()}
        if precision == "bf16" and "DOT" in constexprs:
            constexprs["DOT"] = "bf16"
        options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
        constexprs |= {name: None for name in ("context", "gradient_places") if arguments.get(name, 0) is None}
        launched.add(key(kernel, constexprs, options))

    for name, kernel, signature, constexprs, _, options in triton.compilations(80, precision):
        assert list(signature) == list(kernel.arg_names)
        listed[key(kernel, constexprs, options)] = name
    inputs = make_inputs(height=1, width=1)
    with every_launch(seen):
        for life_mask, growth, context in product((True, False), (True, False), (make_context(1, 1), None)):
            if life_mask or not growth:
                rule = {"life_mask": life_mask, "growth": growth, "context": context}
                outputs = ops.rollout(*inputs, 2, backend="triton", precision=precision, **rule)
                sum(x.sum() for x in outputs).backward()
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
        assert triton.architecture_of(torch.device("cuda")) == architecture


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert backends.why_not("triton", device=DEVICE) == "the package triton is not installed"


def test_grids_that_are_too_wide_are_refused():
    mel, lin, weights = make_inputs(requires_grad=False)
    wide = mel[..., :1].expand(-1, -1, -1, triton.MAX_WIDTH + 1)
    with pytest.raises(ValueError, match=f"linear must have at most {triton.MAX_WIDTH} frames"):
        ops.rollout(mel, wide, weights, 1, backend="triton")


def test_cpu_work_imports_neither_triton_nor_torchdynamo():
    script = """
import sys, torch, fastnca
fastnca.automaton.backends.why_not("triton")
model = fastnca.DualSpecTNCA(n_mels=3, n_linear=4, backend="cpu")
sum(grid.sum() for grid in model.rollout(*model.seed(5), 2)).backward()
print([name for name in ("triton", "torch._dynamo") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"

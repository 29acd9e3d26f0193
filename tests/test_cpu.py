"""What the CPU kernels alone promise: the sizes of their blocks and tiles, threads and processes, instruction sets."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import parity
import pytest
import torch

from fastnca.automaton import cpu, ops
from fastnca.automaton.rule import weight_shapes

if not parity.CAPABILITIES:
    pytest.skip("fastnca was installed without its extension", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
CPU = parity.Backend("cpu")
# Widths and heights around the block (48 cells) and the tile (64 x 16 cells) and of real grids.
SIZES = [((1, 1), (1, 7)), ((5, 3), (7, 49)), ((80, 8), (513, 8)), ((3, 130), (70, 64)), ((19, 65), (1, 200))]
SIZE_IDS = ["-".join(f"{h}x{w}" for h, w in pair) for pair in SIZES]
life_masks = pytest.mark.parametrize("life_mask", [True, False], ids=["masked", "unmasked"])


@pytest.fixture(params=parity.CAPABILITIES)
def capability(request):
    with parity.cpu_kernels(request.param, torch.get_num_threads()):
        yield request.param


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def bf16(request):
    if request.param not in parity.CAPABILITIES:
        pytest.skip(f"the processor has no {request.param}")
    with parity.cpu_kernels(request.param, torch.get_num_threads()):
        yield


def make_inputs(requires_grad=True, height=7, width=9):
    return CPU.inputs(parity.make_problem(((height, width), (height, width)), n=2), requires_grad)


def gradients(inputs, num_steps, **options):
    mel, linear, weights = inputs
    outputs = ops.rollout(*inputs, num_steps, **options)
    return torch.autograd.grad(outputs, [mel, linear, *weights], [torch.ones_like(x) for x in outputs])


def equal(actual, expected):
    return all(torch.equal(mine, target) for mine, target in zip(actual, expected, strict=True))


@life_masks
@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_two_steps_across_blocks_and_tiles(capability, sizes, life_mask):
    problem = parity.smooth_problem(sizes, 2, life_mask)
    actual = parity.run(CPU.rollout(2, life_mask=life_mask), problem)
    parity.assert_errs_as_float32(actual, problem, 2, life_mask)


def test_a_batch_across_tiles(capability):
    problem = parity.smooth_problem(((6, 70), (21, 66)), 1, n=3)
    parity.assert_errs_as_float32(parity.run(CPU.rollout(1), problem), problem, 1)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 3, 5, 7])
def test_checkpoints_do_not_change_a_bit(checkpoint_every):
    problem = parity.make_problem(((4, 9), (17, 13)))
    replayed = parity.run(CPU.rollout(5, checkpoint_every=checkpoint_every), problem)
    parity.assert_same_bits(replayed, parity.run(CPU.rollout(5), problem))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(capability, num_threads, threads):
    problem = parity.make_problem(((33, 70), (50, 41)), n=2)
    num_threads(1)
    alone = parity.run(CPU.rollout(4, checkpoint_every=3), problem)
    num_threads(threads)
    parity.assert_same_bits(parity.run(CPU.rollout(4, checkpoint_every=3), problem), alone)


@pytest.mark.parametrize("sizes", [((5, 70), (21, 70)), ((33, 130), (2, 130))], ids=str)
def test_context_and_growth_across_blocks_and_tiles(capability, sizes):
    rule = {"context_batch": 1, "alpha_levels": (0.0,) * 40 + (0.6,), "growth": True}
    problem = parity.smooth_problem(sizes, 2, **rule)
    parity.assert_errs_as_float32(parity.run(CPU.rollout(2, growth=True), problem), problem, 2, growth=True)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit_with_context_and_growth(capability, num_threads, threads):
    problem = parity.make_problem(((33, 70), (50, 70)), n=2, context_batch=1, alpha_levels=(0.0,) * 40 + (0.6,))
    num_threads(1)
    alone = parity.run(CPU.rollout(4, checkpoint_every=3, growth=True), problem)
    num_threads(threads)
    parity.assert_same_bits(parity.run(CPU.rollout(4, checkpoint_every=3, growth=True), problem), alone)


# ---- bf16


@life_masks
@pytest.mark.parametrize("sizes", SIZES, ids=SIZE_IDS)
def test_bf16_rounds_operands_and_nothing_else(bf16, sizes, life_mask):
    problem = parity.smooth_problem(sizes, 2, life_mask)
    actual = parity.run(CPU.rollout(2, life_mask=life_mask, precision="bf16"), problem)
    parity.assert_rounds_operands_alone(actual, problem, 2, life_mask)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bf16_does_not_depend_on_threads_or_checkpoints(bf16, num_threads, threads):
    problem = parity.make_problem(((33, 70), (50, 41)), n=2)
    num_threads(1)
    alone = parity.run(CPU.rollout(4, precision="bf16"), problem)
    num_threads(threads)
    parity.assert_same_bits(parity.run(CPU.rollout(4, checkpoint_every=3, precision="bf16"), problem), alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bf16_spreads_special_values_as_the_reference(bf16, value):
    grids, weights, _ = parity.make_problem(((9, 12), (6, 70)), seed=4)
    for grid in grids:
        grid[0, 7, 4, 5] = value
    with torch.no_grad():
        actual = CPU.rollout(1, precision="bf16")(*grids, weights)
        expected = parity.reference_rollout(1)(*grids, weights)
    for mine, target in zip(actual, expected):
        assert torch.equal(mine.isfinite(), target.isfinite())


def test_bf16_learns_as_fp32_does(bf16):
    losses = {}
    for precision in ("fp32", "bf16"):
        grids, weights, grads = parity.make_problem(((12, 16), (20, 16)), seed=5)
        weights = [x * (0.1 if index == 4 else 1.0) for index, x in enumerate(weights)]
        weights = [x.requires_grad_() for x in weights]
        targets = [grad[:, 0] * 0.1 for grad in grads]
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
    reason = cpu.why_not(torch.device("cpu"), torch.float32, 16, "bf16")
    if capability.endswith("bf16"):
        assert reason is None
        return
    assert reason == f"precision='bf16' needs the instruction set avx512_bf16 or amx_bf16, and {capability} is in use"
    grids = [torch.zeros(1, 16, 2, 2)] * 2
    weights = [torch.zeros(shape) for shape in weight_shapes()]
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: precision='bf16' needs"):
        ops.rollout(*grids, weights, 1, precision="bf16", backend="cpu")
    with pytest.raises(ValueError, match="have no bf16 products"):
        cpu._C.peak_flops(1, True)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no kernels named 'mmx'"):
        cpu._C.set_capability("mmx")


def test_why_not_says_why():
    assert "tf32" in cpu.why_not(torch.device("cpu"), torch.float32, 16, "tf32")
    assert "cuda" in cpu.why_not(torch.device("cuda"), torch.float32, 16, "fp32")
    assert cpu.why_not(torch.device("cpu"), torch.float32, 16, "fp32") is None


# ---- the operators, where they are cheap enough to see all of them


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_opcheck(save_every):
    inputs = make_inputs(requires_grad=save_every > 0)
    torch.library.opcheck(ops.rollout_op, (*inputs, [], 3, save_every, True, False, "fp32", "cpu"))


@pytest.mark.skipif(not cpu._C.has_bf16(), reason="the processor has no AVX512-BF16")
def test_opcheck_bf16():
    torch.library.opcheck(ops.rollout_op, (*make_inputs(), [], 3, 2, True, False, "bf16", "cpu"))


def test_opcheck_backward():
    mel, linear, weights = make_inputs(requires_grad=False)
    rule = [], 3, 2, True, False, "fp32", "cpu"
    states = ops.rollout_op(mel, linear, weights, *rule)[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, linear, states, weights, *rule))


def test_the_default_compiler_takes_one_graph():
    inputs = make_inputs()
    compiled = torch.compile(lambda mel, linear, weights: ops.rollout(mel, linear, weights, 3), fullgraph=True)
    outputs = compiled(*inputs)
    ones = [torch.ones_like(x) for x in outputs]
    actual = torch.autograd.grad(outputs, [*inputs[:2], *inputs[2]], ones)
    assert equal(actual, gradients(inputs, 3))


# ---- signals


@pytest.fixture
def ctrl_c():
    """Sends Ctrl-C to this process after 0.1 s, once it is called with the handler that shall answer it."""
    before = signal.getsignal(signal.SIGINT)
    timers = []

    def send(handler):
        signal.signal(signal.SIGINT, handler)
        timers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
        timers[0].start()

    yield send
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, before)


def long_call(direction):
    """A call that takes seconds."""
    inputs = make_inputs(requires_grad=direction == "backward", height=20, width=30)
    if direction == "forward":
        return lambda: ops.rollout(*inputs, 100_000)
    outputs = ops.rollout(*inputs, 1500, checkpoint_every=50)
    return lambda: torch.autograd.grad([x.sum() for x in outputs], inputs[2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ctrl_c_ends_a_call_at_once(num_threads, ctrl_c, direction, threads):
    num_threads(threads)
    inputs = make_inputs(height=40, width=50)
    expected = gradients(inputs, 3)
    call = long_call(direction)
    start = time.monotonic()
    ctrl_c(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert time.monotonic() - start < 1
    assert equal(gradients(inputs, 3), expected)


def test_an_error_of_a_signal_handler_is_what_the_call_raises(ctrl_c):
    def handler(signal_number, frame):
        raise LookupError("a handler's own")

    ctrl_c(handler)
    with pytest.raises(LookupError, match="a handler's own"):
        long_call("forward")()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_goes_on_after_a_signal_handler_that_raises_nothing(num_threads, ctrl_c, threads):
    """Whatever it computes, and with the small numbers of which the kernels make zeros."""
    num_threads(threads)
    inputs = make_inputs(requires_grad=False, height=40, width=50)
    inputs[2][4] *= 0.01  # or nothing would stay finite
    expected = ops.rollout(*inputs, 3), ops.rollout(*inputs, 300)
    assert expected[1][0].isfinite().all()
    handled = []

    def handler(signal_number, frame):
        handled.append((ops.rollout(*inputs, 3), sys.float_info.min / len(inputs)))

    ctrl_c(handler)
    while not handled:
        actual = ops.rollout(*inputs, 300)
    ((grids, denormal),) = handled
    assert equal(grids, expected[0]) and denormal > 0
    assert equal(actual, expected[1])


# ---- threads and processes


def test_calls_from_several_threads_do_not_meet():
    inputs = make_inputs(height=40, width=50)
    expected = gradients(inputs, 3)
    results = {}

    def work(name):
        results[name] = gradients(inputs, 3)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(4):
        assert equal(results[name], expected)


def _run_in_child(inputs, connection):
    torch.utils.deterministic.fill_uninitialized_memory = False  # PyTorch fills with threads that no fork survives
    connection.send_bytes(b"".join(x.numpy().tobytes() for x in ops.rollout(*inputs, 2)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
def test_works_after_a_fork():
    inputs = make_inputs(requires_grad=False, height=40, width=50)
    expected = b"".join(x.numpy().tobytes() for x in ops.rollout(*inputs, 2))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_in_child, args=(inputs, sender), daemon=True)
    child.start()
    assert receiver.poll(30), "the child hangs"
    assert receiver.recv_bytes() == expected
    child.join(30)


class _Rollouts(torch.utils.data.Dataset):
    """Grows a grid in the process that asks for it."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.cat([x.flatten() for x in ops.rollout(*self.inputs, 1 + index)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
def test_works_in_data_loader_workers():
    rollouts = _Rollouts(make_inputs(requires_grad=False, height=40, width=50))
    expected = [rollouts[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(
        rollouts, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for actual, target in zip(loader, expected, strict=True):
        assert torch.equal(actual, target)


def test_calls_from_threads_of_different_sizes_and_gradients():
    """Threads that differ in all they ask for, while others differentiate."""
    problems = [make_inputs(height=height, width=width) for height, width in ((1, 1), (3, 70), (40, 9))]
    expected = [gradients(x, 2, checkpoint_every=2) for x in problems]
    failures = []

    def work(index):
        inputs = problems[index % 3]
        for _ in range(3):
            actual = gradients(inputs, 2, checkpoint_every=1 + index // 3)
            if not equal(actual, expected[index % 3]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

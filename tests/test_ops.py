"""The operators as torch sees them: schema, tracing, autograd, memory layout, threads and processes."""

import multiprocessing
import threading

import pytest
import torch

from fastnca import _cpu, ops

if _cpu.why_not(torch.device("cpu"), torch.float32, 16, "fp32"):
    pytest.skip("fastnca was installed without its extension", allow_module_level=True)


def make_inputs(requires_grad=True, height=7, width=9):
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(2, 16, height, width, generator=generator) for _ in range(2)]
    weights = [torch.randn(shape, generator=generator) * 0.1 for shape in ops._WEIGHT_SHAPES]
    inputs = [x.requires_grad_(requires_grad) for x in (*grids, *weights)]
    return inputs[0], inputs[1], inputs[2:]


def gradients(outputs, inputs, grads=None):
    mel, lin, weights = inputs
    return torch.autograd.grad(outputs, [mel, lin, *weights], grads)


def ones(outputs):
    return [torch.ones_like(x) for x in outputs]


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_opcheck(save_every):
    mel, lin, weights = make_inputs(requires_grad=save_every > 0)
    torch.library.opcheck(ops.rollout_op, (mel, lin, *weights, 3, save_every, True, "fp32", "cpu"))


@pytest.mark.skipif(not _cpu._C.has_bf16(), reason="the processor has no AVX512-BF16")
def test_opcheck_bf16():
    mel, lin, weights = make_inputs()
    torch.library.opcheck(ops.rollout_op, (mel, lin, *weights, 3, 2, True, "bf16", "cpu"))


def test_opcheck_backward():
    mel, lin, weights = make_inputs(requires_grad=False)
    states = ops.rollout_op(mel, lin, *weights, 3, 2, True, "fp32", "cpu")[2]
    torch.library.opcheck(ops.rollout_backward_op, (mel, lin, states, *weights, 3, 2, True, "fp32", "cpu"))


def test_compiles_to_one_graph():
    inputs = make_inputs()
    expected = gradients(ops.rollout(*inputs, 3), inputs, ones(inputs[:2]))
    compiled = torch.compile(lambda mel, lin, weights: ops.rollout(mel, lin, weights, 3), fullgraph=True)
    for actual, target in zip(gradients(compiled(*inputs), inputs, ones(inputs[:2])), expected):
        assert torch.equal(actual, target)


def test_states_are_saved_only_for_a_gradient():
    inputs = make_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        with torch.no_grad():
            ops.rollout(*inputs, 6)
        ops.rollout(*make_inputs(requires_grad=False), 6)
        assert saved == []
        ops.rollout(*inputs, 6, checkpoint_every=4)
    assert saved[0] == (3, 2 * 2 * 16 * 7 * 9)


def test_layout_of_inputs_does_not_matter():
    mel, lin, weights = make_inputs(requires_grad=False)
    expected = ops.rollout(mel, lin, weights, 2)
    wide = torch.zeros(2, 32, 14, 18)
    wide[:, ::2, ::2, ::2] = mel
    transposed = lin.transpose(2, 3).contiguous().transpose(2, 3)
    strided = [torch.stack([w, w], -1)[..., 0] for w in weights]
    for actual, target in zip(ops.rollout(wide[:, ::2, ::2, ::2], transposed, strided, 2), expected):
        assert torch.equal(actual, target)
    expanded = lin[:1].expand(2, -1, -1, -1)
    for actual, target in zip(ops.rollout(mel, expanded, weights, 2), ops.rollout(mel, expanded.clone(), weights, 2)):
        assert torch.equal(actual, target)


def test_layout_of_gradients_does_not_matter():
    inputs = make_inputs()
    expected = gradients(ops.rollout(*inputs, 2), inputs, ones(inputs[:2]))
    outputs = ops.rollout(*inputs, 2)
    expanded = [torch.ones(()).expand(x.shape) for x in outputs]
    transposed = [torch.ones(2, 16, 9, 7).transpose(2, 3) for _ in outputs]
    for grads in (expanded, transposed):
        for actual, target in zip(gradients(ops.rollout(*inputs, 2), inputs, grads), expected):
            assert torch.equal(actual, target)


def test_a_missing_gradient_is_zero():
    inputs = make_inputs()
    grads = [torch.ones_like(inputs[0]), torch.zeros_like(inputs[1])]
    expected = gradients(ops.rollout(*inputs, 2), inputs, grads)
    for actual, target in zip(gradients(ops.rollout(*inputs, 2)[0].sum(), inputs), expected):
        assert torch.equal(actual, target)


def test_only_what_asks_for_a_gradient_gets_one():
    mel, lin, weights = make_inputs(requires_grad=False)
    weights[3].requires_grad_()
    sum(x.sum() for x in ops.rollout(mel, lin, weights, 2)).backward()
    assert weights[3].grad.abs().max() > 0
    assert mel.grad is None and weights[0].grad is None


def test_no_steps_return_copies():
    inputs = make_inputs()
    outputs = ops.rollout(*inputs, 0)
    for before, after in zip(inputs, outputs):
        assert torch.equal(before, after) and before.data_ptr() != after.data_ptr()
    assert torch.equal(torch.autograd.grad(outputs[0].sum(), inputs[0])[0], torch.ones_like(inputs[0]))


def test_unsaved_states_are_reported():
    mel, lin, weights = make_inputs()
    outputs = ops.rollout_op(mel, lin, *weights, 3, 0, True, "fp32", "cpu")
    with pytest.raises(RuntimeError, match="saved no states"):
        outputs[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mel, lin, w: (mel[:, :8], lin, w, 1), r"mel must have shape \[N, 16, H, W\].*got \[2, 8, 7, 9\]"),
        (lambda mel, lin, w: (mel, lin[:, :, :0], w, 1), "lin must have shape .* without an empty axis"),
        (lambda mel, lin, w: (mel[:1], lin, w, 1), "same batch size, got 1 and 2"),
        (lambda mel, lin, w: (mel, lin, w[:5], 1), "got 5 tensors"),
        (lambda mel, lin, w: (mel, lin, [w[0][:, :9], *w[1:]], 1), r"w1 must have shape \[128, 64, 1, 1\]"),
        (lambda mel, lin, w: (mel, lin.double(), w, 1), "must be float32 on one device, got torch.float64"),
        (lambda mel, lin, w: (mel, lin, w, -1), "num_steps must be at least 0, got -1"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.rollout(*change(*make_inputs(requires_grad=False)))


def test_an_unknown_precision_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: it knows the precisions"):
        ops.rollout(*make_inputs(requires_grad=False), 1, precision="fp8")


def test_calls_from_several_threads_do_not_meet():
    inputs = make_inputs(height=40, width=50)
    expected = gradients(ops.rollout(*inputs, 3), inputs, ones(inputs[:2]))
    results = {}

    def work(name):
        results[name] = gradients(ops.rollout(*inputs, 3), inputs, ones(inputs[:2]))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(4):
        assert all(torch.equal(actual, target) for actual, target in zip(results[name], expected))


def _run_in_child(inputs, connection):
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
    expected = [gradients(ops.rollout(*x, 2, checkpoint_every=2), x, ones(x[:2])) for x in problems]
    failures = []

    def work(index):
        inputs = problems[index % 3]
        for _ in range(3):
            actual = gradients(ops.rollout(*inputs, 2, checkpoint_every=1 + index // 3), inputs, ones(inputs[:2]))
            if not all(torch.equal(mine, target) for mine, target in zip(actual, expected[index % 3])):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

"""Checks and measures the Triton kernels on the GPU of this machine: ``python -m benchmarks.speed.gpu -o DIR``.

Writes DIR/gpu.md and DIR/gpu.csv after every section, so that an interrupted run leaves what it has. The CSV file has a
line for each row of each section.
Sections run in a process of their own, which ends with the first error in it: the error is in the report, and the
sections after it start afresh.

Method. What is compared is judged by the reference in float64. PyTorch is told for every measurement whether it may use
TF32, which for convolutions it does by default. Times are medians between CUDA events, of warm calls that take turns;
the shares are of matrix products and copies measured here, not of a data sheet. A share of the bandwidth counts the 128
bytes per cell and step that no implementation can avoid.

``--quick`` does all this on tiny grids: to see it run, not to quote. With TRITON_INTERPRET=1 it needs no GPU: what only
a GPU can answer is left out and says so.
"""

import argparse
import shlex
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch

from fastnca import RECIPES
from fastnca.automaton import ops, triton
from fastnca.automaton.rule import ALPHA, CHANNELS, CONTEXT_NAMES, HIDDEN1, WEIGHT_NAMES, weight_shapes
from fastnca.sound.spectrogram import analyze
from fastnca.sound.synthetic import synthesize_bowed_string
from fastnca.training.trainer import Budget, Trainer

from ..implementations import FORWARD_FLOPS, TRAINING_FLOPS, Compiled, Model, Workload
from ..report import machine, table, write
from .workers import Turn, summarize, take_turns

BYTES = 128  # per cell and step: the state read and written
# Of the norms of values and of gradients, over two steps; fp32 is held to what float32 PyTorch errs by. Rounding can
# let another cell win a window of the life mask, which gets the gradient then: a whole one, however small the rounding.
TOLERANCE = {"tf32": {"values": 1e-2, "gradients": 1e-1}, "bf16": {"values": 5e-2, "gradients": 5e-1}}
NAMES = ("mel", "linear", "grad mel", "grad linear", *(f"grad {name}" for name in (*WEIGHT_NAMES, *CONTEXT_NAMES)))


@dataclass(frozen=True)
class Size:
    """How much work the sections do."""

    bands: tuple = (80, 513)
    width: int = 264
    steps: int = 96  # of an epoch and of the long rollouts
    forward_steps: int = 32
    widths: tuple = (32, 88, 264, 1024, 4096)
    batches: tuple = (1, 2, 4, 8, 16)
    grids: tuple = (((1, 1), (1, 7)), ((9, 8), (17, 10)), ((80, 65), (513, 65)))
    told: tuple = ((80, 65), (513, 65))  # with context and growth
    epochs: int = 1500
    frames: int = 88
    rounds: int = 15
    budget: float = 20.0  # seconds per implementation
    matrix: int = 8192
    copied: int = 2**30  # bytes
    precisions: tuple = triton.PRECISIONS  # of what is slow; parity and rollouts have all
    learned: tuple = triton.PRECISIONS  # beside the reference

    def workload(self, width=None, batch=1, lively=False):
        mel, linear = self.bands
        return Workload(width or self.width, batch, mel, linear, lively=lively, device=device())


# One or two tiles of each grid: the interpreter takes a tenth of a second for every program.
QUICK = Size(
    bands=(2, 5),
    width=2,
    steps=2,
    forward_steps=2,
    widths=(2,),
    batches=(1, 2),
    grids=(((1, 1), (1, 2)), ((2, 2), (3, 3))),
    told=((2, 3), (3, 3)),
    epochs=2,
    frames=2,
    rounds=1,
    budget=1.0,
    matrix=256,
    copied=2**20,
)
# A sound has all 593 bands, which is too much for the interpreter.
INTERPRETED = replace(QUICK, grids=(((2, 2), (3, 3)),), batches=(1,), precisions=("bf16",), learned=())


class NeedsGpu(Exception):
    """A section that the interpreter cannot answer."""


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def why_not():
    """None if the check can run here, else the reason."""
    return triton.why_not(torch.device(device()), torch.float32, CHANNELS, "fp32")


def _need_gpu():
    if device() == "cpu":
        raise NeedsGpu("needs a GPU")


@contextmanager
def tf32(allowed):
    """Whether PyTorch's own products may round their operands to TF32."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.allow_tf32 = value


def _norm(x):
    return x.double().norm().item()


# Sections: of (size, what the sections before found) -> rows, dicts of what there is to tell. A row with "passed" False
# fails the check.


def environment(size, found):
    """Environment"""
    rows = machine()
    if device() == "cpu":
        rows["GPU"] = "none: Triton's interpreter"
    else:
        properties = torch.cuda.get_device_properties(0)
        rows |= {
            "GPU": properties.name,
            "architecture": triton.architecture_of(torch.device("cuda")),
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.1f} GB",
            "CUDA": torch.version.cuda,
        }
        rows |= _nvidia_smi()
    return [{"what": what, "found": found} for what, found in rows.items()]


def _nvidia_smi():
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}"}
    return dict(zip(fields, done.stdout.strip().split(", ")))


def _random_inputs(grids, batch=1, seed=0, told=False):
    """-> grids, weights, and gradients of the outcome: alive and dead cells, alpha at both ends of the clamp; the last
    is the context. With it nothing lives in the right half, into which the left one can grow."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    states = [draw(batch, CHANNELS, *grid) * 0.5 for grid in grids]
    for state in states:
        state[:, ALPHA] = (state[:, ALPHA] + 0.5).clamp(0.0, 1.0)
        if told:
            state[:, ALPHA, :, state.shape[3] // 2 :] = 0.0
    weights = [draw(*shape) * (0.5 / shape[1] ** 0.5 if len(shape) > 1 else 0.1) for shape in weight_shapes()]
    gradients = [draw(*state.shape) for state in states]
    lengths = (grids[0][0], grids[1][0], grids[0][1]) if told else ()
    context = [draw(1, HIDDEN1, length) for length in lengths]
    return tuple([x.to(device()) for x in tensors] for tensors in (states, weights, gradients, context))


def _rollout(num_steps, **options):
    return lambda mel, linear, weights, context=None: ops.rollout(
        mel, linear, weights, num_steps, context=context, **options
    )


def _reference(num_steps, **options):
    return _rollout(num_steps, backend="reference", **options)


def _ours(num_steps, precision, **options):
    return _rollout(num_steps, precision=precision, backend="triton", **options)


def _values_and_gradients(rollout, inputs, dtype=torch.float32):
    states, weights, gradients, context = inputs
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*states, *weights, *context)]
    split = 2 + len(weights)
    outputs = rollout(*inputs[:2], inputs[2:split], inputs[split:] or None)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(dtype) for g in gradients])]


def parity(size, found):
    """Parity: two steps and every gradient against the reference in float64, relative errors of the norm"""
    cases = [(grids, 1, {}) for grids in size.grids]
    middle = size.grids[len(size.grids) // 2]
    cases += [(middle, 2, {}), (middle, 1, {"life_mask": False}), (middle, 1, {"checkpoint_every": 2})]
    cases += [(size.told, 2, {"growth": True})]  # and with context
    rows = []
    for grids, batch, options in cases:
        inputs = _random_inputs(grids, batch, told="growth" in options)
        plain = _reference(2, **options)
        with tf32(False):
            judge = _values_and_gradients(plain, inputs, torch.float64)
            eager = _values_and_gradients(plain, inputs)
        for precision in size.precisions if options or batch > 1 else triton.PRECISIONS:
            actual = _values_and_gradients(_ours(2, precision, **options), inputs)
            worst, passed = {"values": 0.0, "gradients": 0.0, "PyTorch float32": 0.0}, True
            for name, x, y, expected in zip(NAMES, actual, eager, judge):
                scale = max(_norm(expected), 1e-30)
                error, usual = _norm(x - expected) / scale, _norm(y - expected) / scale
                kind = "gradients" if name.startswith("grad") else "values"
                passed &= error <= (TOLERANCE[precision][kind] if precision in TOLERANCE else 4 * usual + 1e-5)
                worst[kind] = max(worst[kind], error)
                worst["PyTorch float32"] = max(worst["PyTorch float32"], usual)
            shapes = " + ".join("x".join(map(str, grid)) for grid in grids)
            what = ", ".join(f"{name}={value}" for name, value in options.items())
            rows.append(
                {"grids": shapes, "batch": batch, "options": what, "precision": precision, **worst, "passed": passed}
            )
    return rows


def rollouts(size, found):
    """Long rollouts: cells that took another path than in float64 (apart by more than 0.001; tf32 and bf16 by 0.1)"""
    model, grids, _ = size.workload(lively=True).make()
    weights = [w.detach() for w in model.weights]
    exact = [x.double() for x in (*grids, *weights)]
    with torch.no_grad(), tf32(False):
        judge = _reference(size.steps)(*exact[:2], exact[2:])
        outcomes = {"PyTorch float32": _reference(size.steps)(*grids, weights)}
        for precision in triton.PRECISIONS:
            outcomes[precision] = _ours(size.steps, precision)(*grids, weights)
    rows, usual = [], None
    for name, outcome in outcomes.items():
        border = 0.1 if name in TOLERANCE else 1e-3
        apart = [((x - y).abs().amax(1) > border).double().mean().item() for x, y in zip(outcome, judge)]
        usual = usual or apart
        finite = all(grid.isfinite().all().item() for grid in outcome)
        alike = name in TOLERANCE or all(ours <= 2 * theirs + 0.01 for ours, theirs in zip(apart, usual))
        error = max(_norm(x - y) / _norm(y) for x, y in zip(outcome, judge))
        rows.append({"rollout": name, "steps": size.steps, "mel": apart[0], "linear": apart[1], "error": error})
        rows[-1]["passed"] = finite and alike
    return rows


def reproducibility(size, found):
    """Reproducibility: the same bits twice, and with checkpoints"""
    inputs = _random_inputs(((size.bands[0], size.width), (size.bands[1], size.width)))
    rows = []
    for precision in size.precisions:
        first = _values_and_gradients(_ours(2, precision), inputs)
        for what, options in (("again", {}), ("checkpoint_every=2", {"checkpoint_every": 2})):
            second = _values_and_gradients(_ours(2, precision, **options), inputs)
            differing = [name for name, x, y in zip(NAMES, first, second) if not torch.equal(x, y)]
            row = {"precision": precision, "run": what, "differs in": ", ".join(differing) or "nothing"}
            rows.append({**row, "passed": not differing})
    return rows


def launches(size, found):
    """Launches per step, everything counted that runs on the GPU"""
    workload = size.workload()
    few, many = 1, 2  # the first step reads a state without a life mask
    rows = []
    for direction, expected in (("forward", 1), ("training", 3)):
        counts = [_launches(getattr(Model(workload, "triton"), direction)(n)) for n in (few, many)]
        per_step = {name: (counts[1][name] - counts[0][name]) / (many - few) for name in counts[1]}
        per_step = {name: count for name, count in per_step.items() if count}
        total = sum(per_step.values())
        kernels = ", ".join(f"{name} {count:g}" for name, count in per_step.items())
        rows.append({"work": direction, "per step": total, "kernels": kernels, "passed": total == expected})
    return rows


def _launches(work):
    """{kernel: number} of one call, which is not the first."""
    if device() == "cpu":
        from ..compiled.accesses import recorded

        with recorded() as found:
            work()
        names = [launch.kernel for launch in found]
    else:
        work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        names = [e.name for e in profile.events() if e.device_type == on_gpu]
    return Counter(names)


def _captured(work):
    """-> the CUDA graph of one call, and what it returns, which every replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def graphs(size, found):
    """CUDA graphs: a captured rollout and epoch, replayed on other grids, give the bits of the eager ones"""
    _need_gpu()
    rows = []
    for precision in size.precisions:
        for direction, steps in (("forward", size.forward_steps), ("training", size.steps)):
            model = Model(size.workload(), "triton", precision)
            work = getattr(model, direction)(steps)
            graph, result = _captured(work)
            for grid in model.grids:
                grid[:, 2:].mul_(0.5)
            graph.replay()
            replayed = [x.clone() for x in result]
            equal = all(torch.equal(x, y) for x, y in zip(replayed, work(), strict=True))
            rows.append({"precision": precision, "work": direction, "steps": steps, "equal": equal, "passed": equal})
    return rows


def _time_of(work):
    """The seconds and the peak memory of one call."""
    if device() == "cpu":
        started = time.perf_counter()
        work()
        return Turn([time.perf_counter() - started])
    idle = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - idle
    return Turn([begin.elapsed_time(end) / 1e3], memory=peak)


def _timed(works, size):
    """{name: function} -> ({name: quantiles}, {name: why it could not run}), after a call of each to warm it."""
    ready, failed = {}, {}
    for name, work in works.items():
        try:
            work()
            ready[name] = partial(_time_of, work)
        except torch.cuda.OutOfMemoryError:
            failed[name] = "out of memory"
            torch.cuda.empty_cache()
    turns = take_turns(ready, size.budget, size.rounds)
    return {name: summarize(of) for name, of in turns.items()}, failed


def memory(size, found):
    """Memory of an epoch above the idle program's"""
    _need_gpu()
    rows = []
    builds = {"PyTorch eager": partial(Model, backend="reference")}
    for every in (None, 4, 10):
        builds[f"fastnca, checkpoint_every={every}"] = partial(Model, backend="triton", checkpoint_every=every)
    for name, build in builds.items():
        work = build(size.workload()).training(size.steps)
        try:
            work()
            rows.append({"implementation": name, "MB": _time_of(work).memory / 1e6})
        except torch.cuda.OutOfMemoryError:
            rows.append({"implementation": name, "note": "out of memory"})
            torch.cuda.empty_cache()
    return rows


def peaks(size, found):
    """What the card reaches: products of large matrices, and a copy"""
    _need_gpu()
    n = size.matrix
    works = {}
    for precision in triton.PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        works[precision] = partial(tf32(precision == "tf32")(torch.mm), a, b)
    source = torch.empty(size.copied // 4, device="cuda")
    target = torch.empty_like(source)
    works["copy"] = lambda: target.copy_(source)
    rows = []
    for name, result in _timed(works, size)[0].items():
        if name == "copy":
            rows.append({"what": name, "GB/s read and written": 2 * size.copied / result["p50"] / 1e9})
        else:
            rows.append({"what": name, "TFLOP/s": 2 * n**3 / result["p50"] / 1e12})
    return rows


def _shares(row, precision, found, cells_and_steps, flops):
    """Of the measured peaks, where there are any."""
    measured = {peak["what"]: peak for peak in found.get("peaks", {}).get("rows", ())}
    per_second = cells_and_steps / (row["ms"] / 1e3)
    if precision in measured:
        row["of matmul peak"] = per_second * flops / (measured[precision]["TFLOP/s"] * 1e12)
    if "copy" in measured:
        row["of bandwidth"] = per_second * BYTES / (measured["copy"]["GB/s read and written"] * 1e9)
    return row


def _compare(size, found, direction, steps, flops):
    works, precision_of = {}, {}
    workload = size.workload()

    def add(name, precision, work):
        works[name] = tf32(precision == "tf32")(work)
        precision_of[name] = precision

    for precision in ("fp32", "tf32") if device() == "cuda" else ("fp32",):
        add(f"PyTorch eager {precision}", precision, getattr(Model(workload, "reference"), direction)(steps))
        if device() == "cuda":
            add(f"torch.compile {precision}", precision, getattr(Compiled(workload), direction)(steps))
    for precision in size.precisions:
        work = getattr(Model(workload, "triton", precision), direction)(steps)
        add(f"fastnca {precision}", precision, work)
        if device() == "cuda":
            add(f"fastnca {precision}, CUDA graph", precision, _captured(work)[0].replay)
    timed, failed = _timed(works, size)
    rows = []
    first = timed.get("PyTorch eager fp32", {}).get("p50")
    divisor = steps if direction == "forward" else 1
    for name, result in timed.items():
        row = {"implementation": name, "ms": 1e3 * result["p50"] / divisor}
        row |= {key: 1e3 * result[key] / divisor for key in ("p20", "p80")}
        row["eager / this"] = first / result["p50"] if first else None
        if result["memory"] is not None and direction == "training":
            row["MB"] = result["memory"] / 1e6
        cells = workload.cells * (1 if direction == "forward" else steps)
        rows.append(_shares(row, precision_of[name], found, cells, flops))
    return rows + [{"implementation": name, "note": reason} for name, reason in failed.items()]


def forward(size, found):
    """One forward step of both grids"""
    return _compare(size, found, "forward", size.forward_steps, FORWARD_FLOPS)


def training(size, found):
    """One training epoch: a rollout, the mean absolute error, the gradients of all parameters"""
    return _compare(size, found, "training", size.steps, TRAINING_FLOPS)


def scaling(size, found):
    """Scaling: nanoseconds per cell and step over width and batch"""
    rows = []
    variants = [(width, 1) for width in size.widths] + [(size.widths[0], batch) for batch in size.batches[1:]]
    for width, batch in variants:
        row = {"W": width, "batch": batch}
        workload = size.workload(width, batch)
        for direction in ("forward", "training"):
            steps = min(size.forward_steps, max(2, size.forward_steps * size.width // (width * batch)))
            works = {
                f"{direction} {precision}": getattr(Model(workload, "triton", precision), direction)(steps)
                for precision in size.precisions
            }
            timed, failed = _timed(works, size)
            row |= {name: 1e9 * result["p50"] / (workload.cells * steps) for name, result in timed.items()} | failed
        rows.append(row)
    return rows


def _trainer(size, backend, n_frames=None, **options):
    sound = analyze(synthesize_bowed_string(duration=2.0))
    target = sound.with_grids(sound.mel_db[:, :n_frames], sound.linear_db[:, :n_frames])
    return Trainer(
        [target], RECIPES["default"], Budget(epochs=size.epochs), backend=backend, device=device(), **options
    )


def epoch(size, found):
    """One epoch of the trainer on the default recipe, 2 s of sound: the network's kernels and all around them"""
    _need_gpu()
    rows = []
    with tf32(False):
        for backend, precision in (("reference", "fp32"), *(("triton", precision) for precision in triton.PRECISIONS)):
            trainer = _trainer(size, backend, precision=precision)
            for _ in range(20):
                trainer.train_epoch()
            turns = [_time_of(trainer.train_epoch) for _ in range(100)]
            rows.append({"backend": backend, "precision": precision, "ms": 1e3 * summarize(turns)["p50"]})
    return rows


def learning(size, found):
    """The default recipe on the built-in sound: means over the last tenth of the epochs, beside the reference's"""
    rows = []
    with tf32(False):
        for precision in ("reference", *size.learned):
            backend = "reference" if precision == "reference" else "triton"
            options = {} if precision == "reference" else {"precision": precision}
            trainer = _trainer(size, backend, size.frames, **options)
            started = time.perf_counter()
            epochs = [trainer.train_epoch() for _ in range(size.epochs)]
            row = {"run": precision, "epochs": size.epochs, "seconds": time.perf_counter() - started}
            tail = epochs[-max(1, size.epochs // 10) :]
            row |= {key: fmean(e[key] for e in tail) for key in ("loss", "mel_l1_db", "linear_l1_db")}
            row["over the reference's"] = row["loss"] / (rows[0] if rows else row)["loss"]
            rows.append({**row, "passed": row["over the reference's"] < 1.1})
    return rows


SECTIONS = (
    environment,
    parity,
    rollouts,
    reproducibility,
    launches,
    graphs,
    memory,
    peaks,
    forward,
    training,
    scaling,
    epoch,
    learning,
)


def _run(section, size, found):
    """In the sections' process."""
    torch.set_num_threads(1)
    try:
        return {"rows": section(size, found)}
    except NeedsGpu as reason:
        return {"note": str(reason)}
    except Exception:
        return {"error": traceback.format_exc()}


def failures(section):
    """How many rows of a section did not pass; an error counts as one."""
    return int("error" in section) + sum(not row.get("passed", True) for row in section.get("rows", ()))


def passed(results):
    return not any(map(failures, results["sections"].values()))


def _section(section):
    if "error" in section:
        return f"**ERROR**\n\n```\n{section['error'].strip()}\n```"
    if "note" in section:
        return section["note"]
    return table(section["rows"])


def markdown(results):
    verdict = "All checks passed." if passed(results) else "**Some checks failed.**"
    if len(results["sections"]) < len(SECTIONS):
        verdict += " The run is not complete."
    parts = [f"# fastnca on this GPU\n\n`{results['command']}`, {results['seconds'] / 60:.1f} minutes. {verdict}"]
    for section in SECTIONS:
        if section.__name__ in results["sections"]:
            parts.append(f"**{section.__doc__}**\n\n{_section(results['sections'][section.__name__])}")
    return "\n\n".join(parts) + "\n"


def _write(folder, results):
    rows = []
    for name, section in results["sections"].items():
        found = section.get("rows") or [{key: section[key] for key in ("note", "error") if key in section}]
        rows += [{"section": name, **row} for row in found]
    write(folder, "gpu", markdown(results), rows)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for gpu.md and gpu.csv")
    parser.add_argument("--quick", action="store_true", help="tiny grids and few steps")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        raise SystemExit(
            f"benchmarks.speed.gpu: the Triton kernels cannot run here: {reason}. "
            "TRITON_INTERPRET=1 with --quick runs them in Triton's interpreter."
        )
    size = QUICK if options.quick else Size()
    if device() == "cpu":
        if not options.quick:
            parser.error("Triton's interpreter needs --quick")
        size = INTERPRETED
    command = shlex.join(["python", "-m", "benchmarks.speed.gpu", *arguments])
    results = {"command": command, "quick": options.quick, "seconds": 0.0, "sections": {}}
    started = time.monotonic()
    process = None
    for number, section in enumerate(SECTIONS):
        name = section.__name__
        say = partial(print, file=sys.stderr, flush=True)
        say(f"[{time.monotonic() - started:6.0f} s] {number + 1} of {len(SECTIONS)}: {name} ...", end=" ")
        process = process or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            outcome = process.submit(_run, section, size, results["sections"]).result()
        except Exception as error:  # the process is gone
            outcome = {"error": f"{type(error).__name__}: {error}"}
        if "error" in outcome:
            process.shutdown()
            process = None
        outcome["seconds"] = time.monotonic() - started - results["seconds"]
        results["seconds"] = time.monotonic() - started
        results["sections"][name] = outcome
        failing = failures(outcome)
        say("error" if "error" in outcome else outcome.get("note") or (f"{failing} failed" if failing else "done"))
        _write(options.out, results)
    if process:
        process.shutdown()
    print(markdown(results))
    return results


if __name__ == "__main__":
    sys.exit(0 if passed(main()) else 1)

"""The CPU benchmark: ``python -m benchmarks.speed.cpu [SECTION ...]`` prints the README's tables, ``-o`` writes them.

Method. Each implementation (benchmarks/implementations.py) runs in a process of its own, bound to as many processors as
it has threads, so that all have the same and no two thread pools meet. All are compiled and warm before the first
timing, and their results are compared with the reference first: what computes something else is not timed. Within a
table the implementations, and the measurement of the machine's multiply-add peak, take turns, so that a slow minute of
the machine is shared by all; a slow one stops when its time (half a minute) is spent, but every one runs the whole work
at least once. A time is the median of the turns (p50), beside p20 and p80. "Cores" is processor time per second: how
many processors were really kept busy.

A forward step is a rollout's time divided by its steps. An epoch is a rollout of both grids, the mean absolute error
in dB, and the gradients of all parameters. Memory is the peak of the resident memory during the work above that of the
warm, idle process. The share of the peak counts the multiply-adds of the 1x1 convolutions alone, not the stencils; in
training it counts the hidden layers' recomputation.

``--quick`` does all this on small grids for a few steps, to see it run and not to quote it.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import report
from ..implementations import (
    FORWARD_FLOPS,
    IMPLEMENTATIONS,
    RULES,
    TITLES,
    TRAINING_FLOPS,
    Workload,
    flipped_cells,
    relative_difference,
    why_not,
)
from .workers import Worker, summarize, take_turns

OURS = ("cpu-fp32", "cpu-bf16")
# The largest relative difference from the reference, in the norm. bf16 operands have 8 bits, so a forward step errs by
# 2e-4. A gradient sums over all cells and cancels: in the small check (W = 8, four steps) 2.7e-2 of w1's norm is error,
# over the 96 steps of an epoch 6.5e-3.
TOLERANCE = {**dict.fromkeys(IMPLEMENTATIONS, 1e-3), "cpu-bf16": 5e-2}
SMALL_GRIDS = (((80, 513), 8), ((80, 513), 1), ((80, 513), 32), ((16, 16), 16), ((1, 1), 1), ((1, 1), 64))


@dataclass(frozen=True)
class Size:
    """How much work the sections do.

    bands: n_mels and n_linear. width: frames of the main tables, 264 are 3 s of sound. steps: of an epoch.
    forward_steps: of a forward rollout. widths: frames of the scaling tables. rounds: turns of each implementation.
    budget: seconds after which one takes no further turn. repeats: calls of a turn where a call is short.
    """

    bands: tuple = (80, 513)
    width: int = 264
    steps: int = 96
    forward_steps: int = 32
    widths: tuple = (32, 88, 264, 1024, 4096)
    rounds: int = 9
    budget: float = 30.0
    repeats: int = 100


QUICK = Size((8, 24), width=16, steps=4, forward_steps=2, widths=(8, 16), rounds=2, budget=1.0, repeats=5)


def available_bytes():
    """Memory that the system could still give, or None where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def say(message):
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


class Bench:
    """The workers of all implementations, each started when it is first needed.

    size: a Size. threads: of each worker. workload: that of the main tables. names: the implementations that run here,
    in the order of the tables. skipped: {name: why it does not run}.
    """

    def __init__(self, size, threads, names):
        self.size, self.threads = size, threads
        self.workload = Workload(size.width, n_mels=size.bands[0], n_linear=size.bands[1])
        self.stack = ExitStack()
        self.workers = {}
        self.names, self.skipped = list(names), {}
        for name in names:
            if why_not(name):
                self.skip(name, why_not(name))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    @property
    def ours(self):
        return [name for name in OURS if name in self.names]

    def skip(self, name, reason):
        self.names.remove(name)
        self.skipped[name] = reason
        say(f"{TITLES[name]} left out: {reason}")

    def worker(self, name):
        if name not in self.workers:
            self.workers[name] = self.stack.enter_context(Worker(name, self.threads))
        return self.workers[name]

    def prepare(self, task, kind, num_steps, workload):
        """Prepares the work of all implementations; one of the others' that fails is skipped."""
        for name in list(self.names):
            say(f"preparing {task} of {TITLES[name]}")
            try:
                self.worker(name).prepare(task, kind, num_steps, workload)
            except Exception as error:
                # The peers are not ours to mend: their absence is told. Ours must run.
                if name in OURS or name == "eager":
                    raise
                self.skip(name, f"{type(error).__name__}: {error}".splitlines()[0])

    def check_agreement(self, kind):
        """{name: relative difference from the reference}, after a rollout of four steps on a small grid.

        Raises AssertionError for an implementation that does not compute what the reference computes.
        """
        self.prepare("check", kind, 4, replace(self.workload, width=8))
        outputs = {name: self.worker(name).outputs("check") for name in self.names}
        differences = {name: relative_difference(arrays, outputs["eager"]) for name, arrays in outputs.items()}
        for name, difference in differences.items():
            if not difference <= TOLERANCE[name]:
                raise AssertionError(
                    f"{TITLES[name]} does not compute the reference's {kind}: "
                    f"relative difference {difference:.1e}, allowed {TOLERANCE[name]:.0e}"
                )
            self.worker(name).forget()
        return differences

    def check_memory(self, num_steps):
        """Skips what would need more memory than is free, since autograd keeps something for every step.

        The need is measured on fewer steps.
        """
        for name in [name for name in ("eager", "compile") if name in self.names]:
            sizes = []
            for few in (2, 4):
                self.worker(name).prepare("few", "training", few, self.workload)
                sizes.append(self.worker(name).measure("few").memory)
            free = available_bytes()
            if None in (*sizes, free):
                continue
            needed = sizes[0] + (sizes[1] - sizes[0]) / 2 * (num_steps - 2)
            if needed >= 0.97 * free:
                gigabytes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                self.skip(name, f"an epoch of {num_steps} steps needs {gigabytes}")

    def take_turns(self, calls):
        """{label: function} -> {label: [what each of its turns returned]}."""
        return take_turns(calls, self.size.budget, self.size.rounds)

    def time(self, tasks, repeats=1):
        """{label: (implementation, task)} -> {label: summary of its times}."""
        calls = {label: partial(self.worker(name).measure, task, repeats) for label, (name, task) in tasks.items()}
        return {label: summarize(turns) for label, turns in self.take_turns(calls).items()}


# A section takes a Bench and returns rows; a row is a dict with "name" and whatever of COLUMNS it has to tell.


def compare(bench, kind, num_steps, flops):
    """All implementations; flops: per cell and step."""
    differences = bench.check_agreement(kind)
    bench.prepare(kind, kind, num_steps, bench.workload)
    if kind == "training":
        bench.check_memory(num_steps)
    say(f"timing {kind}, {num_steps} steps: {', '.join(bench.names)}")
    calls = {name: partial(bench.worker(name).measure, kind) for name in bench.names}
    for name in bench.ours:
        calls[f"peak of {name}"] = partial(bench.worker("cpu-fp32").peak_flops, name.removeprefix("cpu-"))
    turns = bench.take_turns(calls)
    times = {name: summarize(turns[name]) for name in bench.names}
    rows = []
    for name, result in times.items():
        row = {"name": name, **result, "difference": differences[name]}
        row["gflops"] = flops * bench.workload.cells * num_steps / result["p50"] / 1e9
        if name in OURS:
            row["peak_gflops"] = statistics.median(turns[f"peak of {name}"]) / 1e9
            row["share_of_peak"] = row["gflops"] / row["peak_gflops"]
        row["over_fp32"] = result["p50"] / times["cpu-fp32"]["p50"]
        if "cpu-bf16" in times:
            row["over_bf16"] = result["p50"] / times["cpu-bf16"]["p50"]
        rows.append(row)
    return rows


def forward(bench):
    steps = bench.size.forward_steps
    rows = compare(bench, "forward", steps, FORWARD_FLOPS)
    return [row | {key: row[key] / steps for key in ("p20", "p50", "p80")} for row in rows]


def training(bench):
    return compare(bench, "training", bench.size.steps, TRAINING_FLOPS)


def checkpoints(bench):
    steps = bench.size.steps
    rows = []
    for name in bench.ours:
        worker = bench.worker(name)
        counts = [every for every in (1, 2, 4, 8, 10, 16, 24) if every < steps]
        for every in counts:
            worker.prepare(every, "training", steps, bench.workload, checkpoint_every=every)
        times = bench.time({every: (name, every) for every in counts})
        worker.forget()
        for every, result in times.items():
            rows.append({"name": name, "checkpoint_every": every, **result, "ratio": result["p50"] / times[1]["p50"]})
    return rows


def scale(bench, kind, axis, variants):
    """Times per cell and step of our implementations, beside those of the first variant.

    variants: {value of the axis: (num_steps, Workload, threads or None for all)}.
    """
    rows = []
    for name in bench.ours:
        worker = bench.worker(name)
        for value, (num_steps, workload, threads) in variants.items():
            worker.prepare(value, kind, num_steps, workload, threads=threads)
        times = bench.time({value: (name, value) for value in variants})
        worker.forget()
        first = None
        for value, (num_steps, workload, _) in variants.items():
            row = {"name": name, axis: value, "num_steps": num_steps, **times[value]}
            row["ns"] = 1e9 * row["p50"] / (workload.cells * num_steps)
            first = first or row["ns"]
            row["ratio"] = row["ns"] / first
            if kind == "forward":
                del row["memory"]
            rows.append(row)
    return rows


def widths(bench, kind):
    # Enough steps everywhere that what a call pays once, copies and first touches of memory, weighs as in an epoch, and
    # otherwise about the same number of cells and steps.
    work = bench.size.width * bench.size.forward_steps
    most = bench.size.steps
    variants = {}
    for width in bench.size.widths:
        variants[width] = min(most, max(most // 4, work // width)), replace(bench.workload, width=width), None
    return scale(bench, kind, "width", variants)


def threads(bench, kind):
    counts = [2**n for n in range(bench.threads.bit_length())]
    steps = bench.size.forward_steps
    return scale(bench, kind, "threads", {count: (steps, bench.workload, count) for count in counts})


def batches(bench):
    workload = replace(bench.workload, width=min(bench.size.widths))
    steps = bench.size.forward_steps
    return scale(bench, "forward", "batch", {n: (steps, replace(workload, batch=n), None) for n in (1, 2, 4, 8)})


def steps(bench):
    workload = replace(bench.workload, width=min(bench.size.widths))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 96) if n <= bench.size.steps]
    return scale(bench, "training", "num_steps", {n: (n, workload, None) for n in counts})


def context(bench, kind):
    """What context and growth cost where every cell lives."""
    num_steps = min(bench.size.steps, bench.size.forward_steps)
    return scale(bench, kind, "rule", {rule: (num_steps, replace(bench.workload, rule=rule), None) for rule in RULES})


def calls(bench):
    rows = []
    names = ["eager", *bench.ours]
    for (n_mels, n_linear), frames in SMALL_GRIDS:
        workload = Workload(frames, n_mels=n_mels, n_linear=n_linear)
        for kind in ("forward", "training"):
            for name in names:
                bench.worker(name).prepare("call", kind, 1, workload)
            times = bench.time({name: (name, "call") for name in names}, bench.size.repeats)
            for name, result in times.items():
                row = {"name": name, "shape": f"{n_mels} x {frames} + {n_linear} x {frames}", "kind": kind, **result}
                del row["cores"], row["memory"]
                rows.append(row | {"speedup": times["eager"]["p50"] / result["p50"]})
    return rows


def parity(bench):
    from fastnca import _C

    workload = replace(bench.workload, width=8)
    tasks = {
        "step": ("forward", 1, workload),
        "gradient": ("training", 1, workload),
        "rollout": ("forward", bench.size.steps, replace(workload, lively=True)),
    }

    def outputs(name, **options):
        results = {}
        for task, work in tasks.items():
            bench.worker(name).prepare(task, *work, **options)
            results[task] = [torch.from_numpy(array).double() for array in bench.worker(name).outputs(task)]
        bench.worker(name).forget()
        return results

    expected = outputs("eager", double=True)
    found = [("eager", None, outputs("eager"))]
    best = _C.capability()
    for name in bench.ours:
        for capability in _C.capabilities():
            if name != "cpu-bf16" or capability.endswith("bf16"):
                bench.worker(name).use(capability)
                found.append((name, capability, outputs(name)))
        bench.worker(name).use(best)
    rows = []
    for name, capability, results in found:
        row = {"name": name, "capability": capability}
        for task in ("step", "gradient"):
            pairs = zip(results[task], expected[task], strict=True)
            row[f"{task}_error"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        row["flipped"], row["rollout_error"] = flipped_cells(results["rollout"], expected["rollout"])
        rows.append(row)
    return rows


# name: (title, function)
SECTIONS = {
    "forward": ("One forward step of both grids", forward),
    "training": ("One training epoch", training),
    "checkpoints": ("Training with checkpoint_every", checkpoints),
    "widths": ("Forward: time per cell and step over the width", partial(widths, kind="forward")),
    "training_widths": ("Training: time per cell and step over the width", partial(widths, kind="training")),
    "threads": ("Forward: threads", partial(threads, kind="forward")),
    "training_threads": ("Training: threads", partial(threads, kind="training")),
    "batches": ("Forward: batch size", batches),
    "steps": ("Training: number of steps", steps),
    "context": ("Forward: what context and growth cost where every cell lives", partial(context, kind="forward")),
    "training_context": ("Training: what context and growth cost", partial(context, kind="training")),
    "calls": ("Small grids: one step, called from Python", calls),
    "parity": (
        "Largest errors against float64: of one step and its gradients, and of an epoch's steps of a lively automaton",
        parity,
    ),
}

# key: (title, form)
COLUMNS = {
    "name": ("", TITLES.get),
    "shape": ("grids", None),
    "kind": ("work", None),
    "width": ("W", None),
    "threads": ("threads", None),
    "batch": ("batch", None),
    "rule": ("rule", None),
    "num_steps": ("steps", None),
    "checkpoint_every": ("checkpoint_every", None),
    "capability": ("instruction set", None),
    "step_error": ("step", "{:.1e}"),
    "gradient_error": ("gradient", "{:.1e}"),
    "flipped": ("flipped cells", "{:.2%}"),
    "rollout_error": ("the others' error", "{:.1e}"),
    "p50": ("p50", report.duration),
    "p20": ("p20", report.duration),
    "p80": ("p80", report.duration),
    "count": ("calls", None),
    "cores": ("cores", "{:.2f}"),
    "ns": ("ns per cell and step", "{:.2f}"),
    "ratio": ("time, relative", "{:.2f}"),
    "gflops": ("GFLOP/s", "{:.0f}"),
    "peak_gflops": ("peak", "{:.0f}"),
    "share_of_peak": ("of peak", "{:.0%}"),
    "memory": ("memory above idle", lambda size: f"{size / 1e9:.2f} GB"),
    "over_fp32": ("over fp32", "{:.2f}x"),
    "over_bf16": ("over bf16", "{:.2f}x"),
    "speedup": ("eager / this", "{:.2f}"),
    "difference": ("difference", "{:.0e}"),
}


def markdown(about, skipped, sections):
    """about: what was run, where and how. skipped: {name: why}. sections: {name: rows}."""
    parts = [about, *(f"{TITLES[name]} left out: {reason}." for name, reason in skipped.items())]
    parts += [f"**{SECTIONS[name][0]}**\n\n{report.table(rows, COLUMNS)}" for name, rows in sections.items()]
    return "\n\n".join(parts) + "\n"


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder for cpu.md and cpu.csv")
    parser.add_argument("--quick", action="store_true", help="small grids and few steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help="those to measure; eager and cpu-fp32 always are, because all are compared with them",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    if not 1 <= options.threads <= report.processors():
        parser.error(f"threads must be within 1..{report.processors()}, the processors of this process")
    if why_not("cpu-fp32"):
        parser.error(why_not("cpu-fp32"))
    wanted = ("eager", "cpu-fp32", *options.implementations)
    options.implementations = [name for name in IMPLEMENTATIONS if name in wanted]
    options.size = QUICK if options.quick else Size()
    return options


def main(arguments=None):
    """Runs the sections -> {section: rows}."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    started, load = time.monotonic(), os.getloadavg()[0]
    facts = report.machine_line(report.machine())
    sections = {}
    with Bench(options.size, options.threads, options.implementations) as bench:
        for name in options.sections or SECTIONS:
            say(f"section {name}")
            sections[name] = SECTIONS[name][1](bench)
            about = (
                f"{facts}; load {load:.1f} before the run. W = {bench.size.width}, {bench.threads} threads, epochs of "
                f"{bench.size.steps} steps. `{' '.join(['python -m benchmarks.speed.cpu', *arguments])}`, "
                f"{(time.monotonic() - started) / 60:.0f} minutes."
            )
            text = markdown(about, bench.skipped, sections)
            if options.out:
                # An interrupted run leaves what it has.
                rows = [{"section": name, **row} for name, rows in sections.items() for row in rows]
                report.write(options.out, "cpu", text, rows)
    print(text)
    return sections


if __name__ == "__main__":
    main()

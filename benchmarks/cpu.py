"""The CPU benchmark: ``python -m benchmarks.cpu [SECTION ...]`` prints the README's tables and writes them with ``-o``.

Method. Each implementation (benchmarks/implementations.py) runs in a process of its own, bound to as many processors as
it has threads, so that all have the same and no two thread pools meet. All are compiled and warm before the first
timing, and their results are compared with the reference first: what computes something else is not timed. Within a
table the implementations, and the measurement of the machine's multiply-add peak, take turns, so that all see the same
moods of the machine; a slow one stops when its time (``--budget``) is spent, but every one runs the whole work at least
once. A time is the median of the turns (p50), beside p20 and p80. "Cores" is processor time per second: what was
really used.

A forward step is a rollout's time divided by its steps. An epoch is a rollout of both grids, the mean absolute error
in dB, and the gradients of all parameters. Memory is the peak of the resident memory during the work above that of the
warm, idle process. The share of the peak counts the multiply-adds of the 1x1 convolutions alone, not the stencils; in
training it counts the hidden layers' recomputation.

``--quick`` does all this on small grids for a few steps: to see it run, not to quote.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastnca

from . import implementations
from .implementations import IMPLEMENTATIONS, TITLES
from .workers import Worker, WorkerFailed, interleave

FORWARD_FLOPS = 2 * (64 * 128 + 128 * 64 + 64 * 16)  # per cell and step
# Forward, the hidden layers again, the gradients of activations and of weights.
TRAINING_FLOPS = 3 * FORWARD_FLOPS + 2 * (64 * 128 + 128 * 64)
OURS = ("cpu-fp32", "cpu-bf16")
PEAK = {name: name.replace("cpu", "peak") for name in OURS}
# Of the norm. bf16 operands have 8 bits: a forward step errs by 2e-4. A gradient sums over all cells and cancels:
# in the small check (W = 8, four steps) 2.7e-2 of w1's norm is error, over the 96 steps of an epoch 6.5e-3.
DEFAULT_TOLERANCE = 1e-3
TOLERANCE = {"cpu-bf16": 5e-2}
# Of the largest value: a cell that is further off has taken another path.
FLIP = 1e-3


def machine():
    """One line on the hardware, and the versions and the commit that ran on it."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = {"fastnca": fastnca.__version__}
    for name in ("torch", "jax", "jaxlib", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "machine": f"{model}, {processors} processors, {memory:.0f} GB, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
        "capability": None if fastnca.backends.why_not("cpu") else fastnca._cpu.capability(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit():
    def git(*arguments):
        root = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def available_bytes():
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


class Bench:
    """Workers by implementation and thread count, started when first needed; messages go to stderr."""

    def __init__(self, options):
        self.options = options
        self.stack = ExitStack()
        self.workers = {}
        self.skipped = {}
        for name in IMPLEMENTATIONS:
            if name not in options.implementations:
                continue
            reason = implementations.why_not(name)
            if reason:
                self.skip(name, reason)
        self.names = [n for n in IMPLEMENTATIONS if n in options.implementations and n not in self.skipped]

    def skip(self, name, reason):
        self.skipped[name] = reason
        self.say(f"{TITLES[name]} left out: {reason}")

    def say(self, message):
        print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def worker(self, name):
        if name not in self.workers:
            self.workers[name] = self.stack.enter_context(Worker(name, self.options.threads))
        return self.workers[name]

    def ours(self):
        return [name for name in OURS if name in self.names]

    def problem(self, width=None, batch=1):
        return {"width": width or self.options.width, "batch": batch, **self.options.bands}

    def cells(self):
        return implementations.Problem(**self.problem()).cells

    def prepare(self, names, task, kind, num_steps, **arguments):
        arguments.setdefault("problem", self.problem())
        prepared = []
        for name in list(names):
            self.say(f"preparing {task} of {TITLES[name]}")
            try:
                self.worker(name).prepare(task, kind, num_steps, **arguments)
            except WorkerFailed as failure:
                # The peers are not ours to mend: their absence is told. Ours must run.
                if name in OURS or name == "eager":
                    raise
                self.skip(name, str(failure).strip().splitlines()[-1])
                self.names.remove(name)
                continue
            prepared.append(name)
        return prepared

    def check_agreement(self, kind):
        """All must compute what the reference computes, in a rollout of four steps on a small grid."""
        prepared = self.prepare(self.names, "check", kind, 4, problem=self.problem(width=8))
        outputs = {name: self.worker(name).outputs("check") for name in prepared}
        differences = {}
        for name, arrays in outputs.items():
            for mine, expected in zip(arrays, outputs["eager"], strict=True):
                mine, expected = (torch.from_numpy(array.copy()).double() for array in (mine, expected))
                difference = float((mine - expected).norm() / expected.norm())
                differences[name] = max(difference, differences.get(name, 0.0))
            allowed = TOLERANCE.get(name, DEFAULT_TOLERANCE)
            if not differences[name] <= allowed:
                raise AssertionError(
                    f"{TITLES[name]} does not compute the reference's {kind}: "
                    f"relative difference {differences[name]:.1e}, allowed {allowed:.0e}"
                )
            self.worker(name).forget_all()
        return differences

    def fits(self, name, kind, num_steps):
        """Whether the memory that autograd keeps for every step is free, as measured on fewer steps."""
        if kind == "forward" or name not in ("eager", "compile"):
            return True
        sizes = []
        for few in (2, 4):
            self.worker(name).prepare("few", kind, few, problem=self.problem())
            sizes.append(self.worker(name).call("few")["bytes"])
        free = available_bytes()
        if None in (*sizes, free):
            return True
        needed = sizes[0] + (sizes[1] - sizes[0]) / 2 * (num_steps - 2)
        if needed < 0.97 * free:
            return True
        self.skip(name, f"an epoch of {num_steps} steps needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        return False

    def peaks(self):
        """Measurements of the multiply-add peak as further calls for interleave."""
        worker = self.worker("cpu-fp32")

        def measure(precision):
            flops = worker.peak(self.options.threads, precision)
            return {"seconds": [1.0 / flops], "cores": float(self.options.threads), "bytes": None}

        return {PEAK[name]: lambda name=name: measure(name.removeprefix("cpu-")) for name in self.ours()}

    def time(self, tasks, rounds=None, with_peak=False, repeats=1):
        """tasks: {label: (implementation, task)} -> interleave's summary."""
        calls = {
            label: lambda name=name, task=task: self.worker(name).call(task, repeats)
            for label, (name, task) in tasks.items()
        }
        calls |= self.peaks() if with_peak else {}
        return interleave(calls, self.options.budget, rounds or self.options.rounds)


# A section returns rows; a row is a dict with "name" and whatever of COLUMNS it has to tell.


def _compare(bench, kind, num_steps, flops_per_cell):
    differences = bench.check_agreement(kind)
    names = bench.prepare(bench.names, kind, kind, num_steps)
    names = [name for name in names if bench.fits(name, kind, num_steps)]
    bench.say(f"timing {kind}, {num_steps} steps: {', '.join(names)}")
    results = bench.time({name: (name, kind) for name in names}, with_peak=True)
    flops = flops_per_cell * bench.cells() * num_steps
    rows = []
    for name in names:
        row = {
            "name": name,
            **results[name],
            "difference": differences[name],
            "gflops": flops / results[name]["p50"] / 1e9,
        }
        row |= {f"times_{ours}": results[name]["p50"] / results[ours]["p50"] for ours in OURS if ours in names}
        peak = results.get(PEAK.get(name))
        if peak:
            row["peak_gflops"] = 1e-9 / peak["p50"]
            row["share"] = row["gflops"] / row["peak_gflops"]
        rows.append(row)
    return rows


def forward(bench):
    """One forward step of both grids"""
    steps = bench.options.forward_steps
    rows = _compare(bench, "forward", steps, FORWARD_FLOPS)
    return [row | {key: row[key] / steps for key in ("p20", "p50", "p80")} for row in rows]


def training(bench):
    """One training epoch"""
    return _compare(bench, "training", bench.options.steps, TRAINING_FLOPS)


def checkpoints(bench):
    """Training with checkpoint_every"""
    steps = bench.options.steps
    rows = []
    for name in bench.ours():
        tasks = {}
        for every in (None, 2, 4, 8, 10, 16, 24):
            if every is None or every < steps:
                bench.worker(name).prepare(
                    every, "training", steps, problem=bench.problem(), options={"checkpoint_every": every}
                )
                tasks[every] = (name, every)
        results = bench.time(tasks)
        bench.worker(name).forget_all()
        for every, result in results.items():
            rows.append(
                {"name": name, "checkpoint_every": every or 1, **result, "ratio": result["p50"] / results[None]["p50"]}
            )
    return rows


def _scaling(bench, kind, axis, variants):
    """variants: [(value of the axis, num_steps, arguments of prepare)]; times per cell and step."""
    rows = []
    for name in bench.ours():
        sizes, num_steps = {}, {}
        for value, count, arguments in variants:
            bench.worker(name).prepare(value, kind, count, **{"problem": bench.problem(), **arguments})
            problem = arguments.get("problem", bench.problem())
            sizes[value] = implementations.Problem(**problem).cells * count
            num_steps[value] = count
        results = bench.time({value: (name, value) for value in sizes})
        first = next(iter(sizes))
        for value, result in results.items():
            nanoseconds = 1e9 * result["p50"] / sizes[value]
            base = 1e9 * results[first]["p50"] / sizes[first]
            row = {"name": name, axis: value, "num_steps": num_steps[value], **result, "ns": nanoseconds}
            rows.append(row | {"ratio": nanoseconds / base})
        bench.worker(name).forget_all()
    return rows


def widths(bench, kind="forward"):
    """Forward: time per cell and step over the width"""
    # Enough steps everywhere that what a call pays once, copies and first touches of memory, weighs as in an epoch, and
    # otherwise about the same number of cells and steps.
    work = bench.options.width * bench.options.forward_steps
    most = bench.options.steps
    return _scaling(
        bench,
        kind,
        "width",
        [
            (width, min(most, max(most // 4, work // width)), {"problem": bench.problem(width)})
            for width in bench.options.widths
        ],
    )


def training_widths(bench):
    """Training: time per cell and step over the width"""
    return widths(bench, "training")


def threads(bench, kind="forward"):
    """Forward: threads"""
    counts = [1]
    while 2 * counts[-1] <= bench.options.threads:
        counts.append(2 * counts[-1])
    return _scaling(bench, kind, "threads", [(n, bench.options.forward_steps, {"threads": n}) for n in counts])


def training_threads(bench):
    """Training: threads"""
    return threads(bench, "training")


def batches(bench):
    """Forward: batch size"""
    width = min(bench.options.widths)
    steps = bench.options.forward_steps
    return _scaling(
        bench, "forward", "batch", [(n, steps, {"problem": bench.problem(width, batch=n)}) for n in (1, 2, 4, 8)]
    )


def steps(bench):
    """Training: number of steps"""
    problem = bench.problem(min(bench.options.widths))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 96) if n <= bench.options.steps]
    return _scaling(bench, "training", "num_steps", [(n, n, {"problem": problem}) for n in counts])


def calls(bench):
    """Small grids: one step, called from Python"""
    rows = []
    names = [name for name in ("eager", *bench.ours()) if name in bench.names]
    for bands, frames in (((80, 513), 8), ((80, 513), 1), ((80, 513), 32), ((16, 16), 16), ((1, 1), 1), ((1, 1), 64)):
        shape = f"{bands[0]} x {frames} + {bands[1]} x {frames}"
        problem = {"width": frames, "batch": 1, "n_mels": bands[0], "n_linear": bands[1]}
        for kind in ("forward", "training"):
            for name in names:
                bench.worker(name).prepare("call", kind, 1, problem=problem)
            results = bench.time({name: (name, "call") for name in names}, repeats=bench.options.repeats)
            for name in names:
                row = {"name": name, "shape": shape, "kind": kind, **results[name]}
                rows.append(row | {"speedup": results["eager"]["p50"] / results[name]["p50"]})
    return rows


def parity(bench):
    """Largest errors against float64: of one step and its gradients, and of an epoch's steps of a lively automaton"""
    steps = bench.options.steps
    problem = bench.problem(width=8)
    tasks = {
        "step": ("forward", 1, problem),
        "gradient": ("training", 1, problem),
        "rollout": ("forward", steps, problem | {"lively": True}),
    }

    def outputs(name, **options):
        results = {}
        for task, (kind, num_steps, of) in tasks.items():
            bench.worker(name).prepare(task, kind, num_steps, problem=of, options=options)
            results[task] = [torch.from_numpy(array.copy()).double() for array in bench.worker(name).outputs(task)]
        bench.worker(name).forget_all()
        return results

    judge = outputs("eager", double=True)
    found = [("eager", None, outputs("eager"))]
    for name in bench.ours():
        for capability in fastnca._cpu._C.capabilities():
            if name == "cpu-bf16" and not capability.endswith("bf16"):
                continue
            bench.worker(name).use(capability)
            found.append((name, capability, outputs(name)))
        bench.worker(name).use(fastnca._cpu.capability())
    rows = []
    for name, capability, results in found:
        row = {"name": name, "capability": capability}
        for task in ("step", "gradient"):
            pairs = zip(results[task], judge[task], strict=True)
            row[f"{task}_error"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        cells = [(x - y).abs().amax(1).flatten() for x, y in zip(results["rollout"], judge["rollout"], strict=True)]
        cells = torch.cat(cells) / max(float(y.abs().max()) for y in judge["rollout"])
        flipped = cells > FLIP
        rows.append(row | {"flips": float(flipped.double().mean()), "rollout_error": float(cells[~flipped].max())})
    return rows


SECTIONS = {
    section.__name__: section
    for section in (
        forward,
        training,
        checkpoints,
        widths,
        training_widths,
        threads,
        training_threads,
        batches,
        steps,
        calls,
        parity,
    )
}


def _time(seconds):
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 0.0)) if seconds >= s)
    return f"{seconds / (scale or 1e-6):.3g} {unit}"


def _number(digits):
    return lambda value: f"{value:.{digits}f}"


def _digit(value):
    return f"{value:.0e}"


def _error(value):
    return f"{value:.1e}"


# key: (title, format)
COLUMNS = {
    "name": ("", lambda name: TITLES[name]),
    "shape": ("grids", str),
    "kind": ("work", str),
    "width": ("W", str),
    "threads": ("threads", str),
    "batch": ("batch", str),
    "num_steps": ("steps", str),
    "checkpoint_every": ("checkpoint_every", str),
    "capability": ("instruction set", str),
    "step_error": ("step", _error),
    "gradient_error": ("gradient", _error),
    "flips": ("flipped cells", lambda value: f"{value:.2%}"),
    "rollout_error": ("the others' error", _error),
    "p50": ("p50", _time),
    "p20": ("p20", _time),
    "p80": ("p80", _time),
    "count": ("calls", str),
    "cores": ("cores", _number(2)),
    "ns": ("ns per cell and step", _number(2)),
    "ratio": ("time, relative", _number(2)),
    "gflops": ("GFLOP/s", _number(0)),
    "peak_gflops": ("peak", _number(0)),
    "share": ("of peak", lambda value: f"{value:.0%}"),
    "bytes": ("memory above idle", lambda value: f"{value / 1e9:.2f} GB"),
    "times_cpu-fp32": ("over fp32", lambda value: f"{value:.2f}x"),
    "times_cpu-bf16": ("over bf16", lambda value: f"{value:.2f}x"),
    "speedup": ("eager / this", _number(2)),
    "difference": ("difference", _digit),
}
HIDDEN = {"calls": ("bytes", "cores", "p20", "p80"), "threads": ("bytes",), "widths": ("bytes",), "batches": ("bytes",)}


def table(section, rows):
    """Rows as a Markdown table of the columns that any of them has."""
    keys = [
        key for key in COLUMNS if any(row.get(key) is not None for row in rows) and key not in HIDDEN.get(section, ())
    ]
    lines = [[COLUMNS[key][0] for key in keys], ["---"] + ["---:"] * (len(keys) - 1)]
    for row in rows:
        lines.append([COLUMNS[key][1](row[key]) if row.get(key) is not None else "" for key in keys])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results):
    about = results["about"]
    packages = ", ".join(f"{name} {found}" for name, found in about["packages"].items() if found)
    options = results["options"]
    parts = [
        f"{about['machine']}; {about['capability']} kernels; {packages}, Python {about['python']}; "
        f"commit {about['commit']}, {about['date']}; load {about['load']:.1f} before the run. "
        f"W = {options['width']}, {options['threads']} threads, epochs of {options['steps']} steps. "
        f"`{results['command']}`, {results['seconds'] / 60:.0f} minutes."
    ]
    parts += [f"{TITLES[name]} left out: {reason}." for name, reason in results["skipped"].items()]
    for section, rows in results["sections"].items():
        parts.append(f"**{SECTIONS[section].__doc__}**\n\n{table(section, rows)}")
    return "\n\n".join(parts) + "\n"


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("-o", "--out", type=Path, help="folder for cpu.md and cpu.json")
    parser.add_argument("--quick", action="store_true", help="small grids and few steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, help="frames of the main tables (264: 3 s of sound)")
    parser.add_argument("--steps", type=int, help="of an epoch (96)")
    parser.add_argument("--forward-steps", type=int, help="of a forward rollout (32)")
    parser.add_argument("--widths", type=int, nargs="+", help="of the scaling tables")
    parser.add_argument("--rounds", type=int, help="turns of each implementation (9)")
    parser.add_argument("--budget", type=float, help="seconds after which one takes no further turn (30)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not 1 <= options.threads <= processors:
        parser.error(f"threads must be within 1..{processors}, the processors of this process")
    if options.quick:
        defaults = {"width": 16, "steps": 4, "forward_steps": 2, "widths": [8, 16], "rounds": 2, "budget": 1.0}
        options.bands, options.repeats = {"n_mels": 8, "n_linear": 24}, 5
    else:
        defaults = {
            "width": 264,
            "steps": 96,
            "forward_steps": 32,
            "widths": [32, 88, 264, 1024, 4096],
            "rounds": 9,
            "budget": 30.0,
        }
        options.bands, options.repeats = {"n_mels": 80, "n_linear": 513}, 100
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    # Everything is compared with these two.
    options.implementations = [
        name for name in IMPLEMENTATIONS if name in (*options.implementations, "eager", "cpu-fp32")
    ]
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    started = time.monotonic()
    results = {"command": " ".join(["python -m benchmarks.cpu", *arguments]), "about": machine(), "sections": {}}
    results["options"] = {key: value for key, value in vars(options).items() if key != "out"}
    with Bench(options) as bench:
        if "cpu-fp32" in bench.skipped:
            raise SystemExit(f"benchmarks.cpu: {bench.skipped['cpu-fp32']}")
        for name in options.sections or SECTIONS:
            bench.say(f"section {name}")
            results["sections"][name] = SECTIONS[name](bench)
            results["skipped"] = bench.skipped
            results["seconds"] = time.monotonic() - started
            if options.out:
                # After each section, so that an interrupted run leaves what it has.
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "cpu.json").write_text(json.dumps(results, indent=2) + "\n")
                (options.out / "cpu.md").write_text(markdown(results))
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()

"""Warm processes that run one implementation each, so that thread pools do not meet and memory can be told apart.

A worker binds itself to as many processors as it may use threads, before any library starts its own: the one way
that holds for every library. Calls come from the parent one at a time; the others sleep meanwhile.
"""

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
import traceback


def resident_bytes(peak=False):
    """Resident memory of this process, now or at its peak since :func:`reset_peak`; None where /proc has no answer."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def reset_peak():
    """Frees what can be freed and starts a new peak -> resident bytes, or None where the system cannot do it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    return resident_bytes()


class _Server:
    def __init__(self, name, threads):
        self.name = name
        self.threads = threads
        self.tasks = {}
        self.built = {}

    def prepare(self, task, kind, num_steps, problem, options=None, threads=None, warm_steps=2):
        """Builds, compiles and runs the work once, or a rollout of ``warm_steps`` steps where that warms as well."""
        import torch

        from . import implementations

        threads = threads or self.threads
        torch.set_num_threads(threads)
        key = repr((problem, options))
        if key not in self.built:
            self.built[key] = implementations.build(self.name, implementations.Problem(**problem), **(options or {}))
        implementation = self.built[key]
        work = getattr(implementation, kind)
        short = work(min(warm_steps, num_steps))
        for _ in range(2):
            short()
        self.tasks[task] = threads, work(num_steps), implementation

    def call(self, task, repeats=1):
        """-> {"seconds": [of each call], "cores": processor seconds per second, "bytes": peak above idle or None}."""
        import torch

        threads, work, _ = self.tasks[task]
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        idle = reset_peak()
        seconds, processor = [], time.process_time()
        for _ in range(repeats):
            started = time.perf_counter()
            result = work()
            seconds.append(time.perf_counter() - started)
            del result
        processor = time.process_time() - processor
        peak = None if idle is None else resident_bytes(peak=True)
        return {
            "seconds": seconds,
            "cores": processor / sum(seconds),
            "bytes": None if peak is None else max(0, peak - idle),
        }

    def peak(self, threads, precision):
        """The measured multiply-add peak of the active kernels' instruction set in FLOP/s."""
        from fastnca import _cpu

        return _cpu._C.peak_flops(threads, *([True] if precision == "bf16" else []))

    def use(self, capability):
        """Another instruction set for the kernels from now on; '' for the best."""
        from fastnca import _cpu

        _cpu._C.set_capability(capability)

    def outputs(self, task):
        _, work, implementation = self.tasks[task]
        return implementation.outputs(work())

    def forget_all(self):
        self.tasks = {}
        self.built = {}
        reset_peak()


def _serve(name, threads, connection):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    server = _Server(name, threads)
    while True:
        try:
            method, arguments, keywords = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(server, method)(*arguments, **keywords)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class WorkerFailed(RuntimeError):
    """A worker raised, or its process ended (out of memory, an illegal instruction)."""


class Worker:
    """The parent's end: ``worker.prepare(...)``, ``worker.call(...)`` and so on run in the process."""

    def __init__(self, name, threads):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)

        def remote(*arguments, **keywords):
            try:
                self._connection.send((method, arguments, keywords))
                succeeded, result = self._connection.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                self._process.join(5)
                raise WorkerFailed(f"{self.name}: its process ended with code {self._process.exitcode}") from None
            if not succeeded:
                raise WorkerFailed(f"{self.name}: {result}")
            return result

        return remote

    def close(self):
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def quantiles(samples):
    """{"p20", "p50", "p80", "count"} of a list of numbers."""
    samples = sorted(samples)
    cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"p20": cuts[1], "p50": statistics.median(samples), "p80": cuts[7], "count": len(samples)}


def interleave(calls, budget, rounds):
    """Calls each function in turn, so that all see the same moods of the machine.

    calls: {name: function -> result with "seconds", "cores", "bytes"}. A function gets ``rounds`` turns, but no further
    one after ``budget`` seconds; the first turn is always taken.

    -> {name: {"p20", "p50", "p80", "count", "cores", "bytes"}}, seconds of one call.
    """
    results = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if results[name] and spent[name] >= budget:
                continue
            result = call()
            spent[name] += sum(result["seconds"])
            results[name].append(result)
    summary = {}
    for name, turns in results.items():
        seconds = [s for turn in turns for s in turn["seconds"]]
        sizes = [turn["bytes"] for turn in turns if turn.get("bytes") is not None]
        summary[name] = {
            **quantiles(seconds),
            "cores": statistics.median(turn["cores"] for turn in turns),
            "bytes": max(sizes, default=None),
        }
    return summary

"""Warm processes that run one implementation each, so that thread pools do not meet and memory can be told apart.

A worker binds itself to as many processors as it may use threads, which is the one way that holds for every library.
It works on one call at a time, and the others sleep meanwhile.
"""

import ctypes
import gc
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

from ..report import quantiles


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


@dataclass(frozen=True)
class Turn:
    """What one turn of an implementation measured.

    seconds: of each call. cores: processor seconds per second, or None where it is not known. memory: bytes at the peak
    above those of the idle process, or None.
    """

    seconds: list
    cores: float | None = None
    memory: int | None = None


def take_turns(calls, budget, rounds):
    """Calls each function in turn, so that a slow minute of the machine is shared by all.

    calls: {name: function}. A function gets ``rounds`` turns, but no further one after ``budget`` seconds; the first
    turn is always taken. -> {name: [what each of its turns returned]}
    """
    results = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if results[name] and spent[name] >= budget:
                continue
            started = time.perf_counter()
            results[name].append(call())
            spent[name] += time.perf_counter() - started
    return results


def summarize(turns):
    """{"p20", "p50", "p80" (seconds of one call), "count", "cores", "memory" (bytes)} of a list of Turns."""
    cores = [turn.cores for turn in turns if turn.cores is not None]
    memory = [turn.memory for turn in turns if turn.memory is not None]
    return {
        **quantiles([seconds for turn in turns for seconds in turn.seconds]),
        "cores": statistics.median(cores) if cores else None,
        "memory": max(memory, default=None),
    }


class Worker:
    """A process that runs one implementation with a number of threads; its methods return when the process is done.

    They raise what is raised there, and BrokenProcessPool where the process ends (out of memory, an illegal
    instruction).
    """

    def __init__(self, name, threads):
        self.name = name
        self.threads = threads
        self._process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_bind, initargs=(threads,))

    def _run(self, function, *arguments):
        return self._process.submit(function, *arguments).result()

    def prepare(self, task, kind, num_steps, workload, *, threads=None, **options):
        """Builds and compiles work of a kind, "forward" or "training", and warms it by two calls of up to two steps.

        task: how later calls name it. options: of the implementation.
        """
        self._run(_prepare, task, self.name, kind, num_steps, workload, threads or self.threads, options)

    def measure(self, task, repeats=1):
        """-> the Turn of that many calls."""
        return self._run(_measure, task, repeats)

    def outputs(self, task):
        """-> the arrays that the work returns."""
        return self._run(_outputs, task)

    def forget(self):
        """Gives back the memory of all tasks."""
        self._run(_forget)

    def peak_flops(self, precision):
        """-> the measured multiply-add peak of the CPU kernels' instruction set in FLOP/s."""
        return self._run(_peak_flops, self.threads, precision)

    def use(self, capability):
        """Takes another instruction set for the CPU kernels from now on."""
        self._run(_use, capability)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.shutdown()


# What follows runs in the worker's process.

_tasks = {}  # task: (threads, work, implementation)


def _bind(threads):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


@cache
def _build(name, workload, options):
    from ..implementations import build

    return build(name, workload, **dict(options))


def _prepare(task, name, kind, num_steps, workload, threads, options):
    import torch

    torch.set_num_threads(threads)
    implementation = _build(name, workload, tuple(options.items()))
    work = getattr(implementation, kind)
    short = work(min(2, num_steps))
    for _ in range(2):
        short()
    _tasks[task] = threads, work(num_steps), implementation


def _measure(task, repeats):
    import torch

    threads, work, _ = _tasks[task]
    torch.set_num_threads(threads)
    idle = reset_peak()
    seconds, processor = [], time.process_time()
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
        del result
    cores = (time.process_time() - processor) / sum(seconds)
    peak = None if idle is None else resident_bytes(peak=True)
    return Turn(seconds, cores, None if peak is None else max(0, peak - idle))


def _outputs(task):
    _, work, implementation = _tasks[task]
    return implementation.outputs(work())


def _forget():
    _tasks.clear()
    _build.cache_clear()
    reset_peak()


def _peak_flops(threads, precision):
    from fastnca import _C

    return _C.peak_flops(threads, precision == "bf16")


def _use(capability):
    from fastnca import _C

    _C.set_capability(capability)

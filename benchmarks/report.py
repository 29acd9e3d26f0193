"""What all benchmarks share: the line on the machine, quantiles, Markdown tables, and how results are written.

A row is a dict of what there is to tell; its keys are the columns of the CSV file.
"""

import csv
import io
import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastnca
from fastnca.automaton import backends, cpu
from fastnca.files import atomic_write


def processors():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine():
    """Where and by what figures were measured, as text: {"machine", "capability", "versions", "commit", "date"}.

    The capability is the CPU kernels' instruction set. A commit with uncommitted changes is "... with changes".
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"fastnca {fastnca.__version__}"]
    for name in ("torch", "triton", "jax", "jaxlib", "numpy"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "machine": f"{_processor()}, {processors()} processors, {memory:.0f} GB, {platform.system()} "
        + platform.release(),
        "capability": "no" if backends.why_not("cpu") else cpu.capability(),
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line(facts):
    """What :func:`machine` found, as one line."""
    return "{machine}; {capability} kernels; {versions}; commit {commit}, {date}".format(**facts)


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit():
    def git(*arguments):
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def quantiles(samples):
    """{"p20", "p50", "p80", "count"} of a list of numbers."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else list(samples) * 9
    return {"p20": cuts[1], "p50": statistics.median(samples), "p80": cuts[7], "count": len(samples)}


def duration(seconds):
    """Seconds with three digits and a unit that suits them."""
    unit, scale = next((unit, scale) for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 0)) if seconds >= scale)
    return f"{seconds / (scale or 1e-6):.3g} {unit}"


def cell(value, form=None):
    """A value as a table shows it. form: "{:.2f} GB", a function, or None for what suits the value's type."""
    if value is None:
        return ""
    if form is not None:
        return form(value) if callable(form) else form.format(value)
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows, columns=None):
    """Rows as a Markdown table of those columns that any of them has.

    columns: {key: (title, form)}, see :func:`cell`; by default every key under its own name.
    """
    if columns is None:
        columns = {key: (key, None) for row in rows for key in row}
    columns = {key: of for key, of in columns.items() if any(row.get(key) is not None for row in rows)}
    lines = [[title for title, _ in columns.values()], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(rows):
    """Rows as CSV with the columns that any of them has; numbers keep six digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def write(folder, name, markdown, rows):
    """Write ``name``.md and ``name``.csv, a line per row, each as a whole; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("md", markdown), ("csv", csv_text(rows))):
        with atomic_write(folder / f"{name}.{suffix}") as file:
            file.write(text.encode())

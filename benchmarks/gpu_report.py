"""What the Triton kernels compile to, without a GPU: ``python -m benchmarks.gpu_report [-o benchmarks/results]``.

Every kernel of every supported architecture and precision is compiled as the launcher asks for it, and its machine code
is read: registers, spills, shared memory, tensor-core instructions, loads and stores, how many programs fit on a
multiprocessor, what a warp executes for one tile. The interpreter counts the memory that a step touches. From these
follows a PREDICTION of the time per step, and nothing else here is about time. Its assumptions:

- Roofline: the larger of flops over the part's tensor-core peak (fp32: its multiply-add peak) and the bytes that a step
  cannot avoid (the state read and written; backward the gradient too) over its memory bandwidth.
- Bound: what this code cannot beat. Per tile, the largest of: a warp's instructions at one per clock on each of four
  schedulers; those of the integer and comparison pipe at one per two clocks (multiply-adds too on the A100); multiply-
  adds at the tensor cores' peak (``mma`` on Hopper at 0.6 of it, only ``wgmma`` has it all); bytes through the first-
  level cache and shared memory at 128 per clock; bytes from and to beyond at 64 per clock. Times the tiles of the
  busiest multiprocessor, at boost clock; or, if larger, the bytes that the launch touches over memory bandwidth.
- Left out, so that a real run takes longer: waiting for memory and for one another (few warps are resident), bank
  conflicts, launches (1 to 2 us each in a CUDA graph), lower clocks under load.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from fastnca import _triton
from fastnca.files import atomic_write

from .cpu import FORWARD_FLOPS, TRAINING_FLOPS

WIDTH = 264
BANDS = (80, 513)
CELLS = sum(BANDS) * WIDTH
# Kernels of a step, masked as nearly all are; and what cannot be avoided for a cell: flops, and bytes (its state of 16
# floats read and written; backward state and gradient read, gradient written).
FORWARD = ("step",)
BACKWARD = ("network_backward", "stencil_backward")
FLOPS = {"step": FORWARD_FLOPS, "network_backward": TRAINING_FLOPS - FORWARD_FLOPS}
PASSES = {"forward": (FORWARD, 128), "backward": (BACKWARD, 192)}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one compute capability, from NVIDIA's CUDA programming guide."""

    warps: int
    programs: int
    shared: int  # KB, of which every program's 1 KB is the system's
    shared_of_program: int  # KB


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164, 163),
    86: Multiprocessor(48, 16, 100, 99),
    89: Multiprocessor(48, 24, 100, 99),
    90: Multiprocessor(64, 32, 228, 227),
    100: Multiprocessor(64, 32, 228, 227),
    120: Multiprocessor(48, 24, 100, 99),
}


@dataclass(frozen=True)
class Part:
    """A graphics card by its data sheet: dense tensor-core peaks with float32 accumulation, boost clock."""

    capability: int
    processors: int
    ghz: float
    tflops: dict
    gb_per_second: float


PARTS = {
    "A10": Part(86, 72, 1.695, {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0}, 600),
    "RTX 4090": Part(89, 128, 2.52, {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2}, 1008),
    "A100 40 GB": Part(80, 108, 1.41, {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}, 1555),
    "H100 SXM": Part(90, 132, 1.83, {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4}, 3350),
}
WITHOUT = (
    "The T4 (compute capability 7.5) is below what the kernels support, and has neither tf32 nor bf16 products: the "
    "A10 stands in its place."
)
HOPPER_MMA = 0.6  # of wgmma's peak


def occupancy(capability, registers, warps, shared, tensor_memory):
    """Programs that one multiprocessor holds at a time; 0 if a program does not fit at all."""
    limits = MULTIPROCESSORS[capability]
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    # Registers belong to one of four quarters, and so do warps.
    by_registers = 4 * (65536 // 4 // of_warp) // warps
    by_shared = limits.shared * 1024 // (-(-shared // 128) * 128 + 1024)
    if shared > limits.shared_of_program * 1024:
        by_shared = 0
    by_tensor_memory = 512 // tensor_memory if tensor_memory else limits.programs
    return min(by_registers, by_shared, by_tensor_memory, limits.warps // warps, limits.programs)


@cache
def _compilations(architecture, precision):
    return {name: rest for name, *rest in _triton.compilations(architecture, precision)}


def fingerprint():
    """Of all that decides what is compiled: the kernels' code, comments aside, and every constant and option."""
    code = ast.parse((Path(_triton.__file__).parent / "_triton_kernels.py").read_text())
    for node in ast.walk(code):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    requests = [
        (architecture, precision, name, request[1:])
        for architecture in (*_triton.NVIDIA, *_triton.AMD)
        for precision in _triton.PRECISIONS
        for name, request in _compilations(architecture, precision).items()
    ]
    return hashlib.sha256((ast.dump(code) + repr(requests)).encode()).hexdigest()[:16]


def compile_kernel(architecture, precision, name):
    """-> what there is to know of one compiled kernel, or its "error"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, signature, constants, attributes, options = _compilations(architecture, precision)[name]
    row = {
        "architecture": architecture,
        "precision": precision,
        "kernel": name,
        "warps": options["num_warps"],
        "tile": [constants[key] for key in ("TILE_HEIGHT", "TILE_WIDTH") if key in constants],
        "chunk": constants.get("CHUNK"),
    }
    if architecture in _triton.NVIDIA:
        target = GPUTarget("cuda", architecture, 32)
    else:
        target = GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    try:
        compiled = triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options)
    except Exception as error:
        while error.__cause__:  # Triton wraps the reason in the source lines that lead to it
            error = error.__cause__
        return {**row, "error": str(error).strip().splitlines()[-1]}
    row["shared"] = compiled.metadata.shared
    if architecture in _triton.AMD:
        from .sass import amd_numbers

        return {**row, **amd_numbers(compiled.asm["amdgcn"])}
    ptx = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    return {**row, "ptx": dict(Counter(ptx)), **examine(row, compiled.asm["cubin"], tensor_memory)}


def examine(row, cubin, tensor_memory=0):
    """What the machine code of one kernel says, in addition to the row of :func:`compile_kernel`."""
    from .sass import disassemble

    program, registers, stack = disassemble(cubin)
    tensor_cores = Counter(i.opcode for i in program.instructions if i.uses_tensor_cores)
    function = row["kernel"].partition(",")[0]
    cost = program.cost(function in FLOPS, 128 // (row["chunk"] or 128))
    found = {
        "registers": registers,
        "stack": stack,
        "local_loads": program.count("LDL"),
        "local_stores": program.count("STL"),
        "loads": program.count("LDG", "LDGSTS", "UTMALDG"),
        "stores": program.count("STG", "UTMASTG"),
        "tensor_cores": dict(tensor_cores),
        "programs": occupancy(row["architecture"], registers, row["warps"], row["shared"], tensor_memory),
        "tensor_memory": tensor_memory,
        "cost": cost,
    }
    if function in FLOPS and None not in (cost["mma_macs"], row["tile"] or None):
        cells = row["tile"][0] * row["tile"][1]
        executed = cost["fma_macs"] if row["precision"] == "fp32" else cost["mma_macs"]
        found["products"] = 2 * row["warps"] * executed / (cells * FLOPS[function])  # 1: just the network's
    return found


def problems(row):
    """What must not be, as clauses; [] for a kernel that is as it has to be."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    spilled = {key: row[key] for key in ("stack", "local_loads", "local_stores", "vector_spills") if row.get(key)}
    if spilled:
        found.append("spills: " + ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in spilled.items()))
    found += [f"has no {what}" for what in ("loads", "stores") if not row[what]]
    if row["architecture"] in MULTIPROCESSORS:
        limit = MULTIPROCESSORS[row["architecture"]].shared_of_program
        if row["shared"] > limit * 1024:
            found.append(f"needs {row['shared']} bytes of shared memory, the part has {limit} KB for a program")
        elif not row["programs"]:
            found.append("does not fit on a multiprocessor")
    if row["kernel"].partition(",")[0] in FLOPS:
        if row["precision"] != "fp32" and not row["tensor_cores"]:
            found.append("uses no tensor cores")
        if row.get("products", 1.0) < 1.0:
            found.append(f"computes {row['products']:.0%} of the network's products")
    return found


def _prepare_worker(cache_folder, interpret):
    os.environ["TRITON_CACHE_DIR"] = cache_folder
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")


def pool(cache_folder, interpret=False):
    """Two processes that import Triton anew, to compile or to interpret."""
    return ProcessPoolExecutor(2, get_context("spawn"), _prepare_worker, (str(cache_folder), interpret))


def compile_all(architectures, precisions, kernels=None, progress=lambda *_: None):
    """Rows of :func:`compile_kernel` in order. ``kernels``: only those whose name is or begins with one of these."""
    jobs = [
        (architecture, precision, name)
        for architecture in architectures
        for precision in precisions
        for name in _compilations(architecture, precision)
        if not kernels or name in kernels or name.partition(",")[0] in kernels
    ]
    with tempfile.TemporaryDirectory() as folder, pool(folder) as workers:
        futures = [workers.submit(compile_kernel, *job) for job in jobs]
        rows = []
        for job, future in zip(jobs, futures, strict=True):
            rows.append(future.result())
            progress(len(rows), len(jobs), " ".join(map(str, job)))
    return rows


def count_traffic(pairs, progress=lambda *_: None):
    """Of (architecture, precision) pairs -> {(architecture, precision): accesses.count}, equal ones counted once."""
    from . import accesses

    keys = {}
    for architecture, precision in pairs:
        configuration = _triton.configuration(architecture, precision)
        shapes = [(shape.tile, shape.chunk) for shape in (configuration.step, configuration.backward)]
        keys.setdefault(repr((shapes, precision)), []).append((architecture, precision))
    counted = {}
    with tempfile.TemporaryDirectory() as folder, pool(folder, interpret=True) as workers:
        futures = [workers.submit(accesses.count, *same[0]) for same in keys.values()]
        for done, (same, future) in enumerate(zip(keys.values(), futures, strict=True), start=1):
            counted |= dict.fromkeys(same, future.result())
            progress(done, len(keys), "memory accesses")
    return counted


def _tiles(tile):
    return sum(-(-bands // tile[0]) * -(-WIDTH // tile[1]) for bands in BANDS)


def predict_kernel(part, row, traffic):
    """{"microseconds", "limit", "cycles": {limit: of one tile}} of one launch at W = 264."""
    kernel = row["kernel"].partition(",")[0]
    cost, cells = row["cost"], row["tile"][0] * row["tile"][1]
    configuration = _triton.configuration(part.capability, row["precision"])
    tiles = _tiles(row["tile"])
    programs = {"step": configuration.programs, "network_backward": configuration.groups}.get(kernel, tiles)
    programs = min(programs, tiles)
    products_per_clock = part.tflops[row["precision"]] * 1e3 / (2 * part.processors * part.ghz)
    if part.capability == 90 and row["tensor_cores"].get("HMMA"):
        products_per_clock *= HOPPER_MMA
    macs = cost["mma_macs"] if row["precision"] != "fp32" else cost["fma_macs"]
    beyond = sum(cells * traffic[way]["sectors"] for way in ("read", "write")) + traffic["write"]["parameters_tile"]
    cycles = {
        "issue": row["warps"] * cost["instructions"] / 4,
        "integer pipe": row["warps"] * cost["alu"] * 2 / 4,
        "multiply-add pipe": row["warps"] * cost["fma"] * (2 if part.capability == 80 else 1) / 4,
        "products": row["warps"] * macs / products_per_clock if kernel in FLOPS else 0.0,
        "first-level cache and shared memory": row["warps"] * cost["on_chip_bytes"] / 128,
        "second-level cache": beyond / 64,
    }
    limit = max(cycles, key=cycles.get)
    per_processor = -(-programs // part.processors) * -(-tiles // programs)
    microseconds = per_processor * cycles[limit] / part.ghz / 1e3
    memory = sum(traffic[way]["compulsory"] for way in ("read", "write")) * CELLS / part.gb_per_second / 1e3
    if memory > microseconds:
        microseconds, limit = memory, "memory"
    return {"microseconds": microseconds, "limit": limit, "cycles": cycles, "memory_microseconds": memory}


def predict(rows, traffic):
    """PREDICTIONS: [{"part", "precision", "pass", "roofline", "bound", "ratio", "kernels"}], times in microseconds."""
    by_key = {(row["architecture"], row["precision"], row["kernel"]): row for row in rows if "error" not in row}
    predictions = []
    for name, part in PARTS.items():
        for precision in _triton.PRECISIONS:
            for direction, (kernels, unavoidable) in PASSES.items():
                found = {kernel: by_key.get((part.capability, precision, f"{kernel}, masked")) for kernel in kernels}
                if None in found.values():
                    continue
                counted = traffic[part.capability, precision]["kernels"]
                bounds = {kernel: predict_kernel(part, row, counted[kernel]) for kernel, row in found.items()}
                flops = sum(FLOPS.get(kernel, 0) for kernel in kernels) * CELLS
                roofline = max(flops / part.tflops[precision] / 1e6, unavoidable * CELLS / part.gb_per_second / 1e3)
                bound = sum(kernel["microseconds"] for kernel in bounds.values())
                predictions.append(
                    {
                        "part": name,
                        "precision": precision,
                        "pass": direction,
                        "roofline": roofline,
                        "bound": bound,
                        "ratio": bound / roofline,
                        "kernels": bounds,
                    }
                )
    return predictions


def table(titles, lines):
    lines = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _counts(numbers):
    return ", ".join(f"{count} {name}" for name, count in numbers.items()) or "none"


def _kernel_line(row):
    start = [row["architecture"], row["precision"], row["kernel"]]
    if "error" in row:
        return [*start, row["error"]] + [""] * 8
    spills = f"{row['stack']} B, {row['local_loads']} + {row['local_stores']}"
    products = f"{row['products']:.2f}" if "products" in row else ""
    return [
        *start,
        "x".join(map(str, row["tile"])),
        row["warps"],
        row["registers"],
        spills,
        f"{row['shared'] / 1024:.1f}",
        f"{row['programs']} ({row['programs'] * row['warps']})",
        _counts(row["tensor_cores"]),
        f"{row['loads']} / {row['stores']}",
        products,
    ]


def _cost_line(row):
    cost = row["cost"]
    cells = row["tile"][0] * row["tile"][1]
    mix = ", ".join(f"{name} {count}" for name, count in list(cost["mix"].items())[:10])
    threads = 32 * row["warps"]
    return [
        row["architecture"],
        row["precision"],
        row["kernel"].partition(",")[0],
        cost["instructions"],
        f"{cost['instructions'] * threads / cells:.0f}",
        f"{cost['alu'] / cost['instructions']:.0%}",
        f"{cost['on_chip_bytes'] * row['warps'] / cells:.0f}",
        mix,
    ]


def _amd_line(row):
    start = [row["architecture"], row["precision"], row["kernel"]]
    if "error" in row:
        return [*start, row["error"]] + [""] * 6
    return [
        *start,
        "compiled",
        row["registers"],
        row["vector_spills"],
        row["scalar_spills"],
        row["shared"],
        row["tensor_cores"],
        f"{row['loads']} / {row['stores']}",
    ]


def _traffic_lines(traffic):
    groups = {}
    for (architecture, precision), counted in traffic.items():
        groups.setdefault((precision, json.dumps(counted)), []).append(str(architecture))
    for (precision, counted), same in groups.items():
        counted = json.loads(counted)
        for kernel in (*FORWARD, *BACKWARD):
            numbers = counted["kernels"][kernel]
            pairs = [
                [f"{numbers[way][key]:.0f}" for way in ("read", "write")]
                for key in ("requested", "sectors", "compulsory", "parameters_tile", "parameters_program")
            ]
            launches = f"{counted['launches'][kernel]:g}"
            yield [", ".join(same), precision, kernel, launches, numbers["cells"], *(" + ".join(p) for p in pairs)]


def _prediction_line(prediction):
    limits = ", ".join(
        f"{kernel} {bound['microseconds']:.1f} us ({bound['limit']})" for kernel, bound in prediction["kernels"].items()
    )
    numbers = f"{prediction['roofline']:.1f}", f"{prediction['bound']:.1f}", f"{prediction['ratio']:.1f}x"
    return [prediction["part"], prediction["precision"], prediction["pass"], *numbers, limits]


def _headline(predictions):
    """The H100's figures in words."""
    sentences = [
        f"{p['precision']} {p['pass']} at least {p['bound']:.0f} us, {p['ratio']:.1f} times the roofline of "
        f"{p['roofline']:.0f} us"
        for p in predictions
        if p["part"] == "H100 SXM"
    ]
    return f"H100, per step: {'; '.join(sentences)}." if sentences else ""


def markdown(report):
    nvidia = [row for row in report["kernels"] if row["architecture"] in _triton.NVIDIA]
    amd = [row for row in report["kernels"] if row["architecture"] in _triton.AMD]
    main = [row for row in nvidia if row["kernel"] in {f"{k}, masked" for k in (*FORWARD, *BACKWARD)}]
    wrong = [(row, found) for row in nvidia if (found := problems(row))]
    parts = [
        "# The Triton kernels as compiled\n\n"
        f"`{report['command']}`, triton {report['triton']}; sources {report['fingerprint']}. No GPU ran anything here.",
        "**Problems**\n\n"
        + (
            "\n".join(f"- {r['architecture']} {r['precision']} {r['kernel']}: {'; '.join(f)}" for r, f in wrong)
            or "None: no kernel spills, exceeds its part's shared memory, or lacks its loads, stores or products."
        ),
    ]
    if report["predictions"]:
        titles = ["part", "precision", "pass", "roofline, us", "bound, us", "bound / roofline", "by kernel"]
        assumptions = __doc__[__doc__.index("Its assumptions:") :].partition("\n\n")[2].strip()
        parts.append(
            f"**PREDICTION: time per step at W = {WIDTH}, no measurement**\n\n"
            f"{_headline(report['predictions'])}\n\n"
            + table(titles, [_prediction_line(p) for p in report["predictions"]])
            + f"\n\n{assumptions}\n\n{WITHOUT}"
        )
    if report["traffic"]:
        titles = ["capability", "precision", "kernel", "launches per step", "cells per tile", "requested, B per cell"]
        titles += ["sectors beyond L1, B per cell", "touched at all, B per cell"]
        titles += ["parameters per tile, B", "parameters per program, B"]
        parts.append(
            "**Memory, read + written**, counted by the interpreter for a tile inside a grid. The minimum is 64 + 64 "
            "bytes per cell forward, 128 + 64 backward. The second-level cache absorbs what neighbouring tiles share, "
            "that is, the difference between sectors and touched at all.\n\n"
            + table(titles, _traffic_lines(report["traffic"]))
        )
    if nvidia:
        titles = ["capability", "precision", "kernel", "tile", "warps", "registers", "spills (stack, LDL + STL)"]
        titles += ["shared, KB", "programs (warps) per multiprocessor", "tensor-core instructions", "LDG / STG"]
        titles += ["products computed / needed"]
        parts.append("**NVIDIA**\n\n" + table(titles, map(_kernel_line, nvidia)))
    if any("error" not in row for row in main):
        titles = ["capability", "precision", "kernel", "instructions per tile and warp", "per cell (of a thread)"]
        titles += ["integer pipe", "on-chip bytes per cell", "most frequent"]
        lines = [_cost_line(row) for row in main if "error" not in row]
        parts.append("**What a warp executes for a tile**\n\n" + table(titles, lines))
    if amd:
        titles = ["architecture", "precision", "kernel", "", "VGPRs", "VGPR spills", "SGPR spills", "shared, B"]
        titles += ["matrix instructions", "loads / stores"]
        parts.append("**AMD**: compiled, never run\n\n" + table(titles, map(_amd_line, amd)))
    return "\n\n".join(parts) + "\n"


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.split("\n")[0])

    def architecture(text):
        return int(text) if text.isdigit() else text

    known = (*_triton.NVIDIA, *_triton.AMD)
    parser.add_argument("-o", "--out", type=Path, help="folder for gpu_report.md and gpu_report.json")
    parser.add_argument("--capability", type=architecture, nargs="+", choices=known, default=known)
    parser.add_argument("--precision", nargs="+", choices=_triton.PRECISIONS, default=_triton.PRECISIONS)
    parser.add_argument("--kernel", nargs="+", help="only these, such as step or 'step, masked'")
    return parser.parse_args(arguments)


def main(arguments=None):
    from rich.console import Console
    from rich.progress import Progress

    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if not _triton.INSTALLED:
        raise SystemExit("benchmarks.gpu_report: the package triton is not installed")
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {title: bar.add_task(title, total=None) for title in ("compiling", "counting accesses")}

        def progress(title):
            return lambda done, total, what: bar.update(
                tasks[title], completed=done, total=total, description=f"{title}: {what}"
            )

        rows = compile_all(options.capability, options.precision, options.kernel, progress("compiling"))
        pairs = [(c, p) for c in options.capability if c in _triton.NVIDIA for p in options.precision]
        traffic = count_traffic(pairs, progress("counting accesses"))
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu_report", *arguments]),
        "triton": version("triton"),
        "fingerprint": fingerprint(),
        "kernels": rows,
        "traffic": traffic,
        "predictions": predict(rows, traffic),
    }
    text = markdown(report)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        named = {**report, "traffic": {f"{a} {p}": counted for (a, p), counted in traffic.items()}}
        for name, content in (("gpu_report.md", text), ("gpu_report.json", json.dumps(named, indent=1) + "\n")):
            with atomic_write(options.out / name) as file:
                file.write(content.encode())
    print(text)
    return report


if __name__ == "__main__":
    main()

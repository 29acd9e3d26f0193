"""What the Triton kernels compile to, without a GPU: ``python -m benchmarks.compiled.report``.

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
- Without context and growth: what these add to the kernels is in the last table.
- Left out, so that a real run takes longer: waiting for memory and for one another (few warps are resident), bank
  conflicts, launches (1 to 2 us each in a CUDA graph), lower clocks under load.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import tokenize
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from fastnca.automaton import triton
from fastnca.automaton.rule import HIDDEN1

from ..implementations import FORWARD_FLOPS, TRAINING_FLOPS
from ..report import table, write
from . import accesses, sass

WIDTH = 264
BANDS = (80, 513)
CELLS = sum(BANDS) * WIDTH
# Kernels of a step, masked as nearly all are; and what cannot be avoided for a cell: flops, and bytes (its state of 16
# floats read and written; backward state and gradient read, gradient written).
FORWARD = ("step",)
BACKWARD = ("network_backward", "stencil_backward")
FLOPS = {"step": FORWARD_FLOPS, "network_backward": TRAINING_FLOPS - FORWARD_FLOPS}
PASSES = {"forward": (FORWARD, 128), "backward": (BACKWARD, 192)}
MASKED = tuple(f"{kernel}, masked" for kernel in (*FORWARD, *BACKWARD))
TOLD = tuple(f"{kernel}, masked, context, growth" for kernel in FLOPS)  # which replace theirs
# What accesses.py counts, and the titles of the table.
TRAFFIC = {
    "requested": "requested, per cell",
    "sectors": "sectors beyond L1, per cell",
    "compulsory": "touched at all, per cell",
    "parameters_tile": "parameters, per tile",
    "parameters_program": "parameters, per program",
}


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
# Kernels that may spill: on a GPU they were measured to be faster than shapes that do not. See docs/performance.md.
MAY_SPILL = {(90, "fp32", "step"), (90, "fp32", "network_backward"), (90, "bf16", "network_backward")}


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
def compilations(architecture, precision):
    """Those that the recipes launch: without context and growth, or with both."""
    every = triton.compilations(architecture, precision)
    return {name: rest for name, *rest in every if ("context" in name) == ("growth" in name)}


def fingerprint():
    """16 digits of all that decides what is compiled: the kernels' code without comments and docstrings, and
    every constant and option. Committed results with another one are of other kernels."""
    digest = hashlib.sha256()
    for name in ("triton_cells.py", "triton_kernels.py", "rule.py"):
        digest.update(repr(list(_tokens(Path(triton.__file__).parent / name))).encode())
    for architecture in triton.ARCHITECTURES:
        for precision in triton.PRECISIONS:
            for name, (_, *request) in compilations(architecture, precision).items():
                digest.update(repr((architecture, precision, name, request)).encode())
    return digest.hexdigest()[:16]


def _tokens(path):
    """The words of a Python file, the same for every version of Python, which the syntax tree is not."""
    before = tokenize.NEWLINE
    with tokenize.open(path) as file:
        for kind, word, *_ in tokenize.generate_tokens(file.readline):
            if kind in (tokenize.COMMENT, tokenize.NL):
                continue
            is_docstring = kind == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
            if not is_docstring:
                yield word
            before = kind


def compile_kernel(architecture, precision, name):
    """-> what there is to know of one compiled kernel, or its "error"."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, signature, constants, attributes, options = compilations(architecture, precision)[name]
    row = {
        "architecture": architecture,
        "precision": precision,
        "kernel": name,
        "tile": [constants[key] for key in ("TILE_HEIGHT", "TILE_WIDTH") if key in constants],
        "chunk": constants.get("CHUNK", HIDDEN1),
        "warps": options["num_warps"],
    }
    source, target = ASTSource(fn, signature, constants, attributes), GPUTarget("cuda", architecture, 32)
    try:
        compiled = compiler.compile(source, target=target, options=options)
    except Exception as error:
        while error.__cause__:  # Triton wraps the reason in the source lines that lead to it
            error = error.__cause__
        return {**row, "error": str(error).strip().splitlines()[-1]}
    row["shared"] = compiled.metadata.shared
    return examine(row, compiled.asm["cubin"], getattr(compiled.metadata, "tmem_size", 0))


def examine(row, cubin, tensor_memory=0):
    """The row of :func:`compile_kernel` and what the machine code says."""
    program, registers, stack = sass.disassemble(cubin)
    function = row["kernel"].partition(",")[0]
    cost = program.cost(function in FLOPS, HIDDEN1 // row["chunk"])
    found = {
        "registers": registers,
        "stack": stack,
        "local_loads": program.count("LDL"),
        "local_stores": program.count("STL"),
        "loads": program.count("LDG", "LDGSTS", "UTMALDG"),
        "stores": program.count("STG", "UTMASTG"),
        "tensor_cores": sum(i.uses_tensor_cores for i in program.instructions),
        "hmma": program.count("HMMA"),
        "programs": occupancy(row["architecture"], registers, row["warps"], row["shared"], tensor_memory),
        **cost,
    }
    if function in FLOPS and row["tile"] and cost["mma_macs"] is not None:
        executed = cost["fma_macs"] if row["precision"] == "fp32" else cost["mma_macs"]
        found["products"] = 2 * row["warps"] * executed / (_cells_of(row) * FLOPS[function])  # 1: just the network's
    return {**row, **found}


def _cells_of(row):
    return row["tile"][0] * row["tile"][1]


def faults(row):
    """What must not be, as clauses; [] for a kernel that is as it has to be."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    spilled = {key: row[key] for key in ("stack", "local_loads", "local_stores") if row.get(key)}
    if spilled and (row["architecture"], row["precision"], row["kernel"].partition(",")[0]) not in MAY_SPILL:
        found.append("spills: " + ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in spilled.items()))
    found += [f"has no {what}" for what in ("loads", "stores") if not row[what]]
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
        for name in compilations(architecture, precision)
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
    keys = {}
    for architecture, precision in pairs:
        configuration = triton.configuration(architecture, precision)
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
    cells = _cells_of(row)
    configuration = triton.configuration(part.capability, row["precision"])
    tiles = _tiles(row["tile"])
    programs = {"step": configuration.programs, "network_backward": configuration.groups}.get(kernel, tiles)
    programs = min(programs, tiles)
    products_per_clock = part.tflops[row["precision"]] * 1e3 / (2 * part.processors * part.ghz)
    if part.capability == 90 and row["hmma"]:
        products_per_clock *= HOPPER_MMA
    macs = row["mma_macs"] if row["precision"] != "fp32" else row["fma_macs"]
    beyond = sum(cells * traffic[way]["sectors"] for way in ("read", "write")) + traffic["write"]["parameters_tile"]
    cycles = {
        "issue": row["warps"] * row["instructions"] / 4,
        "integer pipe": row["warps"] * row["alu"] * 2 / 4,
        "multiply-add pipe": row["warps"] * row["fma"] * (2 if part.capability == 80 else 1) / 4,
        "products": row["warps"] * macs / products_per_clock if kernel in FLOPS else 0.0,
        "first-level cache and shared memory": row["warps"] * row["on_chip_bytes"] / 128,
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
        for precision in triton.PRECISIONS:
            for direction, (kernels, unavoidable) in PASSES.items():
                found = {kernel: by_key.get((part.capability, precision, f"{kernel}, masked")) for kernel in kernels}
                if None in found.values():
                    continue
                counted = traffic[part.capability, precision]["kernels"]
                bounds = {kernel: predict_kernel(part, row, counted[kernel]) for kernel, row in found.items()}
                flops = sum(FLOPS.get(kernel, 0) for kernel in kernels) * CELLS
                roofline = max(flops / part.tflops[precision] / 1e6, unavoidable * CELLS / part.gb_per_second / 1e3)
                bound = sum(kernel["microseconds"] for kernel in bounds.values())
                prediction = {"part": name, "precision": precision, "pass": direction, "roofline": roofline}
                predictions.append({**prediction, "bound": bound, "ratio": bound / roofline, "kernels": bounds})
    return predictions


def lines(rows, predictions):
    """The rows as the CSV file has them, with the predicted microseconds of a launch."""
    bounds = {
        (PARTS[prediction["part"]].capability, prediction["precision"], f"{kernel}, masked"): bound["microseconds"]
        for prediction in predictions
        for kernel, bound in prediction["kernels"].items()
    }
    kept = ("architecture", "precision", "kernel", "warps", "registers", "stack", "local_loads", "local_stores")
    kept += ("shared", "programs", "loads", "stores", "tensor_cores", "instructions", "on_chip_bytes", "products")
    for row in rows:
        bound = bounds.get((row["architecture"], row["precision"], row["kernel"]))
        yield {key: row.get(key) for key in kept} | {"predicted_us": bound, "faults": "; ".join(faults(row))}


def _traffic_rows(traffic):
    groups = {}
    for (architecture, precision), counted in traffic.items():
        groups.setdefault((precision, json.dumps(counted)), []).append(str(architecture))
    for (precision, counted), same in groups.items():
        for kernel, numbers in json.loads(counted)["kernels"].items():
            if kernel in (*FORWARD, *BACKWARD):
                row = {"capability": ", ".join(same), "precision": precision, "kernel": kernel}
                for key, title in TRAFFIC.items():
                    row[title] = " + ".join(f"{numbers[way][key]:.0f}" for way in ("read", "write"))
                yield row


def _prediction_row(prediction):
    limits = (f"{kernel} {of['microseconds']:.1f} us ({of['limit']})" for kernel, of in prediction["kernels"].items())
    numbers = {"roofline, us": prediction["roofline"], "bound, us": prediction["bound"], "ratio": prediction["ratio"]}
    start = {key: prediction[key] for key in ("part", "precision", "pass")}
    return start | {key: f"{number:.1f}" for key, number in numbers.items()} | {"by kernel": ", ".join(limits)}


def _kernel_row(row):
    kernel = row["kernel"].replace(", masked", "")
    start = {"capability": row["architecture"], "precision": row["precision"], "kernel": kernel}
    if "error" in row:
        return start
    return start | {
        "tile": "x".join(map(str, row["tile"])),
        "units at once": row["chunk"],
        "registers": row["registers"],
        "shared, KB": f"{row['shared'] / 1024:.1f}",
        "warps per multiprocessor": row["programs"] * row["warps"],
        "instructions per cell": f"{row['instructions'] * 32 * row['warps'] / _cells_of(row):.0f}",
        "integer pipe": f"{row['alu'] / row['instructions']:.0%}",
        "on-chip bytes per cell": f"{row['on_chip_bytes'] * row['warps'] / _cells_of(row):.0f}",
    }


def markdown(rows, traffic, predictions):
    wrong = [f"- {r['architecture']} {r['precision']} {r['kernel']}: {'; '.join(f)}" for r in rows if (f := faults(r))]
    spilling = sum(bool(row.get("stack")) for row in rows)
    verdict = f"None of {len(rows)} kernels exceeds its part's shared memory or lacks its loads, stores or products; "
    verdict += f"none but {spilling} that may spills." if spilling else "none spills."
    parts = [
        f"# The Triton kernels as compiled\n\nBy triton {version('triton')}; no GPU ran anything here. "
        f"Fingerprint of the kernels: {fingerprint()}.",
        "\n".join(wrong) or f"{verdict} compiled.csv has a line for each.",
    ]
    if predictions:
        assumptions = __doc__[__doc__.index("Its assumptions:") :].partition("\n\n")[2].strip()
        shown = table([_prediction_row(prediction) for prediction in predictions])
        parts.append(
            f"**PREDICTION: time per step at W = {WIDTH}, no measurement**\n\n{shown}\n\n{assumptions}\n\n{WITHOUT}"
        )
    if traffic:
        parts.append(
            "**Memory, read + written**, counted by the interpreter for a tile inside a grid, in bytes. The minimum is "
            "64 + 64 per cell forward, 128 + 64 backward. The second-level cache absorbs what neighboring tiles share: "
            "the difference between sectors and touched at all.\n\n" + table(list(_traffic_rows(traffic)))
        )
    main = [_kernel_row(row) for row in rows if row["kernel"] in (*MASKED, *TOLD)]
    if main:
        parts.append("**The kernels of nearly every step.** Instructions are those of a thread\n\n" + table(main))
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.report", description=__doc__.split("\n")[0])
    known = triton.ARCHITECTURES
    parser.add_argument("-o", "--out", type=Path, help="folder for compiled.md and compiled.csv")
    parser.add_argument("--capability", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--precision", nargs="+", choices=triton.PRECISIONS, default=triton.PRECISIONS)
    parser.add_argument("--kernel", nargs="+", help="only these, such as step or 'step, masked'")
    options = parser.parse_args(arguments)
    if not triton.INSTALLED:
        raise SystemExit("benchmarks.compiled.report: the package triton is not installed")
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {title: bar.add_task(title, total=None) for title in ("compiling", "counting accesses")}

        def progress(title):
            return lambda done, total, what: bar.update(
                tasks[title], completed=done, total=total, description=f"{title}: {what}"
            )

        rows = compile_all(options.capability, options.precision, options.kernel, progress("compiling"))
        pairs = [(c, p) for c in options.capability for p in options.precision]
        traffic = count_traffic(pairs, progress("counting accesses"))
    predictions = predict(rows, traffic)
    text = markdown(rows, traffic, predictions)
    if options.out:
        write(options.out, "compiled", text, list(lines(rows, predictions)))
    print(text)
    return rows, traffic, predictions


if __name__ == "__main__":
    main(sys.argv[1:])

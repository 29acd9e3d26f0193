"""What the kernels compile to, without a GPU: nothing spills, all fits, and every kernel still does its work."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_report, sass
from fastnca import _triton

if not _triton.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

COMMITTED = Path(gpu_report.__file__).parent / "results" / "gpu_report.json"
MASKED = [f"{kernel}, masked" for kernel in (*gpu_report.FORWARD, *gpu_report.BACKWARD)]


def describe(rows):
    """{kernel: problems} of those that have any."""
    found = {f"{row['architecture']} {row['precision']} {row['kernel']}": gpu_report.problems(row) for row in rows}
    return {name: clauses for name, clauses in found.items() if clauses}


def test_the_kernels_of_a_step_compile_as_they_must():
    """Those of nearly every launch, for all that is supported; the committed report has the others."""
    rows = gpu_report.compile_all(_triton.NVIDIA, _triton.PRECISIONS, MASKED)
    assert len(rows) == len(_triton.NVIDIA) * len(_triton.PRECISIONS) * len(MASKED)
    assert describe(rows) == {}
    assert all(row["registers"] > 16 and row["cost"]["instructions"] > 100 for row in rows)


def test_the_committed_report_is_of_these_kernels():
    report = json.loads(COMMITTED.read_text())
    assert report["fingerprint"] == gpu_report.fingerprint(), f"renew it: {report['command']}"
    nvidia = [row for row in report["kernels"] if row["architecture"] in _triton.NVIDIA]
    expected = [
        (architecture, precision, name)
        for architecture in _triton.NVIDIA
        for precision in _triton.PRECISIONS
        for name, *_ in _triton.compilations(architecture, precision)
    ]
    assert [(row["architecture"], row["precision"], row["kernel"]) for row in nvidia] == expected
    assert describe(nvidia) == {}


def test_the_report_of_one_part(tmp_path, capsys):
    arguments = ["--capability", "90", "--precision", "bf16", "--kernel", *MASKED, "-o", str(tmp_path)]
    report = gpu_report.main(arguments)
    assert [row["kernel"] for row in report["kernels"]] == MASKED
    traffic = report["traffic"][90, "bf16"]
    assert traffic["launches"]["step"] == 1.0
    assert sum(traffic["launches"][kernel] for kernel in gpu_report.BACKWARD) <= 2.0
    step = traffic["kernels"]["step"]
    assert step["read"]["requested"] > 9 * 64 and step["write"]["requested"] >= 64
    assert 128 <= step["read"]["compulsory"] + step["write"]["compulsory"] <= 1.5 * 128
    assert step["read"]["sectors"] + step["write"]["sectors"] <= 1.5 * 128
    assert [(p["part"], p["pass"]) for p in report["predictions"]] == [("H100 SXM", d) for d in ("forward", "backward")]
    # 5.4 GFLOP at 989 TFLOP/s, or 20 MB at 3350 GB/s.
    assert 5.5 < report["predictions"][0]["roofline"] < 6.5
    assert all(prediction["ratio"] > 1.0 for prediction in report["predictions"])
    text = (tmp_path / "gpu_report.md").read_text()
    assert "PREDICTION" in text and "| 90 | bf16 | step, masked |" in text and text in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu_report.json").read_text())
    assert written["kernels"] == report["kernels"] and written["fingerprint"] == gpu_report.fingerprint()


def assemble(tmp_path, body, options=""):
    """The row of a hand-written kernel."""
    from triton import knobs

    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry kernel(.param .u64 p)"
    source.write_text(
        f"{head} {options} {{\n.reg .u64 %p;\n.reg .f32 %f<200>;\nld.param.u64 %p, [p];\n{body}\nret;\n}}\n"
    )
    subprocess.run([knobs.nvidia.ptxas.path, "-arch=sm_80", str(source), "-o", str(cubin)], check=True)
    row = {
        "architecture": 80,
        "precision": "fp32",
        "kernel": "copy",
        "warps": 4,
        "shared": 0,
        "tile": [],
        "chunk": None,
    }
    return {**row, **gpu_report.examine(row, cubin.read_bytes())}


def copy_reversed(count):
    """Loads all before it stores any: as many registers are needed."""
    loads = [f"ld.volatile.global.f32 %f{i}, [%p+{4 * i}];" for i in range(count)]
    stores = [f"st.volatile.global.f32 [%p+{4 * i}], %f{count - 1 - i};" for i in range(count)]
    return "\n".join(loads + stores)


def test_a_sound_kernel_has_no_problems(tmp_path):
    row = assemble(tmp_path, copy_reversed(100))
    assert (row["loads"], row["stores"]) == (100, 100)
    assert row["registers"] > 100 and row["cost"]["on_chip_bytes"] == 200 * 128
    assert gpu_report.problems(row) == []


def test_spills_are_seen(tmp_path):
    row = assemble(tmp_path, copy_reversed(100), ".maxnreg 32")
    assert row["registers"] <= 32 and row["stack"] > 0 and row["local_loads"] > 0 and row["local_stores"] > 0
    assert [problem.partition(":")[0] for problem in gpu_report.problems(row)] == ["spills"]


def test_an_empty_kernel_is_seen(tmp_path):
    row = assemble(tmp_path, "")
    assert gpu_report.problems(row) == ["has no loads", "has no stores"]


SOUND = {
    "architecture": 86,
    "precision": "bf16",
    "kernel": "step, masked",
    "shared": 1024,
    "programs": 2,
    "loads": 9,
    "stores": 2,
    "tensor_cores": {"HMMA": 8},
    "products": 1.0,
}


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        ({"shared": 100 * 1024}, "needs 102400 bytes of shared memory, the part has 99 KB for a program"),
        ({"programs": 0}, "does not fit on a multiprocessor"),
        ({"tensor_cores": {}}, "uses no tensor cores"),
        ({"precision": "fp32", "tensor_cores": {}}, None),
        ({"products": 0.5}, "computes 50% of the network's products"),
        ({"stores": 0}, "has no stores"),
        ({"error": "no such thing"}, "does not compile: no such thing"),
    ],
    ids=str,
)
def test_problems(change, problem):
    assert gpu_report.problems({**SOUND, **change}) == ([problem] if problem else [])


def test_loops_are_counted():
    """A loop over tiles with a loop of products inside and a wait outside the main path."""
    lines = [
        "S2R R0, SR_TID.X",
        "LDG.E.128 R4, [R2.64]",  # 0x10: the loop over tiles
        "HMMA.16816.F32.BF16 R8, R8, R4, R8",  # 0x20: the loop of products
        "@P0 BRA 0x20",
        "@!P2 BRA 0x80",
        "STG.E [R2.64], R8",  # 0x50
        "@P1 BRA 0x10",
        "EXIT",
        "@!P2 BRA 0x80",  # 0x80: the wait
        "BRA 0x50",
        "BRA 0xa0",
    ]
    text = "".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    program = sass.Program(sass.instructions(text))
    assert len(program.instructions) == len(lines) - 1  # without the padding
    assert [len(loop) for loop in program.loops] == [8, 2, 1]
    assert program.executed(True, 4) == [0, 1, 4, 4, 1, 1, 1, 0, 1, 1]
    cost = program.cost(True, 4)
    assert cost["mma_macs"] == 4 * 16 * 8 * 16 and cost["on_chip_bytes"] == 512 + 128 and cost["once"] == 2
    assert program.executed(False, 4) == [1] * 10


def test_a_lost_loop_is_an_error():
    program = sass.Program(sass.instructions("        /*0000*/   EXIT ;   /* 0x0 */\n"))
    with pytest.raises(ValueError, match="lost its loop over tiles"):
        program.cost(True, 4)


@pytest.mark.parametrize(
    "registers, warps, shared, tensor_memory, programs",
    [
        (32, 4, 0, 0, 16),  # 64 warps
        (255, 8, 0, 0, 1),
        (168, 4, 40 * 1024, 0, 3),  # 12 warps by their registers
        (168, 4, 80 * 1024, 0, 2),
        (64, 4, 228 * 1024, 0, 0),
        (64, 4, 0, 256, 2),
    ],
)
def test_occupancy(registers, warps, shared, tensor_memory, programs):
    assert gpu_report.occupancy(100, registers, warps, shared, tensor_memory) == programs

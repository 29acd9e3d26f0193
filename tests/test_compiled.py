"""What the kernels compile to, without a GPU: nothing spills, all fits, and every kernel still does its work."""

import csv
import subprocess
from pathlib import Path

import pytest

import benchmarks
from benchmarks.compiled import report, sass
from fastnca.automaton import triton

if not triton.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

COMMITTED = Path(benchmarks.__file__).parent / "results" / "compiled.csv"
RENEW = "run python -m benchmarks.compiled.report -o benchmarks/results"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_kernels_of_a_step_compile_as_they_must():
    """Those of nearly every launch in each precision, each on another generation of tensor cores, in tf32 with context
    and growth; the committed results have all."""
    rows = report.compile_all((80,), ("fp32",), report.MASKED)
    rows += report.compile_all((120,), ("bf16",), report.MASKED)
    rows += report.compile_all((100,), ("tf32",), report.TOLD)
    assert len(rows) == 2 * len(report.MASKED) + len(report.TOLD)
    assert [(row, report.faults(row)) for row in rows if report.faults(row)] == []
    assert all(row["registers"] > 16 and row["instructions"] > 100 for row in rows)


def test_the_committed_results_are_of_these_kernels():
    assert f"Fingerprint of the kernels: {report.fingerprint()}." in COMMITTED.with_suffix(".md").read_text(), RENEW
    rows = read(COMMITTED)
    assert [(int(row["architecture"]), row["precision"], row["kernel"]) for row in rows] == [
        (architecture, precision, name)
        for architecture in triton.ARCHITECTURES
        for precision in triton.PRECISIONS
        for name in report.compilations(architecture, precision)
    ]
    for row in rows:
        assert row["faults"] == "", row
        kernel = int(row["architecture"]), row["precision"], row["kernel"].partition(",")[0]
        if kernel not in report.MAY_SPILL:
            assert (row["stack"], row["local_loads"], row["local_stores"]) == ("0", "0", "0"), row


def test_the_report_of_one_part(tmp_path, capsys):
    arguments = ["--capability", "90", "--precision", "bf16", "--kernel", *report.MASKED, "-o", str(tmp_path)]
    rows, traffic, predictions = report.main(arguments)
    assert [row["kernel"] for row in rows] == list(report.MASKED)
    traffic = traffic[90, "bf16"]
    assert traffic["launches"]["step"] == 1.0
    assert sum(traffic["launches"][kernel] for kernel in report.BACKWARD) <= 2.0
    step = traffic["kernels"]["step"]
    assert step["read"]["requested"] > 9 * 64 and step["write"]["requested"] >= 64
    assert 128 <= step["read"]["compulsory"] + step["write"]["compulsory"] <= 1.5 * 128
    assert step["read"]["sectors"] + step["write"]["sectors"] <= 1.5 * 128
    assert [(p["part"], p["pass"]) for p in predictions] == [("H100 SXM", d) for d in ("forward", "backward")]
    # 5.4 GFLOP at 989 TFLOP/s, or 20 MB at 3350 GB/s.
    assert 5.5 < predictions[0]["roofline"] < 6.5
    assert all(prediction["ratio"] > 1.0 for prediction in predictions)
    text = (tmp_path / "compiled.md").read_text()
    assert "PREDICTION" in text and "| 90 | bf16 | step |" in text and text in capsys.readouterr().out
    written = read(tmp_path / "compiled.csv")
    assert [(row["kernel"], int(row["registers"])) for row in written] == [(r["kernel"], r["registers"]) for r in rows]
    assert all(float(row["predicted_us"]) > 5.0 for row in written)


def assemble(tmp_path, body, options=""):
    """The row of a hand-written kernel."""
    from triton import knobs

    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry kernel(.param .u64 p)"
    source.write_text(
        f"{head} {options} {{\n.reg .u64 %p;\n.reg .f32 %f<200>;\nld.param.u64 %p, [p];\n{body}\nret;\n}}\n"
    )
    subprocess.run([knobs.nvidia.ptxas.path, "-arch=sm_80", str(source), "-o", str(cubin)], check=True)
    row = {"architecture": 80, "precision": "fp32", "kernel": "copy", "warps": 4, "shared": 0, "tile": [], "chunk": 128}
    return report.examine(row, cubin.read_bytes())


def copy_reversed(count):
    """Loads all before it stores any: as many registers are needed."""
    loads = [f"ld.volatile.global.f32 %f{i}, [%p+{4 * i}];" for i in range(count)]
    stores = [f"st.volatile.global.f32 [%p+{4 * i}], %f{count - 1 - i};" for i in range(count)]
    return "\n".join(loads + stores)


def test_a_sound_kernel_has_no_faults(tmp_path):
    row = assemble(tmp_path, copy_reversed(100))
    assert (row["loads"], row["stores"]) == (100, 100)
    assert row["registers"] > 100 and row["on_chip_bytes"] == 200 * 128
    assert report.faults(row) == []


def test_spills_are_seen(tmp_path):
    row = assemble(tmp_path, copy_reversed(100), ".maxnreg 32")
    assert row["registers"] <= 32 and row["stack"] > 0 and row["local_loads"] > 0 and row["local_stores"] > 0
    assert [fault.partition(":")[0] for fault in report.faults(row)] == ["spills"]


def test_an_empty_kernel_is_seen(tmp_path):
    row = assemble(tmp_path, "")
    assert report.faults(row) == ["has no loads", "has no stores"]


SOUND = {
    "architecture": 86,
    "precision": "bf16",
    "kernel": "step, masked",
    "shared": 1024,
    "programs": 2,
    "loads": 9,
    "stores": 2,
    "tensor_cores": 8,
    "products": 1.0,
}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"shared": 100 * 1024}, "needs 102400 bytes of shared memory, the part has 99 KB for a program"),
        ({"programs": 0}, "does not fit on a multiprocessor"),
        ({"tensor_cores": 0}, "uses no tensor cores"),
        ({"precision": "fp32", "tensor_cores": 0}, None),
        ({"products": 0.5}, "computes 50% of the network's products"),
        ({"stores": 0}, "has no stores"),
        ({"error": "no such thing"}, "does not compile: no such thing"),
    ],
    ids=str,
)
def test_faults(change, fault):
    assert report.faults({**SOUND, **change}) == ([fault] if fault else [])


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
    assert cost["mma_macs"] == 4 * 16 * 8 * 16 and cost["on_chip_bytes"] == 512 + 128
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
    assert report.occupancy(100, registers, warps, shared, tensor_memory) == programs

"""What a compiled kernel consists of: NVIDIA's machine code (SASS), read without a GPU."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|32|64|128)\b")

# What works on the 16-lane pipe for integers, comparisons and conversions, at half the rate of issue.
_ALU = re.compile(
    "FMNMX3?|VIMNMX|[IF]SETP|P?LOP3|V?IADD3?|F?SEL|SHF|LEA|PRMT|SGXT|IABS|P2R|R2P|F2FP",
)
_FMA = re.compile("FFMA2?|FADD2?|FMUL2?|HFMA2|IMAD")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    name: str  # with its modifiers
    operands: str

    @property
    def opcode(self):
        return self.name.partition(".")[0]

    @property
    def target(self):
        """Where a jump goes; None for anything else."""
        if self.opcode not in ("BRA", "CALL", "JMP"):
            return None
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def may_pass(self):
        """Whether the next instruction can follow."""
        if self.opcode in ("BRA", "JMP"):
            return self.predicate is not None or "UP" in self.operands
        if self.opcode in ("EXIT", "RET"):
            return self.predicate is not None
        return True

    @property
    def uses_tensor_cores(self):
        return self.opcode in ("HMMA", "HGMMA", "QGMMA", "QMMA") or re.fullmatch(r"UTC\w*MMA", self.opcode) is not None

    @property
    def products(self):
        """Multiply-adds of one warp, None where the instruction does not say: tcgen05 has its shape in a register."""
        if self.opcode == "HMMA":
            m, n, k = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4)}[self.name.split(".")[1]]
            return m * n * k
        if self.opcode == "HGMMA":
            m, n, k = map(int, self.name.split(".")[1].split("x"))
            return m * n * k // 4  # of the four warps that share it
        if self.opcode == "FFMA":
            return 32
        if self.opcode == "FFMA2":
            return 64
        return None if self.uses_tensor_cores else 0

    @property
    def on_chip_bytes(self):
        """Bytes that one warp at least moves through the first-level cache or shared memory, 128 of them in a clock.
        What LDS loads may be the same for many threads and then takes one clock whatever its width."""
        if self.opcode in ("LDSM", "STSM"):
            return 128 * {"2": 2, "4": 4}.get(self.name.rpartition(".")[2], 1)
        if self.opcode == "LDS":
            return 128
        if self.opcode in ("LDG", "STG", "STS", "LDL", "STL"):
            width = _WIDTH.search(self.name)
            return 32 * (int(width[1]) // 8 if width else 4)
        return 0


def instructions(text):
    """The instructions in what ``cuobjdump -sass`` prints of one kernel, without the padding after its end."""
    found = [
        Instruction(int(address, 16), predicate or None, name, operands.strip())
        for address, predicate, name, operands in _LINE.findall(text)
    ]
    while found and (found[-1].opcode == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


@dataclass(frozen=True)
class Program:
    """One kernel's instructions and loops."""

    instructions: list

    def count(self, *opcodes):
        return sum(instruction.opcode in opcodes for instruction in self.instructions)

    @cached_property
    def loops(self):
        """The natural loops as sets of instruction indices, the largest first; those of one head are one loop."""
        code = self.instructions
        place = {instruction.address: index for index, instruction in enumerate(code)}
        heads = {0}
        for index, instruction in enumerate(code):
            if instruction.target is not None or not instruction.may_pass:
                heads |= {place.get(instruction.target, 0), min(index + 1, len(code) - 1)}
        blocks = list(pairwise([*sorted(heads), len(code)]))
        block_at = {first: number for number, (first, _) in enumerate(blocks)}
        successors = []
        for _, end in blocks:
            last = code[end - 1]
            after = {block_at[place[last.target]]} if last.target in place else set()
            if last.may_pass and end < len(code):
                after.add(block_at[end])
            successors.append(after)
        dominators = _dominators(successors)
        predecessors = [{p for p, after in enumerate(successors) if b in after} for b in range(len(blocks))]
        bodies = {}
        for block, after in enumerate(successors):
            for head in after & dominators.get(block, set()):
                body, open_blocks = {head}, [block]
                while open_blocks:
                    found = open_blocks.pop()
                    if found not in body:
                        body.add(found)
                        open_blocks += predecessors[found]
                bodies[head] = bodies.get(head, set()) | body
        loops = [{i for block in body for i in range(*blocks[block])} for body in bodies.values()]
        return sorted(loops, key=len, reverse=True)

    def executed(self, in_tiles, chunks):
        """How often a warp issues each instruction for one tile: all once, or, where the kernel loops over tiles
        (``in_tiles``), those in its largest loop once, and those in loops inside it that compute products ``chunks``
        times. Predicated instructions count as executed; waiting loops as passed once."""
        if not in_tiles:
            return [1] * len(self.instructions)
        if not self.loops:
            raise ValueError("the kernel has lost its loop over tiles")
        tiles, *inner = self.loops
        times = [int(index in tiles) for index in range(len(self.instructions))]
        for loop in inner:
            if loop < tiles and self._computes_products(loop):
                for index in loop:
                    times[index] *= chunks
        return times

    def _computes_products(self, loop):
        inside = [self.instructions[index] for index in loop]
        return any(i.uses_tensor_cores for i in inside) or sum(i.opcode in ("FFMA", "FFMA2") for i in inside) >= 64

    def cost(self, in_tiles, chunks):
        """What a warp executes for one tile: instructions in all and by pipe, multiply-adds on tensor cores (None with
        tcgen05, whose instructions do not tell) and off them, and bytes on chip."""
        cost = Counter(instructions=0, alu=0, fma=0, mma_macs=0, fma_macs=0, on_chip_bytes=0)
        known = True
        for instruction, times in zip(self.instructions, self.executed(in_tiles, chunks)):
            cost["instructions"] += times
            cost["alu"] += times * bool(_ALU.fullmatch(instruction.opcode))
            cost["fma"] += times * bool(_FMA.fullmatch(instruction.opcode))
            cost["on_chip_bytes"] += times * instruction.on_chip_bytes
            if instruction.products is None:
                known = False
            else:
                kind = "mma_macs" if instruction.uses_tensor_cores else "fma_macs"
                cost[kind] += times * instruction.products
        return {**cost, "mma_macs": cost["mma_macs"] if known else None}


def _dominators(successors):
    """{block: the blocks that every path from block 0 to it passes}, of those that can be reached."""
    order, seen = [], set()

    def visit(block):
        stack = [(block, iter(successors[block]))]
        seen.add(block)
        while stack:
            current, after = stack[-1]
            following = next((b for b in after if b not in seen), None)
            if following is None:
                order.append(current)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(successors[following])))

    visit(0)
    order.reverse()
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            before = [dominators[p] for p in order if block in successors[p]]
            found = set.intersection(*before) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def disassemble(cubin):
    """-> (Program, registers of a thread, bytes of stack) of the one kernel in a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def cuobjdump(*arguments):
            command = [knobs.nvidia.cuobjdump.path, *arguments, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        code, usage = cuobjdump("-sass"), cuobjdump("--dump-resource-usage")
    found = _RESOURCES.search(usage)
    program = Program(instructions(code))
    if not found or not program.instructions:
        raise ValueError("cuobjdump's output has no kernel, or none in the form that this reads")
    registers, stack, _, local = map(int, found.groups())
    return program, registers, stack + local

"""What the compiler makes of every Triton kernel, for GPUs that need not be there.

    python -m benchmarks.kernels.compile_report [--markdown] [--tasks 5] [--kernels mark apply] [--targets sm_90]
    python -m benchmarks.kernels.compile_report --kernels mark --into kernels/GPU.md

For each kernel, dtype and target: whether every access of a tensor is 128 bits wide, registers, spills, shared memory,
estimated occupancy, bytes moved per parameter against the least possible, and the time that a card would take. The time
is a prediction, not a measurement: bytes at the card's peak bandwidth, or PTX instructions (counted by executing the
compiled PTX on the CPU, NVIDIA only) at its peak issue rate, whichever is longer. What the host adds to it in a pass
over models that lie in one buffer each is predicted too, from a time of a launch and of a wait that are assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpift_kernels.triton import catalog
from cpift_kernels.triton.machine_code import MachineCode, read_machine_code
from cpift_kernels.triton.offline import TARGETS, compile_launch

from tests.ptx.device import reachable, run_launch


@dataclass(frozen=True)
class Card:
    """Peak figures from the vendor's data sheet.

    bandwidth: bytes a second; issue: thread instructions a second (multiprocessors x 4 schedulers x 32 lanes x clock),
    None where no instruction count is taken; shared: bytes of shared memory of one multiprocessor.
    """

    name: str
    bandwidth: float
    issue: float | None
    shared: int


CARDS = {
    "sm_80": Card("A100", 2.039e12, 108 * 4 * 32 * 1.41e9, 164 << 10),
    "sm_90": Card("H100", 3.35e12, 132 * 4 * 32 * 1.755e9, 228 << 10),
    "sm_100": Card("B200", 8.0e12, 148 * 4 * 32 * 1.85e9, 228 << 10),
    "gfx942": Card("MI300X", 5.3e12, None, 64 << 10),
}
HEADER = (
    "kernel", "dtype", "target", "128-bit", "registers", "spills", "shared B", "occupancy",
    "bytes/param", "least", "PTX instr/param", "predicted ms", "bound by", "+ launches, waits ms",
)  # fmt: skip
# Seconds that one is taken to cost, whatever the kernel; no card has been asked. A launch is 4 to 10 µs of the host's.
LAUNCH, WAIT = 7e-6, 20e-6
# Kernels whose results the host waits for; what a kernel before another of them found comes in the same copy.
WAITED_FOR = ("collect", "collect_all", "sum_blocks", "magnitudes", "count")
# Kernels whose work is a few scattered elements, or whose order of sums decides what a thread reads.
SCATTERED = ("collect", "collect_all", "count", "gram", "sum_blocks")


def occupancy(code: MachineCode, threads: int, target: str) -> float:
    """Share of a multiprocessor's warp (NVIDIA) or a SIMD's wave (AMD) slots that the registers and memory allow."""
    if target == "gfx942":
        return min(8, 512 // max(-(-code.registers // 8) * 8, 1)) / 8
    warps = threads // 32
    by_registers = 65536 // (-(-code.registers * 32 // 256) * 256) // warps
    by_shared = CARDS[target].shared // max(code.shared, 1)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def row(name: str, dtype: str, target: str, tasks: int, parameters: float) -> tuple[str, ...]:
    """One line of the report."""
    entry, card = catalog.entry(name, dtype, tasks), CARDS[target]
    code = read_machine_code(compile_launch(entry.launch, TARGETS[target]), TARGETS[target])
    instructions = None
    if card.issue is not None:
        covered = entry.launch.programs * entry.elements
        with reachable(entry.reached):
            instructions = sum(run_launch(entry.launch, target).counts.values()) / covered
    moving = entry.bytes_moved * parameters / card.bandwidth
    issuing = instructions * parameters / card.issue if instructions and card.issue else 0.0
    wide = "–" if name in SCATTERED else ("yes" if is_wide(entry, code) else "NO")
    spills = str(code.spilled) + (f" (+{code.scalar_spilled} scalar)" if code.scalar_spilled else "")
    return (
        name, "any" if name in catalog.ANY_DTYPE else dtype, target, wide, str(code.registers), spills,
        str(code.shared), f"{occupancy(code, entry.launch.threads, target):.0%}",
        f"{entry.bytes_moved:.2f}", f"{entry.bytes_needed:.2f}",
        f"{instructions:.1f}" if instructions else "–",
        f"{1e3 * max(moving, issuing):.1f} ({card.name})", "issue" if issuing > moving else "memory",
        f"{1e3 * host_seconds(1, name in WAITED_FOR):.3f}",
    )  # fmt: skip


def host_seconds(launches: int, waits: int) -> float:
    """What so many launches and waits add where the card has nothing else to do meanwhile."""
    return LAUNCH * launches + WAIT * waits


def is_wide(entry: catalog.Entry, code: MachineCode) -> bool:
    """Whether the tensors that the program must read arrive by 128-bit loads alone."""
    item = 1 / 8 if entry.name == "overlap" else catalog.DTYPES[entry.dtype].itemsize
    tensors = {"overlap": entry.tasks, "magnitudes": 2} | dict.fromkeys(
        ("zero", "gather", "scatter", "zero_blocks", "hold"), 1
    )
    wanted = tensors.get(entry.name, 1 + min(entry.tasks, 8))
    return bool(code.loads[128] >= wanted * entry.tile / entry.launch.threads * item / 16)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    for name in options.kernels:
        for dtype in options.dtypes:
            if name in catalog.ANY_DTYPE and dtype != options.dtypes[0]:
                continue
            for target in options.targets:
                yield row(name, dtype, target, options.tasks, options.parameters)


def replaced(page: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A page's text with other rows about these kernels, dtypes and targets. Raises ValueError where it has none."""
    lines = page.split("\n")
    for row in rows:
        places = [at for at, line in enumerate(lines) if line.startswith(f"| {' | '.join(row[:3])} |")]
        if len(places) != 1:
            raise ValueError(f"the page has {len(places)} rows about {' '.join(row[:3])}, so add one by hand")
        lines[places[0]] = f"| {' | '.join(row)} |"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=[*catalog.KERNELS], choices=catalog.KERNELS)
    parser.add_argument("--dtypes", nargs="+", default=[*catalog.DTYPES], choices=catalog.DTYPES)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=TARGETS)
    parser.add_argument("--tasks", type=int, default=5, help="tuned models that an operation takes")
    parser.add_argument("--parameters", type=float, default=7e9, help="model size of the predicted time")
    parser.add_argument("--markdown", action="store_true", help="a table for kernels/GPU.md")
    parser.add_argument("--into", type=Path, help="a page: these rows take the place of its rows about the same")
    options = parser.parse_args()
    if options.into:
        options.into.write_text(replaced(options.into.read_text(encoding="utf-8"), rows(options)), encoding="utf-8")
        return
    if options.markdown:
        print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    else:
        print("\t".join(HEADER))
    for line in rows(options):
        print("| " + " | ".join(line) + " |" if options.markdown else "\t".join(line), flush=True)


if __name__ == "__main__":
    main()

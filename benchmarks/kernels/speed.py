"""Time the kernels beside a read ceiling, the reference and plain torch: python -m benchmarks.kernels.speed --help.

Every result is checked before it is timed; a wrong one gets no time and ends the run with status 1. The read ceiling is
the rate at which the same threads (or the GPU) read the same tensors and do nothing else; it is measured again between
the repeats, so a share of it holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cpift_kernels as ck
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernels.workloads import WORKLOADS, Setting, Workload

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLOW = 10.0  # seconds after which a rival is not repeated


def run(
    operations: Sequence[str] = tuple(WORKLOADS),
    dtypes: Sequence[str] = ("bf16", "fp32"),
    sizes: Sequence[int] = (1 << 20, 1 << 24),
    tasks: Sequence[int] = (1, 4),
    share: float = 0.01,
    repeats: int = 9,
    backend: ck.Backend = "auto",
    rivals: bool = True,
    device: str | None = None,
    mergekit: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row for every operation × size × dtype × number of tasks × implementation."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for operation in operations:
        for size in sizes:
            for dtype in dtypes:
                for count in tasks if operation != "slerp" else (1,):
                    setting = Setting(size, DTYPES[dtype], count, share, device, mergekit if rivals else None)
                    named = {"operation": operation, "dtype": dtype, "elements": size, "tasks": count, "share": share}
                    workload = WORKLOADS[operation](setting)
                    for row in measure(workload, device, repeats, backend, rivals):
                        yield {**named, **row}
                    workload.close()
                    del workload
                    gc.collect()


def measure(
    workload: Workload, device: str, repeats: int, backend: ck.Backend, rivals: bool
) -> Iterator[dict[str, Any]]:
    """Check, then time one workload: ours first, then the reference and plain torch."""
    resolved = ck.resolve(backend, *workload.reads)
    read = read_ceiling(workload.reads, device)
    others: dict[str, Callable[[], Any]] = {}
    if rivals:
        others = {"reference": lambda: workload.ours("reference"), **workload.rivals}
    try:
        workload.check(workload.ours(backend))
    except AssertionError as error:
        yield {"implementation": resolved, "correct": False, "error": str(error)}
        return
    extra = peak_extra_bytes(lambda: workload.ours(backend), device)
    extra = None if extra is None else max(extra - workload.result_bytes, 0)
    ours = timings(lambda: workload.ours(backend), read, device, repeats)
    yield {"implementation": resolved, "correct": True, "peak_extra_bytes": extra, **summary(workload, *ours)}
    for name, other in others.items():
        theirs = timings(other, read, device, repeats, limit=SLOW)
        ratio = statistics.median(theirs[0]) / statistics.median(ours[0])
        yield {"implementation": name, "times_ours": round(ratio, 2), **summary(workload, *theirs)}


def summary(workload: Workload, seconds: list[float], ceilings: list[float]) -> dict[str, Any]:
    """Percentiles, GB/s and the share of the read ceiling that was measured between the repeats."""
    low, median, high = percentiles(seconds)
    ceiling = sum(t.numel() * t.element_size() for t in workload.reads) / statistics.median(ceilings)
    return {
        "repeats": len(seconds),
        "seconds_p20": low,
        "seconds_p50": median,
        "seconds_p80": high,
        "bytes": workload.bytes,
        "gb_per_second": round(workload.bytes / median / 1e9, 2),
        "read_ceiling_gb_per_second": round(ceiling / 1e9, 2),
        "share_of_ceiling": round(workload.bytes / median / ceiling, 3),
    }


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return at[0], statistics.median(ordered), at[1]


def timings(
    work: Callable[[], Any], read: Callable[[], object], device: str, repeats: int, limit: float = float("inf")
) -> tuple[list[float], list[float]]:
    """Seconds of `repeats` runs of the work, and of a read of the same tensors after each; fewer past `limit`."""
    seconds: list[float] = []
    ceilings: list[float] = []
    while len(seconds) < repeats and sum(seconds) < limit:
        seconds.append(timed(work, device))
        ceilings.append(timed(read, device))
    return seconds, ceilings


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one run, the GPU's queue drained before and after."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    seconds = time.perf_counter() - start
    del result  # freed outside the measured time
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read_ceiling(tensors: list[Tensor], device: str) -> Callable[[], object]:
    """Reads every byte of the tensors, as fast as this device does."""
    if device == "cuda":
        return lambda: [tensor.view(torch.int32).max() for tensor in tensors]
    from benchmarks.kernels.read_ceiling import read_all

    return lambda: read_all(tensors)


def peak_extra_bytes(work: Callable[[], Any], device: str) -> int | None:
    """Memory beyond the inputs at the highest point of one run, results included; None where it cannot be told."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not refs.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the run takes
    refs.write_text("5", encoding="utf-8")  # resets the peak resident size
    before = _kilobytes(status, "VmRSS")
    work()
    return max(_kilobytes(status, "VmHWM") - before, 0) * 1024


def _kilobytes(status: Path, name: str) -> int:
    return next(
        int(line.split()[1]) for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )


def parse_size(text: str) -> int:
    """`1M`, `256M`, `1B` (powers of two: 2**20 and 2**30) or a plain number."""
    unit = {"K": 10, "M": 20, "B": 30}.get(text[-1].upper())
    return int(float(text[:-1]) * 2**unit) if unit else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[1 << 20, 1 << 24], help="elements: 1M 256M 1B")
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--share", type=float, default=0.01, help="share of the elements in a core region")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--backend", choices=["auto", "triton", "cpu", "reference"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-rivals", action="store_true", help="leave out the reference, plain torch and mergekit")
    parser.add_argument("--mergekit", type=Path, metavar="VENV", help="time mergekit's slerp too, in this environment")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of kernels.jsonl")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    right = True
    for row in run(
        options.operations, options.dtypes, options.sizes, options.tasks, options.share, options.repeats,
        options.backend, not options.no_rivals, mergekit=options.mergekit,
    ):  # fmt: skip
        record.append("kernels", [row], options.out)
        print(describe(row), flush=True)
        right = right and row.get("correct", True)
    return 0 if right else 1


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    name = f"{row['operation']:15}{row['dtype']:5}{row['elements'] / 2**20:8.1f}M  N={row['tasks']:<3}"
    name += f"{row['implementation']:15}"
    if row.get("correct") is False:
        return f"{name}WRONG, not timed: {row['error']}"
    line = f"{name}{row['seconds_p50'] * 1e3:10.2f} ms {row['gb_per_second']:8.2f} GB/s"
    line += f"  {row['share_of_ceiling']:6.3f} of {row['read_ceiling_gb_per_second']:.1f}"
    if row.get("peak_extra_bytes") is not None:
        line += f"  +{row['peak_extra_bytes'] / 2**20:.1f} MiB"
    return line + (f"  {row['times_ours']:.1f}x ours" if "times_ours" in row else "")


if __name__ == "__main__":
    sys.exit(main())

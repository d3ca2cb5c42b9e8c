"""Ask a GPU what only a GPU can say, in about ten minutes: python -m benchmarks.gpu, or make gpu-check.

It needs torch, Triton, numpy and this repository. First the bits: every operation against its reference, small and
large, on the first stream and another, through lanes from the host, as a captured graph; a wrong one ends everything,
and nothing is timed then. After that the rates: each operation beside a copy in the card's memory, calls over the 291
tensors of a model, copies from and to the machine, slices that are copied while others are computed. Each answer is a
line here and a row of gpu.jsonl in benchmarks/results.

Exit status: 0, 1 after a wrong bit, 2 where no GPU is (then nothing is written).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.gpu import lanes, rates
from benchmarks.gpu.bits import WrongError, cases
from benchmarks.gpu.card import Card, Sizes, absent
from benchmarks.gpu.rates import Row

Step = Callable[[Card, Sizes], Iterator[Row]]


def bits(card: Card, sizes: Sizes) -> Iterator[Row]:
    yield _checked(card, sizes)


def another_stream(card: Card, sizes: Sizes) -> Iterator[Row]:
    with card.elsewhere():
        yield _checked(card, sizes)


def _checked(card: Card, sizes: Sizes) -> Row:
    done = 0
    for name, check in cases(card, sizes):
        try:
            check()
            card.wait()
        except WrongError as error:
            raise WrongError(f"{name}: {error}") from None
        done += 1
        if done % 20 == 0:
            print(f"  {done} cases, the last: {name}", flush=True)
    return {"cases": done, "correct": True}


STEPS: dict[str, Step] = {
    "bits": bits,
    "another stream": another_stream,
    "large tensors": rates.large,
    "beyond 32 bits": rates.far,
    "lanes": lanes.bits,
    "captured": rates.captured,
    "kernels": rates.kernels,
    "calls": rates.calls,
    "transfers": rates.transfers,
    "lanes' rates": lanes.rates,
}


def check(card: Card, sizes: Sizes, steps: Sequence[str], folder: Path) -> int:
    """Go through the steps; returns the exit status."""
    for number, name in enumerate(steps, 1):
        began = time.perf_counter()
        print(f"{number} of {len(steps)}: {name}", flush=True)
        try:
            for row in STEPS[name](card, sizes):
                record.append("gpu", [{"step": name, **row}], folder)
                print("  " + describe(row), flush=True)
        except WrongError as error:
            record.append("gpu", [{"step": name, "correct": False, "error": str(error)}], folder)
            print(f"  WRONG: {error}\nnothing after this was asked", flush=True)
            return 1
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def describe(row: Row) -> str:
    """One line for the terminal."""
    if "cases" in row:
        return f"{row['cases']} cases: the bits of the reference, or within rounding where sums are"
    parts = [f"{row['operation']:36}", f"{row.get('dtype', ''):5}"]
    if "seconds" in row:
        parts.append(f"{row['seconds'] * 1e3:9.3f} ms")
    if "gb_per_second" in row:
        parts.append(f"{row['gb_per_second']:8.1f} GB/s")
    if "share_of_copy" in row:
        parts.append(f"{row['share_of_copy']:5.2f} of a copy")
    if "overlap" in row:
        parts.append(f"{row['overlap']:.2f} of what can be hidden, {row['host_waits_a_slice']:.1f} waits a slice")
    if "launches" in row:
        parts.append(f"{row['launches']} launches, {row['torch_operations']} operations, {row['waits']} waits")
    if row.get("correct"):
        parts.append("right")
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of gpu.jsonl")
    options = parser.parse_args(arguments)
    if missing := absent():
        print(missing, file=sys.stderr)
        return 2
    device = record.device()["gpu"]
    print(f"{device['name']}, {device['memory_gib']} GiB; {record.environment()['versions']}", flush=True)
    sizes = Sizes.fitting(int(device["memory_gib"] * 2**30))
    return check(Card(), sizes, options.steps, options.out)


if __name__ == "__main__":
    sys.exit(main())

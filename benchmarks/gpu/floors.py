"""What each operation should take at least, beside what a card took: the tables of kernels/GPU.md, from its rows.

    python -m benchmarks.gpu.floors [--into kernels/GPU.md]

The least time is what must move at the data sheet's bandwidth; nothing here is measured but the last two columns, which
are rows of gpu.jsonl (`make gpu-check`), and empty while there are none. Launches are those that the launchers make
over the 291 tensors of a Llama, held back; those of freezing and all waits are what tests count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from cpift_kernels.triton import apply, catalog, gram, offline, overlap
from torch import Tensor

from benchmarks.gpu.card import Sizes, llama
from benchmarks.kernels.compile_report import CARDS
from benchmarks.record import RESULTS

BEGIN, END = "<!-- floors: python -m benchmarks.gpu.floors --into kernels/GPU.md -->", "<!-- end of floors -->"
# The operations that gpu-check times alone, and the kernels that each launches.
OPERATIONS: Mapping[str, Callable[[int], Iterator[str]]] = {
    "select_cores": lambda tasks: iter(["mark", *["collect"] * tasks]),
    "masked_gram": lambda tasks: iter(["gram"]),
    "fused_apply": lambda tasks: iter(["apply"]),
    "overlap_counts": lambda tasks: iter(["overlap"]),
}
TASKS = 3  # of the calls whose launches are counted, as gpu-check has them
# What tests count, and what it was before: launches of a call over 291 tensors, waits of the host.
FREEZING = {"restore": ("up to 582", "1"), "pull": ("2 waits a tensor", "3, no wait")}
WAITS = {
    "a piece of a selection": ("15", "2", "for counts with masks, for candidates"),
    "a slice of a fusion": ("26", "3", "for its sums, its core elements, the check of its owners"),
}


def measured(results: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each operation that gpu-check timed alone."""
    file = results / "gpu.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if row.get("step") == "kernels" and "seconds" in row]
    return {row["operation"]: row for row in rows}


def floors(results: Path) -> Iterator[str]:
    """A table: what gpu-check times alone."""
    sizes, names = Sizes(), [card.name for card in CARDS.values()]
    tasks, found = max(sizes.tasks), measured(results)
    size = f"2^{sizes.timed.bit_length() - 1} elements of bf16, {tasks} tasks"
    yield f"{size}: ms that what moves takes at each card's peak bandwidth, and what one took:"
    yield ""
    yield f"| operation | bytes/element | least | {' | '.join(names)} | measured ms | on |"
    yield "|" + "---|" * (len(names) + 5)
    for operation, kernels in OPERATIONS.items():
        traffic = [catalog.entry(kernel, "bf16", tasks) for kernel in kernels(tasks)]
        moved, needed = sum(one.bytes_moved for one in traffic), sum(one.bytes_needed for one in traffic)
        each = [f"{1e3 * sizes.timed * moved / card.bandwidth:.2f}" for card in CARDS.values()]
        took = _took(found.get(operation), sizes)
        yield f"| {operation} | {moved:.2f} | {needed:.2f} | {' | '.join(each)} | {' | '.join(took)} |"


def _took(row: dict[str, Any] | None, sizes: Sizes) -> tuple[str, str]:
    if row is None:
        return "", ""
    elements = "" if row["elements"] == sizes.timed else f", of {row['elements']} elements"
    return f"{1e3 * row['seconds']:.2f}{elements}", row["environment"]["device"]["gpu"]["name"]


def launches() -> Iterator[str]:
    """A table: launches of a call over a model's tensors."""
    yield "Launches of a call over the 291 tensors of a Llama of 7 billion, three tasks:"
    yield ""
    yield "| call | before | now |"
    yield "|---|---|---|"
    for call, count in counted(llama(32, 4096, 11008, 32000)).items():
        yield f"| {call} | | {count} |"
    for call, (before, now) in FREEZING.items():
        yield f"| {call} | {before} | {now} |"
    yield ""
    yield "Waits of the host, four tasks:"
    yield ""
    yield "| | before | now | for what |"
    yield "|---|---|---|---|"
    for what, (before, now, why) in WAITS.items():
        yield f"| {what} | {before} | {now} | {why} |"


def counted(sizes: list[int]) -> dict[str, int]:
    """By call the launches over tensors of so many elements. Their memory is not touched, nor held beyond a tensor's
    own launches: together it would be more than most machines have."""
    scale = torch.zeros(1, TASKS + 1, dtype=torch.float64)
    calls: dict[str, Callable[[list[Tensor], list[Tensor]], object]] = {
        "resolve_conflicts": lambda x, words: overlap.resolve_conflicts("magnitude", x[0], x[1:], words),
        "masked_gram": lambda x, words: gram.masked_gram(x[0], x[1:], words[0]),
        "fused_apply": lambda x, words: apply.fused_apply(x[0], x, scale, [None, *words]),
    }

    def launched(call: Callable[[list[Tensor], list[Tensor]], object], size: int) -> int:
        models = [torch.empty(size, dtype=torch.bfloat16) for _ in range(TASKS + 1)]
        words = [torch.empty(-(-size // 32), dtype=torch.int32) for _ in range(TASKS)]
        return len(offline.record(lambda: call(models, words)))

    return {name: sum(launched(call, size) for size in sizes) for name, call in calls.items()}


def tables(results: Path = RESULTS) -> str:
    return "\n".join([*floors(results), "", *launches()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="the page that has them, between its two marks")
    options = parser.parse_args()
    if options.into is None:
        print(tables())
        return
    options.into.write_text(with_tables(options.into.read_text(encoding="utf-8"), tables()), encoding="utf-8")


def with_tables(page: str, made: str) -> str:
    """The page with these between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()

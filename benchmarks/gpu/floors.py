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
from cpift_kernels import FlatLayout
from cpift_kernels.triton import apply, catalog, flat, gram, offline, overlap, selection
from cpift_kernels.triton.bracket import NOTHING, Bracket, cut_tables
from cpift_kernels.triton.common import elements
from torch import Tensor

from benchmarks.gpu.card import Sizes, llama
from benchmarks.kernels.compile_report import CARDS, LAUNCH, WAIT, host_seconds
from benchmarks.record import RESULTS

BEGIN, END = "<!-- floors: python -m benchmarks.gpu.floors --into kernels/GPU.md -->", "<!-- end of floors -->"
# The operations that gpu-check times alone, and the kernels that each launches.
OPERATIONS: Mapping[str, Callable[[int], Iterator[str]]] = {
    "select_cores": lambda tasks: iter(["mark", *["collect"] * tasks]),
    "masked_gram": lambda tasks: iter(["gram"]),
    "fused_apply": lambda tasks: iter(["apply"]),
    "overlap_counts": lambda tasks: iter(["overlap"]),
}
# By call the kernels that move what is counted, and the waits of a tensor alone and of all in one buffer: sizes of
# cores and Gram matrices come in one copy. Tensors alone wait for masks and candidates, for what a call gives, and for
# coefficients on their way to the device.
KERNELS_OF = {
    "select_cores": ("mark", "collect_all"),
    "overlap_counts": ("overlap",),
    "resolve_conflicts": ("conflict",),
    "masked_gram": ("gram", "sum_blocks"),
    "fused_apply": ("apply",),
}
WAITS_OF = {
    "select_cores": (2, 1),
    "overlap_counts": (1, 0),
    "resolve_conflicts": (0, 0),
    "masked_gram": (1, 1),
    "fused_apply": (1, 0),
}
TASKS = 3  # of the calls whose launches are counted, as gpu-check has them
# What tests count, and what it was before: launches of a call over 291 tensors, waits of the host.
FREEZING = {"restore": ("up to 582", "1"), "pull": ("2 waits a tensor", "3, no wait")}
WAITS = {
    "a piece of a selection": ("15", "2", "for counts with masks, for candidates"),
    "a slice of a fusion": ("26", "2", "for its sums, its core elements (and the check of owners by a user's rule)"),
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
    sizes, card = llama(32, 4096, 11008, 32000), CARDS["sm_90"]
    yield (
        "Launches and waits of a call over the 291 tensors of a Llama of 7 billion, three tasks, one after another and "
        f"in one buffer a model; ms predicted for an {card.name}: what moves, and what they add to it at "
        f"{1e6 * LAUNCH:.0f} µs a launch and {1e6 * WAIT:.0f} µs a wait, which are assumed:"
    )
    yield ""
    yield "| call | launches | waits | + ms | in one buffer | waits | + ms | what moves, ms |"
    yield "|---|---|---|---|---|---|---|---|"
    together = counted_flat(len(sizes))
    for call, count in counted(sizes).items():
        alone, now = WAITS_OF[call][0] * len(sizes), WAITS_OF[call][1]
        moved = sum(catalog.entry(kernel, "bf16", TASKS).bytes_moved for kernel in KERNELS_OF[call])
        cells = [
            *(count, alone, f"{1e3 * host_seconds(count, alone):.1f}"),
            *(together[call], now, f"{1e3 * host_seconds(together[call], now):.3f}"),
            f"{1e3 * sum(sizes) * moved / card.bandwidth:.1f}",
        ]
        yield f"| {call} | {' | '.join(map(str, cells))} |"
    yield ""
    yield "Launches of freezing over as many:"
    yield ""
    yield "| call | before | now |"
    yield "|---|---|---|"
    for call, (before, after) in FREEZING.items():
        yield f"| {call} | {before} | {after} |"
    yield ""
    yield "Waits of the host, four tasks:"
    yield ""
    yield "| | before | now | for what |"
    yield "|---|---|---|---|"
    for what, (before, after, why) in WAITS.items():
        yield f"| {what} | {before} | {after} | {why} |"


def counted(sizes: list[int]) -> dict[str, int]:
    """By call the launches over tensors of so many elements. Their memory is not touched, nor held beyond a tensor's
    own launches: together it would be more than most machines have."""
    scale = torch.zeros(1, TASKS + 1, dtype=torch.float64)
    calls: dict[str, Callable[[list[Tensor], list[Tensor]], object]] = {
        "select_cores": _selected,
        "overlap_counts": lambda x, words: overlap.overlap_counts_per_tensor([[mask] for mask in words]),
        "resolve_conflicts": lambda x, words: overlap.resolve_conflicts("magnitude", x[0], x[1:], words),
        "masked_gram": lambda x, words: gram.masked_gram(x[0], x[1:], words[0]),
        "fused_apply": lambda x, words: apply.fused_apply(x[0], x, scale, [None, *words]),
    }

    def launched(call: Callable[[list[Tensor], list[Tensor]], object], size: int) -> int:
        models = [torch.empty(size, dtype=torch.bfloat16) for _ in range(TASKS + 1)]
        words = [torch.empty(-(-size // 32), dtype=torch.int32) for _ in range(TASKS)]
        return len(offline.record(lambda: call(models, words)))

    return {name: sum(launched(call, size) for size in sizes) for name, call in calls.items()}


def _selected(models: list[Tensor], words: list[Tensor]) -> None:
    """What `select_cores` launches over a tensor that has candidates of every region."""
    origin, *tuned = map(elements, models)
    tables = cut_tables([[Bracket(NOTHING, NOTHING)]] * len(tuned))
    lower, _, _ = selection.launch_mark(origin, tuned, words, tables, 0)
    before = torch.empty(-(-len(origin) // selection.BLOCK), dtype=torch.int64)
    for model, upper, maximal in zip(tuned, words, lower, strict=True):
        selection.launch_collect(origin, model, upper, maximal, before, 1, 0)


def counted_flat(tensors: int) -> dict[str, int]:
    """The same over so many tensors in one buffer a model: of whatever sizes, so of small ones."""
    layout = FlatLayout([1] * tensors)
    models = [torch.empty(layout.total, dtype=torch.bfloat16) for _ in range(TASKS + 2)]
    words = [torch.zeros(layout.total // 32, dtype=torch.int32) for _ in range(TASKS)]
    scales, places = torch.zeros(tensors, TASKS + 1), layout.places(models[0].device)
    out, base, *tuned = models

    def selected() -> None:
        origin, *values = map(elements, (base, *tuned))
        upper, tables = torch.stack(words), cut_tables([[Bracket(NOTHING, NOTHING)]] * TASKS)
        lower, counts, _ = selection.launch_mark(origin, values, list(upper), tables, 0)
        flat.collect_all(origin, values, upper, lower, counts.T.long(), places, 1)

    calls: dict[str, Callable[[], object]] = {
        "select_cores": selected,
        "overlap_counts": lambda: flat.flat_overlaps(words, layout),
        "resolve_conflicts": lambda: overlap.resolve_conflicts("magnitude", base, tuned, words),
        "masked_gram": lambda: flat.flat_gram(base, tuned, words[0], layout, 1 << 22),
        "fused_apply": lambda: flat.flat_apply(out, [base, *tuned], scales, [None, *words], layout),
    }
    return {name: len(offline.record(call)) for name, call in calls.items()}


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

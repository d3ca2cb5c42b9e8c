"""Two versions of the Gram kernel side by side, on this processor: python -m benchmarks.kernels.gram_pairs BEFORE

BEFORE is another checkout of this repository (`git worktree add`). Both versions run in one process on the same
tensors, in pairs whose order alternates, with a read of the same tensors between: so a busy machine slows both. A row
has the medians, the median ratio of the pairs for either order, and processor seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cpift_kernels as ck
import torch

from benchmarks import record
from benchmarks.kernels.read_ceiling import read_all
from benchmarks.kernels.speed import DTYPES, parse_size

CORE = 0.05  # share of the elements in the mask


def version_in(checkout: Path) -> ModuleType:
    """The `cpift_kernels` of another checkout, beside this one's."""
    folder = checkout / "kernels/cpift_kernels"
    name = "cpift_kernels_before"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise SystemExit(f"{checkout} has no kernels/cpift_kernels: give a checkout of this repository")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(before: ModuleType, dtype: str, elements: int, tasks: int, pairs: int) -> dict[str, Any]:
    """One row: seconds and processor seconds of both versions, beside a read of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(elements, generator=generator).to(DTYPES[dtype])
    tuned = [(base.float() + 0.01 * torch.randn(elements, generator=generator)).to(base.dtype) for _ in range(tasks)]
    core = ck.pack_mask(torch.rand(elements, generator=generator) < CORE)
    work: dict[str, Callable[[], object]] = {
        "before": lambda: before.masked_gram(base, tuned, core, backend="cpu"),
        "after": lambda: ck.masked_gram(base, tuned, core, backend="cpu"),
        "read": lambda: read_all([base, *tuned]),
    }
    for action in work.values():
        action()
    wall: dict[str, list[float]] = {name: [] for name in work}
    spent: dict[str, list[float]] = {name: [] for name in work}
    for pair in range(pairs):
        first, second = ("before", "after") if pair % 2 else ("after", "before")
        for name in (first, "read", second, "read"):
            seconds, processor = time.perf_counter(), time.process_time()
            work[name]()
            wall[name].append(time.perf_counter() - seconds)
            spent[name].append(time.process_time() - processor)
    medians = {name: statistics.median(seconds) for name, seconds in wall.items()}
    ratios = [after / earlier for earlier, after in zip(wall["before"], wall["after"], strict=True)]
    return {
        "dtype": dtype, "elements": elements, "tasks": tasks, "pairs": pairs, "threads": torch.get_num_threads(),
        **{f"seconds_{name}": value for name, value in medians.items()},
        **{f"cpu_seconds_{name}": statistics.median(seconds) for name, seconds in spent.items()},
        "after_to_before": {
            "after_first": round(statistics.median(ratios[0::2]), 3),
            "before_first": round(statistics.median(ratios[1::2]), 3),
        },
        "share_of_ceiling": {name: round(medians["read"] / medians[name], 3) for name in ("before", "after")},
        "cpu_share_of_ceiling": {
            name: round(statistics.median(spent["read"]) / statistics.median(spent[name]), 3)
            for name in ("before", "after")
        },
    }  # fmt: skip


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = version_in(options.before)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for tasks in options.tasks:
                yield measure(before, dtype, options.size, tasks, options.pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4, 5])
    parser.add_argument("--size", type=parse_size, default=1 << 25, help="elements of a model")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of gram_pairs.jsonl")
    options = parser.parse_args(arguments)
    for row in rows(options):
        record.append("gram_pairs", [row], options.out)
        shares = " ".join(f"{name} {share:.2f}" for name, share in row["share_of_ceiling"].items())
        ratios = ", ".join(
            f"{ratio:.2f} ({order.replace('_', ' ')})" for order, ratio in row["after_to_before"].items()
        )
        print(
            f"{row['dtype']} N={row['tasks']} threads={row['threads']}: of the ceiling {shares}; after/before {ratios}"
        )


if __name__ == "__main__":
    main()

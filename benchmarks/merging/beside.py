"""cpift and mergekit with what a user gets who sets nothing: one file, two commands, in turns.

    python -m benchmarks.merging.beside --work DIR [--venv DIR] [--rounds 2] [--cases slerp-2 ties-4 cpift-4]
    python -m benchmarks.merging.beside --table

A case is a method and how many fine-tunes of 1.2B parameters in bf16 it merges. `mergekit-yaml FILE OUT` and
`cpift merge FILE OUT` read the same file; CPI-FT, which mergekit has not, is `cpift merge BASE MODEL...`. Ours runs
with its checks, which is the default, and once more with --no-verify. Rounds take the commands in turns, every other
round the other way round, so that other load of the machine meets all of them. A row of results/fusion.jsonl has one
case and one tool: seconds by the clock and of processors of each round, the most memory of its own (`speed.Measured`),
and the load. --table prints what docs/comparison.md shows of the last rows of each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.merging.mergekit_environment import MERGEKIT, mergekit
from benchmarks.merging.speed import SHAPES, Measured, make_checkpoint, measure, warm
from benchmarks.record import RESULTS, append

KIND = "beside mergekit"
TOOLS = {"mergekit": MERGEKIT, "cpift": "cpift", "unverified": "cpift --no-verify"}
# mergekit's `parameters` of each method, of every model; slerp has them of the whole.
PER_MODEL: dict[str, dict[str, float]] = {
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}
CASES = [
    "slerp-2",
    *(f"{method}-{count}" for count in (2, 4) for method in ("task_arithmetic", "ties", "dare_ties", "cpift")),
]


def models_of(case: str) -> tuple[str, list[str]]:
    """The method and the names of the folders that a case reads."""
    method, _, count = case.rpartition("-")
    tuned = [f"t{number}" for number in range(1, int(count) + 1)]
    return method, tuned if method == "slerp" else ["base", *tuned]


def recipe(case: str, folder: Path) -> dict[str, Any]:
    """mergekit's file of a case; the models lie in `folder`."""
    method, names = models_of(case)
    paths = [str(folder / name) for name in names]
    merged: dict[str, Any] = {"merge_method": method, "base_model": paths[0]}
    if method == "slerp":
        return merged | {"models": [{"model": path} for path in paths], "parameters": {"t": 0.5}}
    return merged | {"models": [{"model": path, "parameters": PER_MODEL[method]} for path in paths[1:]]}


def commands(case: str, folder: Path, work: Path, venv: Path) -> dict[str, list[str | Path]]:
    """By tool the command that merges a case into `work`/merged."""
    cpift, out = Path(sys.executable).with_name("cpift"), work / "merged"
    method, names = models_of(case)
    if method == "cpift":
        ours: list[str | Path] = [cpift, "merge", *(folder / name for name in names), "--out", out]
        return {"cpift": ours, "unverified": [*ours, "--no-verify"]}
    file = work / f"{case}.yaml"
    file.write_text(yaml.safe_dump(recipe(case, folder)), encoding="utf-8")
    ours = [cpift, "merge", file, out]
    theirs: list[str | Path] = [mergekit(venv), file, out, "--no-copy-tokenizer"]  # there is none that could be loaded
    return {"mergekit": theirs, "cpift": ours, "unverified": [*ours, "--no-verify"]}


def measured(case: str, size: str, work: Path, venv: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a case."""
    _, names = models_of(case)
    folder, found = work / size, dict[str, list[Measured]]()
    for number in range(rounds):
        for tool, command in [*commands(case, folder, work, venv).items()][:: -1 if number % 2 else 1]:
            clean(work)
            warm([folder / name for name in names])
            found.setdefault(tool, []).append(measure(command, {"HF_HUB_OFFLINE": "1"}))
            print(case, tool, found[tool][-1], flush=True)
    clean(work)
    for tool, runs in found.items():
        yield {
            "kind": KIND,
            "case": case,
            "tool": TOOLS[tool],
            "size": size,
            "parameters": sum(info.numel for info in SHAPES[size].tensors()),
            "models_read": len(names),
            "wall": [round(run.wall, 2) for run in runs],
            "processor": [round(run.user + run.system, 2) for run in runs],
            "peak_anonymous": max(run.peak_anonymous for run in runs),
            "peak_resident": max(run.peak_resident for run in runs),
            "load": round(os.getloadavg()[1], 1),  # processes over five minutes; one alone has about 1.5
        }


def clean(work: Path) -> None:
    """Remove what a command made, so that the next finds nothing finished."""
    for left in (work / "merged", work / ".merged.merge"):
        shutil.rmtree(left, ignore_errors=True)


def table() -> str:
    """The last rows of every case and tool, as markdown."""
    text = (RESULTS / "fusion.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row.get("kind") == KIND]
    return "\n".join(_lines({(row["case"], row["tool"]): row for row in rows}))


def _lines(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    yield "| merge | mergekit | cpift | cpift, unverified | mergekit ÷ cpift | verified ÷ unverified |"
    yield "|---|---|---|---|--:|--:|"
    for case in CASES:
        theirs, ours, plain = (rows.get((case, tool)) for tool in TOOLS.values())
        if ours is None or plain is None:
            continue
        method, count = case.rsplit("-", 1)
        beside = f"{_ratio(theirs, ours):.1f}" if theirs else ""
        cells = [f"{method} of {count}", _cell(theirs), _cell(ours), _cell(plain), beside, f"{_ratio(ours, plain):.2f}"]
        yield f"| {' | '.join(cells)} |"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "has it not"
    memory = row["peak_anonymous"] / 1e9
    return f"{median(row['processor']):.0f} s, {median(row['wall']):.0f} s, {memory:.2f} GB"


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Of processor time, round by round."""
    return float(median(a / b for a, b in zip(one["processor"], other["processor"], strict=True)))


def keep(rows: Iterable[Mapping[str, Any]], dry_run: bool) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)
        if not dry_run:
            append("fusion", [row])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and outputs (15 GB at 1.2B)")
    parser.add_argument("--venv", type=Path, help="mergekit's environment [default: WORK/mergekit]")
    parser.add_argument("--size", choices=SHAPES, default="1.2B")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, keep none")
    options = parser.parse_args(arguments)
    if options.table:
        print(table())
        return
    if options.work is None:
        parser.error("--work is missing")
    venv = options.venv or options.work / "mergekit"
    for name in sorted({name for case in options.cases for name in models_of(case)[1]}):
        make_checkpoint(
            options.work / options.size / name, SHAPES[options.size], int(name[1:]) if name != "base" else 0
        )
    for case in options.cases:
        keep(measured(case, options.size, options.work, venv, options.rounds), options.dry_run)


if __name__ == "__main__":
    main()

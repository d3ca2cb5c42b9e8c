"""A sweep's figures as a page: what each field of its space does to every task's score, with intervals.

    cpift sweep sweeps/quickstart_p_tau.yaml                           # ends with runs/quickstart_p_tau/sweep.json
    python -m benchmarks.demo.sweep_page record runs/quickstart_p_tau  # → results/sweep_quickstart_p_tau.jsonl
    python -m benchmarks.demo.sweep_page write quickstart_p_tau        # → docs/sweep_quickstart_p_tau.md, of the rows

`record` replaces the rows: one of θ0, the probes and the space, then one a trial, each figure with its value for every
seed. Effects are paired by seed: for each seed the mean over the other field's values at one end of a field minus that
at the other end, then the mean over seeds with Student's interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import RESULTS, environment
from cpift.config.loading import shown
from cpift.disk.files import write_text
from cpift.evaluation.estimates import Estimate, estimate

PAGES, SWEEPS = (Path(__file__).parents[2] / name for name in ("docs", "sweeps"))
MODELS = ("backbone", "fused", "final")
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "write"])
    parser.add_argument("what", help="record: the sweep's folder; write: the sweep's name")
    options = parser.parse_args()
    if options.action == "record":
        record = json.loads((Path(options.what) / "sweep.json").read_text(encoding="utf-8"))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(record)]
        write_text(RESULTS / f"sweep_{record['name']}.jsonl", "".join(lines))
        return
    rows = read(RESULTS / f"sweep_{options.what}.jsonl")
    about = SWEEPS / f"{options.what}_about.md"
    write_text(
        PAGES / f"sweep_{options.what}.md", page(rows, about.read_text(encoding="utf-8") if about.is_file() else "")
    )


def rows_of(record: dict[str, Any]) -> Rows:
    """`record`: a sweep.json."""
    head = {name: record[name] for name in ("name", "points", "seeds", "confidence", "tasks")}
    figures = {"references": _values(record["references"], record["tasks"])}
    trials = [
        {name: trial[name] for name in ("number", "points", "groups", "status", "seconds")}
        | {"figures": _values(trial["figures"], record["tasks"])}
        for trial in record["trials"]
    ]
    return [head | figures | {"reuse": record["reuse"], "environment": environment()}, *trials]


def _values(figures: dict[str, Any], tasks: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """Each task's own figure and the retentions, one value a seed."""
    wanted = {"mean_retention", "worst_retention", *(figure_of(task, metric) for task, metric in tasks.items())}
    return {
        model: {
            name: [round(value, 6) for value in figure["values"]] for name, figure in by_name.items() if name in wanted
        }
        for model, by_name in figures.items()
    }


def figure_of(task: str, metric: str) -> str:
    return f"task.{task}.{'loss' if metric == 'loss' else 'score'}"


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(rows: Rows, about: str) -> str:
    """The whole page, as Markdown."""
    head, trials = rows[0], [row for row in rows[1:] if row["status"] == "done"]
    fields = {
        name: _ascending(point[name] for row in trials for point in row["points"]) for name in trials[0]["points"][0]
    }
    names = {figure_of(task, metric): f"{task}, {metric}" for task, metric in head["tasks"].items()}
    names |= {"mean_retention": "mean retention", "worst_retention": "worst task's retention"}
    parts = [
        f"# What {' and '.join(fields)} do: {head['name']}",
        about.strip(),
        _how(head, len(rows) - 1),
        "## What each field does\n\n" + _effects(head, trials, fields, names),
        "## The models on the way\n\n" + _models(head, trials, names),
        *(_grid(head, trials, fields, figure, title) for figure, title in names.items()),
        "## Groups\n\n" + _groups(trials),
        "## Cost\n\n" + _cost(head),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(head: dict[str, Any], trials: int) -> str:
    name, seeds = head["name"], ", ".join(map(str, head["seeds"]))
    return (
        f"{head['points']} points, {trials} trials that differ, seeds {seeds}. Scores in %, losses in nats; ± is half "
        f"of the {head['confidence']:.0%} t interval over the seeds. Written by `python -m benchmarks.demo.sweep_page "
        f"write {name}` from the trials' scores, `benchmarks/results/sweep_{name}.jsonl`."
    )


def _ascending(values: Any) -> list[Any]:
    return sorted(set(values))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(figure: str, value: Estimate) -> str:
    scale, digits = (1, 3) if figure.endswith(".loss") else (100, 1)
    spread = "" if value.low is None else f" ±{scale * (value.mean - value.low):.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{spread}"


def _at(trials: Rows, figure: str, model: str, fields: Mapping[str, Any]) -> list[list[float]]:
    """The figure's values, one a seed, at every point with these values of fields."""
    return [
        row["figures"][model][figure] for row in trials for point in row["points"] if fields.items() <= point.items()
    ]


def _effects(head: dict[str, Any], trials: Rows, fields: dict[str, list[Any]], names: dict[str, str]) -> str:
    """The highest value of a field against its lowest, all else equal."""
    ends = {name: (values[0], values[-1]) for name, values in fields.items() if len(values) > 1}
    lines = []
    for figure, title in names.items():
        cells = [_difference(head, trials, figure, name, low, high) for name, (low, high) in ends.items()]
        lines.append([title, *cells])
    heads = [f"{name}: {shown(high)} − {shown(low)}" for name, (low, high) in ends.items()]
    note = "Final model: differences, averaged over all other fields; bold where the interval leaves out zero."
    return f"{note}\n\n" + _table(["", *heads], lines)


def _difference(head: dict[str, Any], trials: Rows, figure: str, name: str, low: Any, high: Any) -> str:
    above, below = (
        [mean(values) for values in zip(*_at(trials, figure, "final", {name: end}), strict=True)] for end in (high, low)
    )
    return _gap(head, figure, above, below)


def _gap(head: dict[str, Any], figure: str, above: Sequence[float], below: Sequence[float]) -> str:
    """The mean difference of values that are paired by seed."""
    gap = estimate([a - b for a, b in zip(above, below, strict=True)], head["confidence"])
    scale, digits = (1, 3) if figure.endswith(".loss") else (100, 1)
    text = f"{scale * gap.mean:+.{digits}f}"
    if gap.low is None or gap.high is None:
        return text
    text += f" [{scale * gap.low:+.{digits}f}, {scale * gap.high:+.{digits}f}]"
    return f"**{text}**" if gap.low > 0 or gap.high < 0 else text


def _models(head: dict[str, Any], trials: Rows, names: dict[str, str]) -> str:
    """θ0 and the probes; over all points the backbone, the fused and the final model, and what the last step adds."""
    lines = [
        [title, *(_cell(figure, estimate(figures[figure], head["confidence"])) for figure in names)]
        for title, figures in head["references"].items()
    ]
    means = {
        model: [[mean(seed) for seed in zip(*_at(trials, f, model, {}), strict=True)] for f in names]
        for model in MODELS
        if all(model in row["figures"] for row in trials)
    }
    for model, by_task in means.items():
        cells = [_cell(f, estimate(m, head["confidence"])) for f, m in zip(names, by_task, strict=True)]
        lines.append([f"{model}, mean over points", *cells])
    for model in list(means)[:-1] if "final" in means else []:
        pairs = zip(names, means["final"], means[model], strict=True)
        lines.append([f"final − {model}", *(_gap(head, f, above, below) for f, above, below in pairs)])
    return _table(["model", *names.values()], lines)


def _grid(head: dict[str, Any], trials: Rows, fields: dict[str, list[Any]], figure: str, title: str) -> str:
    """The final model over the first two fields; nothing where the space has another number of them."""
    if len(fields) != 2:
        return ""
    (rows, down), (columns, across) = fields.items()
    lines = []
    for r in down:
        trials_there = [_at(trials, figure, "final", {rows: r, columns: c}) for c in across]
        cells = [
            _cell(figure, estimate(repeats[0], head["confidence"])) if repeats else "–" for repeats in trials_there
        ]
        lines.append([shown(r), *cells])
    return f"## Final model: {title}\n\n" + _table([f"{rows} ↓, {columns} →", *map(shown, across)], lines)


def _groups(trials: Rows) -> str:
    lines = []
    for row in trials:
        points = "; ".join(
            ", ".join(f"{name} {shown(value)}" for name, value in point.items()) for point in row["points"]
        )
        lines.append(
            [
                str(row["number"]),
                points,
                "<br>".join(" → ".join(" + ".join(g) for g in groups) for groups in row["groups"]),
            ]
        )
    return "One line a seed, in the order of the stages.\n\n" + _table(["trial", "points", "groups"], lines)


def _cost(head: dict[str, Any]) -> str:
    lines = [
        [
            stage["stage"],
            str(stage["needed"]),
            str(stage["made"]),
            f"{stage['seconds_needed']:.0f}",
            f"{stage['seconds_made']:.0f}",
        ]
        for stage in head["reuse"]
    ]
    note = "Outputs and seconds of the stages' own work, beside what a separate run of every point and seed would make."
    return f"{note}\n\n" + _table(["stage", "in separate runs", "made", "s in separate runs", "s"], lines)


if __name__ == "__main__":
    main()

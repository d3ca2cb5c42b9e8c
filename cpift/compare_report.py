"""A comparison as Markdown with SVG plots, and as a table for the terminal. Every number comes from the record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cpift.compare_plots import curve, intervals, standalone
from cpift.compare_record import BASE, OURS, PROBES, RECOMMENDED, Record, record_text
from cpift.compare_verdict import FULL, REPLAYED, Findings, Line, number, points, share, signed
from cpift.escaping import markdown
from cpift.estimates import Estimate
from cpift.metrics import metric_of
from cpift.retention import DEFINITION, sentences
from cpift.top_files import write_top

_TITLES = {
    "reference": "references",
    "probe": "probes alone",
    "sft": "plain SFT",
    "merge": "merges of the probes, nothing trained after them",
    "cpift": "CPI-FT and its stages",
    "part": "CPI-FT without one part",
    "variant": "variants of CPI-FT",
}


_NAME = "comparison"


def written_files(curves: Iterable[str]) -> tuple[str, ...]:
    """What `write_comparison` may write where these fields have curves."""
    return (f"{_NAME}.jsonl", f"{_NAME}.md", f"{_NAME}-methods.svg", *(_curve_file(_NAME, field) for field in curves))


def write_comparison(record: Record, folder: Path) -> Path:
    """The record, a page and the plots that it shows; returns the page's path.

    Raises ConfigError where one of the files is somebody's own.
    """
    text, plots = document(record, _NAME)
    page = f"{_NAME}.md"
    write_top(
        folder, {**plots, f"{_NAME}.jsonl": record_text(record), page: f"# {markdown(record.header.name)}\n\n{text}"}
    )
    return folder / page


def document(record: Record, prefix: str, level: int = 2) -> tuple[str, dict[str, str]]:
    """The text, and its plots by file name; `prefix` begins those names, `level` is that of the headings."""
    found, plots = Findings(record), dict[str, str]()
    heading = "#" * level
    lines = [f"{heading} Set-up", "", *_setup(record), ""]
    lines += [
        f"{heading} What it shows",
        "",
        *(f"- {_sentence(found, text)}" for text in found.verdict()),
        "",
        _reading(found),
        "",
    ]
    lines += [f"{heading} All methods", "", *_table(found), ""]
    lines += _picture(plots, f"{prefix}-methods.svg", "Mean retention of every method", _forest(found))
    lines += [f"{heading} CPI-FT against each method", "", *_differences(found, OURS), ""]
    if found.has(RECOMMENDED):
        lines += [f"{heading} {RECOMMENDED}, against each method", "", *_differences(found, RECOMMENDED), ""]
    if found.pairs:
        lines += [f"{heading} Forgetting", "", *_forgetting(found), ""]
    for field, values in record.header.comparison.get("curves", {}).items():
        values = [value for value in values if found.has(f"{field} = {value}")]
        if not values:
            continue
        lines += [f"{heading} Over {markdown(field)}", "", *_curve(found, field, values, plots, prefix), ""]
    return "\n".join(lines).rstrip() + "\n", plots


def _picture(plots: dict[str, str], file: str, title: str, svg: str) -> list[str]:
    plots[file] = standalone(svg)
    return [f"![{markdown(title)}]({file})", ""]


def _sentence(found: Findings, text: str) -> str:
    """With the names in it as Markdown shows them; the sentences themselves hold no signs of it."""
    for name in sorted(found.methods, key=len, reverse=True):
        text = text.replace(name, markdown(name))
    return text


# ---- set-up ----------------------------------------------------------------------------------------------------------


def _setup(record: Record) -> Iterator[str]:
    header, config = record.header, record.header.config
    tasks = ", ".join(f"{markdown(task)} ({metric}, {_rows(record, task)})" for task, metric in header.tasks.items())
    yield f"- Model: {_model(config)}, {header.parameters:,} parameters. Tasks: {tasks}."
    lengths = [(name, config.get(name)) for name in ("probe", "integration")]
    staged = config["backbone"].get("training") or config["probe"]
    lengths.insert(1, ("backbone", staged if config["backbone"]["source"] == "staged" else None))
    yield "- " + "; ".join(f"{name}: {_length(one)}" for name, one in lengths if one) + "."
    tau = config["groups"]
    threshold = f"τ = {tau['tau']:g}" if "tau" in tau else f"τ = {tau['tau_chance']:g} × chance"
    yield f"- p = {config['regions']['p']:g}, {threshold}, order {tau['order']}; seeds {_listed(header.seeds)}."
    yield f"- {_overlap(header.overlaps)}"
    versions = ", ".join(
        markdown(f"{name} {found}") for name, found in header.versions.items() if name in ("torch", "transformers")
    )
    yield f"- Made on {markdown(header.device)}, {versions}, commit {markdown((header.commit or 'unknown')[:12])}."


def _rows(record: Record, task: str) -> str:
    trained, test = record.header.train_rows.get(task), len(record.rows[0].scores[task]["items"])
    return f"{trained:,} rows and {test} to test" if trained else f"{test} test rows"


def _model(config: dict[str, Any]) -> str:
    model = config["model"]
    known = model.get("hub") or (model.get("gguf") or {}).get("file")
    return markdown(str(known)) if known else "a local folder" if "path" in model else "random weights"


def _length(training: dict[str, Any]) -> str:
    much = f"{training['steps']} steps" if training.get("steps") else f"{training['epochs']:g} epochs"
    each = "a task" if training.get("steps_per") == "task" else "a stage"
    return f"{much} of {training['batch_size']} rows {each}, learning rate {training['learning_rate']:g}"


def _overlap(overlaps: Sequence[dict[str, Any]]) -> str:
    apart = [v for one in overlaps for i, row in enumerate(one["jaccard"]) for j, v in enumerate(row) if i < j]
    grouped = {json.dumps(sorted(sorted(group) for group in one["groups"])) for one in overlaps}
    several = f"{len(grouped)} different groupings over {len(overlaps)} seeds, with the first seed"
    example = markdown(" → ".join(" + ".join(group) for group in overlaps[0]["groups"]))
    return (
        f"Jaccard overlap of core regions {min(apart):.3f} to {max(apart):.3f}, chance {overlaps[0]['chance']:.3f}; "
        f"groups: {'' if len(grouped) == 1 else several + ' '}{example}."
    )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _reading(found: Findings) -> str:
    header = found.record.header
    text = (
        f"Intervals are {100 * header.confidence:g} % each, over test rows (paired bootstrap, {header.resamples:,} "
        "draws) and seeds (jackknife), not adjusted for their number. They hold for this θ0 and this training data. "
        f"{DEFINITION}"
    )
    if len(header.seeds) == 1:
        text += " **One seed: intervals are over test rows alone and say nothing about another training run.**"
    return text


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(found: Findings) -> Iterator[str]:
    tasks = found.record.header.tasks
    columns = ["method", *(f"{markdown(task)}, {_unit(metric)}" for task, metric in tasks.items())]
    columns += ["mean retention, %", "worst task, %"]
    columns += ["low-resource less others, points"] if found.low else []
    columns += ["mean rank", "tasks below θ0 / own probe", "tokens", "seconds"]
    yield _row(columns)
    yield _row(["---"] + ["--:"] * (len(columns) - 1))
    kind = ""
    for line in (found.line(name) for name in found.methods if found.kind(name) != "curve"):
        if line.kind != kind:
            kind = line.kind
            yield _row([f"*{_TITLES[kind]}*"] + [""] * (len(columns) - 1))
        yield _row(_cells(line, tasks))


def _cells(line: Line, tasks: dict[str, str]) -> list[str]:
    scores = [_score(line.scores[task], metric) for task, metric in tasks.items()]
    below = f"{line.seesaw.below_base} / {line.seesaw.below_probe} of {line.seesaw.tasks}"
    rank = _half(line.rank, 1, 1) if line.rank else "–"
    name = f"**{line.method}**" if line.method in (OURS, RECOMMENDED) else markdown(line.method)
    small = [_half(line.imbalance)] if line.imbalance else []
    figures = [_half(line.mean), _half(line.worst), *small, rank, below if line.method != PROBES else "–"]
    return [name, *scores, *figures, _count(line.tokens), f"{line.seconds:,.0f}"]


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _unit(metric: str) -> str:
    return "nats" if metric_of(metric).by_loss else "%"


def _score(one: Estimate, metric: str) -> str:
    return _half(one, 1, 3) if metric_of(metric).by_loss else _half(one)


def _half(one: Estimate, scale: float = 100, digits: int = 1) -> str:
    """An estimate and half the width of its interval."""
    text = number(scale * one.mean, digits)
    return text if one.low is None else f"{text} ±{number(scale * (one.mean - one.low), digits)}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _differences(found: Findings, ours: str) -> Iterator[str]:
    """A recipe less each method: above zero the recipe is better."""
    yield _row([f"{ours} less …", "mean retention, points", "worst task, points"])
    yield _row(["---", "---", "---"])
    for rival in found.methods:
        if rival != ours and found.kind(rival) not in ("probe", "curve"):
            one = found.against(ours, rival)
            yield _row([markdown(rival), points(one.mean), points(one.worst)])


def _forgetting(found: Findings) -> Iterator[str]:
    yield (
        "A is learnt, then B. ΔA: score on A afterwards less that of A's own probe; ΔB: score on B less that of A's "
        "probe; both in the metric's own units (points; nats of a loss, negated)."
    )
    yield ""
    yield _row(["A → B", "method", "ΔA", "ΔB"])
    yield _row(["---", "---", "---", "---"])
    metrics = found.record.header.tasks
    for one in found.sequences:
        first, second = one.pair
        cells = [_change(one.change.first, metrics[first]), _change(one.change.second, metrics[second])]
        yield _row([markdown(f"{first} → {second}"), markdown(one.method), *cells])
    for ours in found.recipes:
        cuts = {rival: found.cut(ours, rival) for rival in REPLAYED}
        told = [f"{share(one)} less than {markdown(rival)}" for rival, one in cuts.items() if one.low is not None]
        if told:
            yield ""
            yield f"Over all of these {ours} forgets {', and '.join(told)} (a negative share is more)."


def _change(one: Estimate, metric: str) -> str:
    scale, digits = (1, 3) if metric_of(metric).by_loss else (100, 1)
    text = signed(scale * one.mean, digits)
    if one.low is None or one.high is None:
        return text
    return f"{text} [{signed(scale * one.low, digits)}, {signed(scale * one.high, digits)}]"


# ---- plots -----------------------------------------------------------------------------------------------------------


def _forest(found: Findings) -> str:
    names = [
        name for name in found.methods if found.kind(name) not in ("curve", "probe") and name not in (BASE, PROBES)
    ]
    rows = [(name, found.line(name).mean) for name in names]
    return intervals(rows, "Mean retention", "% of each task's own probe, mean over tasks", OURS)


def _curve(found: Findings, field: str, values: Sequence[Any], plots: dict[str, str], prefix: str) -> Iterator[str]:
    lines = {value: found.line(f"{field} = {value}") for value in values}
    drawn = [
        (f"{value:g}" if isinstance(value, float) else str(value), one.mean, one.worst) for value, one in lines.items()
    ]
    references = [(f"{FULL}, mean retention", found.line(FULL).mean)] if found.has(FULL) else []
    yield from _picture(plots, _curve_file(prefix, field), f"Retention over {field}", curve(field, drawn, references))
    yield _row([markdown(field), "mean retention, %", "worst task, %", "groups (first seed)"])
    yield _row(["---", "--:", "--:", "---"])
    for value, one in lines.items():
        groups = " → ".join(" + ".join(group) for group in found.record.rows_of(one.method)[0].groups)
        yield _row([markdown(str(value)), _half(one.mean), _half(one.worst), markdown(groups)])


def _curve_file(prefix: str, field: str) -> str:
    return f"{prefix}-{re.sub('[^a-z0-9]+', '-', field.lower())}.svg"


def first_sentences(record: Record) -> list[str]:
    """What has to be said before the table: of tasks that their own probes did not learn."""
    return sentences(Findings(record).learning)


def comparison_table(record: Record) -> Table:
    """The comparison for the terminal."""
    found = Findings(record)
    table = Table(
        title=f"{record.header.name}: seeds {_listed(record.header.seeds)}", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method")
    for column in ("mean retention", "worst task", f"less {OURS}, points", "tokens"):
        table.add_column(column, justify="right")
    for name in found.methods:
        if found.kind(name) != "probe":
            line = found.line(name)
            less = "" if name == OURS else points(found.against(name, OURS).mean)
            style = "bold" if name == OURS else ""
            table.add_row(name, _half(line.mean), _half(line.worst), less, _count(line.tokens), style=style)
    return table

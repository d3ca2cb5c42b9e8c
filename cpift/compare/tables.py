"""What a comparison's page says and shows, as sentences and tables for any medium. Every number is from the record.

`show` puts text that somebody else chose (names of methods, tasks, fields, machines) into the medium; all other text is
ours and holds no sign of Markdown or HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.compare.contrasts import SCALES
from cpift.compare.findings import FULL, REPLAYED, Findings, Line
from cpift.compare.record import BASE, OURS, PROBES, RECOMMENDED, Record
from cpift.compare.words import number, points, primary_points, share, signed
from cpift.config.run import ModelConfig
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.measures import Forgetting
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.retention import DECIDED, DEFINITION
from cpift.models.sources import source_of

Show = Callable[[str], str]


@dataclass(frozen=True)
class TextTable:
    """A table in a medium's own text. `kinds`: before which row a group of methods of one kind begins, and its name."""

    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)


_TITLES = {
    "reference": "references",
    "probe": "probes alone",
    "sft": "plain SFT",
    "merge": "merges of the probes, nothing trained after them",
    "cpift": "CPI-FT and its stages",
    "part": "CPI-FT without one part",
    "variant": "variants of CPI-FT",
}


# ---- set-up ----------------------------------------------------------------------------------------------------------


def set_up(record: Record, show: Show) -> Iterator[str]:
    """What was compared, how long each model was trained, and where."""
    header, config = record.header, record.header.config
    tasks = ", ".join(f"{show(task)} ({metric}, {_rows(record, task)})" for task, metric in header.tasks.items())
    yield f"Model: {_model(config, show)}, {header.parameters:,} parameters. Tasks: {tasks}."
    lengths = [(name, config.get(name)) for name in ("probe", "integration")]
    staged = config["backbone"].get("training") or config["probe"]
    lengths.insert(1, ("backbone", staged if config["backbone"]["source"] == "staged" else None))
    yield "; ".join(f"{name}: {_length(length)}" for name, length in lengths if length) + "."
    tau = config["groups"]
    threshold = f"τ = {tau['tau']:g}" if "tau" in tau else f"τ = {tau['tau_chance']:g} × chance"
    yield f"p = {config['regions']['p']:g}, {threshold}, order {tau['order']}; seeds {listed(header.seeds)}."
    yield f"{_overlap(header.overlaps, show)}"
    versions = ", ".join(
        show(f"{name} {version}") for name, version in header.versions.items() if name in ("torch", "transformers")
    )
    yield f"Made on {show(header.device)}, {versions}, commit {show((header.commit or 'unknown')[:12])}."


def _rows(record: Record, task: str) -> str:
    trained, test = record.header.train_rows.get(task), len(record.rows[0].scores[task]["items"])
    return f"{trained:,} rows and {test} to test" if trained else f"{test} test rows"


def _model(config: dict[str, Any], show: Show) -> str:
    return show(source_of(ModelConfig.model_validate(config["model"])).elsewhere)


def _length(training: dict[str, Any]) -> str:
    much = f"{training['steps']} steps" if training.get("steps") else f"{training['epochs']:g} epochs"
    each = "a task" if training.get("steps_per") == "task" else "a stage"
    return f"{much} of {training['batch_size']} rows {each}, learning rate {training['learning_rate']:g}"


def _overlap(overlaps: Sequence[dict[str, Any]], show: Show) -> str:
    apart = [v for overlap in overlaps for i, row in enumerate(overlap["jaccard"]) for j, v in enumerate(row) if i < j]
    grouped = {json.dumps(sorted(sorted(group) for group in overlap["groups"])) for overlap in overlaps}
    several = f"{len(grouped)} different groupings over {len(overlaps)} seeds, with the first seed"
    example = show(" → ".join(" + ".join(group) for group in overlaps[0]["groups"]))
    return (
        f"Jaccard overlap of core regions {min(apart):.3f} to {max(apart):.3f}, chance {overlaps[0]['chance']:.3f}; "
        f"groups: {'' if len(grouped) == 1 else several + ' '}{example}."
    )


def listed(values: Sequence[Any]) -> str:
    """With commas."""
    return ", ".join(map(str, values))


def reading(findings: Findings) -> str:
    """How the intervals are to be read."""
    header = findings.record.header
    return (
        f"Intervals are {100 * header.confidence:g} % each, over test rows (paired bootstrap, {header.resamples:,} "
        "draws) and seeds (jackknife), not adjusted for their number. They hold for this θ0 and this training data. "
        f"{DEFINITION if header.admission is None else DECIDED}"
    )


def one_seed(findings: Findings) -> str:
    """What is said where there is one seed; empty with several."""
    if len(findings.record.header.seeds) > 1:
        return ""
    return "One seed: intervals are over test rows alone and say nothing about another training run."


# ---- tables ----------------------------------------------------------------------------------------------------------


def all_methods(findings: Findings, show: Show, strong: Show) -> TextTable:
    """Every method but those of curves; `strong` is how CPI-FT's own names are set off."""
    tasks = findings.record.header.tasks
    columns = ["method", *(f"{show(task)}, {_unit(metric)}" for task, metric in tasks.items())]
    columns += ["mean retention, %", "worst task, %"]
    columns += ["low-resource less others, points"] if findings.low else []
    columns += ["mean rank", "tasks below θ0 / own probe", "tokens", "seconds"]
    table = TextTable(columns)
    kind = ""
    for line in (findings.line(name) for name in findings.methods if findings.kind(name) != "curve"):
        if line.kind != kind:
            kind = line.kind
            table.kinds[len(table.rows)] = _TITLES[kind]
        name = strong(line.method) if line.method in (OURS, RECOMMENDED) else show(line.method)
        table.rows.append([name, *_cells(line, tasks)])
    return table


def _cells(line: Line, tasks: dict[str, str]) -> list[str]:
    scores = [_score(line.scores[task], metric) for task, metric in tasks.items()]
    below = f"{line.seesaw.below_base} / {line.seesaw.below_probe} of {line.seesaw.tasks}"
    rank = half(line.rank, 1, 1) if line.rank else "–"
    small = [half(line.imbalance)] if line.imbalance else []
    figures = [half(line.mean), half(line.worst), *small, rank, below if line.method != PROBES else "–"]
    return [*scores, *figures, count(line.tokens), f"{line.seconds:,.0f}"]


def count(value: float | None) -> str:
    """Of tokens."""
    return "–" if value is None else f"{value:,.0f}"


def _unit(metric: str) -> str:
    return "nats" if metric_of(metric).by_loss else "%"


def _score(estimate: Estimate, metric: str) -> str:
    return half(estimate, 1, 3) if metric_of(metric).by_loss else half(estimate)


def half(estimate: Estimate, scale: float = 100, digits: int = 1) -> str:
    """An estimate and half the width of its interval."""
    text = number(scale * estimate.mean, digits)
    return text if estimate.low is None else f"{text} ±{number(scale * (estimate.mean - estimate.low), digits)}"


def differences(findings: Findings, ours: str, show: Show) -> TextTable:
    """A recipe less each method: above zero the recipe is better."""
    table = TextTable([f"{ours} less …", "mean retention, points", "worst task, points"])
    for rival in findings.methods:
        if rival != ours and findings.kind(rival) not in ("probe", "curve"):
            against = findings.against(ours, rival)
            table.rows.append([show(rival), points(against.mean), points(against.worst)])
    return table


PRIMARY = (
    "These differences were named before any score was seen. They are tested together by Holm's procedure: p is "
    "adjusted, and each interval has the confidence of its own test. All else on this page is exploratory."
)


def primary(findings: Findings, show: Show) -> TextTable:
    """The primary contrasts, in points; of ln ratios in hundredths."""
    table = TextTable(["contrast", "by", "difference"])
    for outcome in findings.primary:
        contrast = outcome.contrast
        title = f"{show(contrast.method)} − {show(contrast.rival)}"
        table.rows.append([title, SCALES[contrast.by].title, primary_points(outcome)])
    return table


FORGETTING = (
    "A is learnt, then B. ΔA: score on A afterwards less that of A's own probe; ΔB: score on B less that of A's "
    "probe; both in the metric's own units (points; nats of a loss, negated)."
)


def forgetting(findings: Findings, show: Show) -> TextTable:
    """What is lost of A when B is learnt."""
    table, metrics = TextTable(["A → B", "method", "ΔA", "ΔB"]), findings.record.header.tasks
    for sequence in findings.sequences:
        first, second = sequence.pair
        cells = [_change(sequence.change.first, metrics[first]), _change(sequence.change.second, metrics[second])]
        table.rows.append([show(f"{first} → {second}"), show(sequence.method), *cells])
    return table


def forgets(findings: Findings, show: Show) -> Iterator[str]:
    """How much less a recipe forgets over all pairs than what it is measured against."""
    for ours in findings.recipes:
        cuts = {rival: findings.cut(ours, rival) for rival in REPLAYED}
        cuts_shown = [
            f"{share(estimate)} less than {show(rival)}" for rival, estimate in cuts.items() if estimate.low is not None
        ]
        if cuts_shown:
            yield f"Over all of these {ours} forgets {', and '.join(cuts_shown)} (a negative share is more)."


def _change(estimate: Estimate, metric: str) -> str:
    scale, digits = (1, 3) if metric_of(metric).by_loss else (100, 1)
    text = signed(scale * estimate.mean, digits)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{signed(scale * estimate.low, digits)}, {signed(scale * estimate.high, digits)}]"


ARRIVAL = (
    "A is learnt by its own probe, then B from there at each learning rate, without A's rows unless a method replays "
    "some. ΔA: score on A afterwards less that of A's probe; ΔB: score on B less that of A's probe; both in the "
    "metric's own units (points; nats of a loss, negated)."
)


def arrival(findings: Findings, show: Show) -> TextTable:
    """What every method kept of A and learnt of B, by learning rate."""
    table, metrics = TextTable(["A → B", "method", "learning rate", "ΔA", "ΔB"]), findings.record.header.tasks
    for point in findings.frontiers.points:
        first, second = point.pair
        cells = [_change(point.change.first, metrics[first]), _change(point.change.second, metrics[second])]
        table.rows.append([show(f"{first} → {second}"), show(point.label), f"{point.learning_rate:g}", *cells])
    return table


def at_equal_gain(findings: Findings, show: Show) -> TextTable:
    """ΔA of every method at one ΔB; empty where none is named, or no pair's tasks count."""
    at = findings.frontiers.at
    if at is None:
        return TextTable([])
    head = ["method", f"ΔA at the ΔB of {show(at[0])} {at[1]:g}", f"less {show(at[0])}"]
    table = TextTable(head)
    for label, kept, difference in findings.frontiers.estimates():
        value = half(kept) if math.isfinite(kept.mean) else "does not get there"
        table.rows.append([show(label), value, "" if label == at[0] else points(difference)])
    return table


def arrival_lines(findings: Findings, pair: tuple[str, str]) -> dict[str, list[tuple[float, Forgetting]]]:
    """By method, its learning rates and what each did on A → B."""
    found: dict[str, list[tuple[float, Forgetting]]] = {}
    for point in findings.frontiers.points:
        if point.pair == pair:
            found.setdefault(point.label, []).append((point.learning_rate, point.change))
    return found


def by_losses(findings: Findings, pair: tuple[str, str]) -> bool:
    """Whether a task of a pair is measured by its loss."""
    return any(metric_of(findings.record.header.tasks[task]).by_loss for task in pair)


# ---- plots -----------------------------------------------------------------------------------------------------------


def drawn_methods(findings: Findings) -> list[tuple[str, Estimate]]:
    """The methods of the picture and their mean retention."""
    kinds = ("curve", "probe")
    names = [name for name in findings.methods if findings.kind(name) not in kinds and name not in (BASE, PROBES)]
    return [(name, findings.line(name).mean) for name in names]


def fields_of_curves(findings: Findings) -> dict[str, list[Any]]:
    """By field, the values of it that the record has a method of."""
    said = findings.record.header.comparison.get("curves", {})
    known = {name: [value for value in values if findings.has(f"{name} = {value}")] for name, values in said.items()}
    return {name: values for name, values in known.items() if values}


def curve_points(findings: Findings, name: str, values: Sequence[Any]) -> list[tuple[str, Estimate, Estimate]]:
    """Of each value its text, mean retention and worst task."""
    lines = [findings.line(f"{name} = {value}") for value in values]
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return [(text, line.mean, line.worst) for text, line in zip(texts, lines, strict=True)]


def curve_references(findings: Findings) -> list[tuple[str, Estimate]]:
    """What a curve is drawn beside."""
    return [(f"{FULL}, mean retention", findings.line(FULL).mean)] if findings.has(FULL) else []


def curve_rows(findings: Findings, name: str, values: Sequence[Any], show: Show) -> TextTable:
    """Retention and groups over a field's values."""
    table = TextTable([show(name), "mean retention, %", "worst task, %", "groups (first seed)"])
    for value in values:
        line = findings.line(f"{name} = {value}")
        groups = " → ".join(" + ".join(group) for group in findings.record.rows_of(line.method)[0].groups)
        table.rows.append([show(str(value)), half(line.mean), half(line.worst), show(groups)])
    return table

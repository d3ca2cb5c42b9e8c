"""Where a run comes from, and what became of the tasks that the model had before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.config.loading import read_yaml
from cpift.config.run import RunConfig
from cpift.errors import ConfigError
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.retention import alike_half, difference, probe_of
from cpift.evaluation.scores import Score
from cpift.lineage.parent import CONFIG

_LONGEST = 100  # runs that are gone through
BEFORE = "before"  # the model that a run goes on from
Scores = Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True)
class Generation:
    """A run of a history. change: `sounds, geography`, then `+ sums` or `− sums`."""

    run: Path
    change: str
    parent: Path | None = None


def generations(config: RunConfig) -> list[Generation]:
    """The runs behind a run that goes on from another, the oldest first, and itself; as far as they are there."""
    parent = config.parent
    raw = {
        "tasks": [{"name": task.name} for task in config.tasks],
        "parent": parent and {"run": str(parent.run), "forgotten": parent.forgotten},
    }
    found = [_generation(config.output_dir, raw)]
    while (before := found[-1].parent) is not None and len(found) < _LONGEST:
        found.append(generation(before) or Generation(before, "is not there any more"))
    return found[::-1]


def generation(root: Path) -> Generation | None:
    """A run by the file that its report left; None where that says nothing."""
    try:
        return _generation(root, read_yaml(root / CONFIG))
    except (ConfigError, KeyError, TypeError, AttributeError):
        return None


def _generation(root: Path, raw: Mapping[str, Any]) -> Generation:
    names, parent = ", ".join(str(task["name"]) for task in raw["tasks"]), raw.get("parent")
    if not parent:
        return Generation(root, names)
    out = parent.get("forgotten")
    return Generation(root, f"− {out}" if out else f"+ {names}", Path(str(parent["run"])))


# ---- what became of the tasks ----------------------------------------------------------------------------------------


def headline(config: RunConfig, scores: Scores) -> str:
    """What a task more or a task less did, in a few sentences. `scores`: with their rows."""
    assert config.parent is not None
    last = scores[list(scores)[-1]]
    before, whole = scores[BEFORE], config.parent.run.name
    if config.parent.forgotten:
        kept = _changes([task.name for task in config.tasks], before, last)
        return f"{whole} without {config.parent.forgotten}: {kept}. {_CAVEAT}"
    new = "; ".join(_own(task.name, scores, last) for task in config.tasks)
    rows = [task.name for task in config.scored if task in config.earlier]
    gone = [task.name for task in config.earlier if task.name not in rows]
    kept = f" Earlier tasks: {_changes(rows, before, last)}." if rows else ""
    unknown = f" Not scored, for their test rows are not there: {', '.join(gone)}." if gone else ""
    return f"{whole} with {new}.{kept}{unknown} {_CAVEAT}"


_CAVEAT = "Intervals (95 %) are over test rows, of one seed."


def _own(task: str, scores: Scores, last: Mapping[str, Score]) -> str:
    beside = {"before": scores[BEFORE], "its own fine-tune": scores.get(probe_of(task), {})}
    others = ", ".join(f"{title} {_shown(one[task])}" for title, one in beside.items() if task in one)
    return f"{task}: {_shown(last[task])} ({others})"


def _changes(tasks: Sequence[str], before: Mapping[str, Score], after: Mapping[str, Score]) -> str:
    return "; ".join(f"{task} {_change(before[task], after[task])}" for task in tasks)


def _change(before: Score, after: Score) -> str:
    """For example `51.0 → 48.0 %, −3.0 [−7.1, +1.1] points: no loss shown`."""
    gain = gain_of(before, after)
    counted = after["score"] is not None
    arrow = f"{_shown(before).removesuffix(' %')} → {_shown(after).removeprefix('loss ')}"
    if gain is None or gain.low is None or gain.high is None:
        return arrow
    scale, digits, unit = (100, 1, "points") if counted else (1, 3, "nats better")
    middle, low, high = (f"{scale * value:+.{digits}f}" for value in (gain.mean, gain.low, gain.high))
    outcome = "lost" if gain.high < 0 else "gained" if gain.low > 0 else "no change shown"
    return f"{arrow}, {middle} [{low}, {high}] {unit}: {outcome}"


def gain_of(before: Score, after: Score) -> Estimate | None:
    """By how much a task is better than before, paired by test row; None where rows are not at hand.

    Where the same came of every row, up to `alike_half` of all rows may yet do otherwise.
    """
    gain = difference(after, before)
    if gain is None or after["score"] is None or gain.low is None or gain.high is None or gain.low < gain.high:
        return gain
    half = alike_half(len(after["examples"]))
    return Estimate([], gain.mean, max(-1.0, gain.low - half), min(1.0, gain.high + half))


def _shown(score: Score) -> str:
    return f"loss {score['loss']:.3f}" if score["score"] is None else f"{100 * score['score']:.1f} %"

"""The config of a run that goes on from a finished one: its parent's own, less what is done, and what is new.

What it asks for is then found, made or refused as in every run. Of the parent's file, fields that stay say what is
done in the same way: θ0, how probes are trained and cores are chosen, groups, fusion, the last stage, scoring.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpift.config.code import place_words
from cpift.config.loading import Fields, parse_config, read_yaml, secret_problems
from cpift.config.paths import resolve_paths
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.errors import ConfigError, Problem
from cpift.lineage.parent import CONFIG, Parent, read_parent

REPLAY = "replay"  # of a new task's file, beside the fields of a task
_OF_EARLIER = ("name", "train", "test", "validation", "holdout", "metric", "max_new_tokens")


def extended(
    root: Path,
    task: Mapping[str, Any],
    folder: Path,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    changes: Fields | None = None,
) -> RunConfig:
    """A finished run with one more task.

    task: fields of a task, as a run's file has them, with paths from `folder`; and `replay`, names of earlier tasks
    whose training rows go along in the last stage. output: default RUN-with-TASK. overrides, changes: as in
    `load_config`. Raises ConfigError for what cannot be extended so.
    """
    parent, raw = _opened(root)
    new, replay, problems = _new_task(task, folder)
    name, earlier = str(new.get("name", "")), [*_earlier(raw), *raw["tasks"]]
    if name in (names := [one["name"] for one in earlier]):
        what = f"{name!r} is a task of {root} already; it has {', '.join(names)}"
        problems.append(Problem("name", what, "give the new task a name of its own"))
    if not _earlier(raw) and all(one.get("checkpoint") for one in raw["tasks"]):
        what = f"all probes of {root} are given checkpoints, so it says nothing of how a probe is trained"
        remedy = f"add the new fine-tune with its `checkpoint` to {root / CONFIG}, and run that as a run of its own"
        problems.append(Problem("RUN", what, remedy))
    held = [_still_there(one) for one in earlier]
    trainable = [one["name"] for one in held if "train" in one]
    for gone in [one for one in replay if one in names and one not in trainable]:
        what = f"the training rows of {gone!r} are not there any more"
        problems.append(Problem(REPLAY, what, "put them back where they were, or leave the task out of `replay`"))
    for unknown in [one for one in replay if one not in names]:
        problems.append(Problem(REPLAY, f"{unknown!r} is no earlier task", f"there are {', '.join(names)}"))
    if problems:
        raise ConfigError("new task", problems)
    raw |= {"tasks": [new], "parent": _parent_of(parent, tasks=held, replay=list(replay))}
    raw.pop("baselines", None)
    raw["fusion"] = _without(raw.get("fusion", {}), "weights", "densities")
    if isinstance(raw.get("integration"), dict):
        raw["integration"] = _without(raw["integration"], "penalty", "freeze")
    return _config(raw, root, f"with-{name}", output, overrides, changes)


def forgotten(
    root: Path,
    task: str,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    changes: Fields | None = None,
) -> RunConfig:
    """A finished run without one of its tasks. output: default RUN-without-TASK. Raises ConfigError for what cannot be
    taken out, and where probes that are to be kept are gone."""
    parent, raw = _opened(root)
    if problems := [*_cannot_forget(root, raw, task), *_gone(parent, raw, task)]:
        raise ConfigError("forget", problems)
    raw["tasks"] = [one for one in raw["tasks"] if one["name"] != task]
    raw["parent"] = _parent_of(parent, forgotten=task)
    fusion: Any = raw.get("fusion")
    if isinstance(fusion, dict):
        for by_task in (fusion.get("weights"), fusion.get("densities")):
            if isinstance(by_task, dict):
                by_task.pop(task, None)
    return _config(raw, root, f"without-{task}", output, overrides, changes)


def _opened(root: Path) -> tuple[Parent, dict[str, Any]]:
    """A finished run, and the fields of its file."""
    parent = read_parent(root)
    raw = read_yaml(root / CONFIG)
    if not isinstance(raw.get("tasks"), list) or not all(_is_task(one) for one in [*raw["tasks"], *_earlier(raw)]):
        what = f"{root / CONFIG} holds no tasks of a run"
        raise ConfigError(
            f"run {root}", [Problem("tasks", what, f"write it again: cpift report CONFIG --output={root}")]
        )
    return parent, raw


def _is_task(task: Any) -> bool:
    return isinstance(task, dict) and isinstance(task.get("name"), str)


def _earlier(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    parent = raw.get("parent")
    return list(parent.get("tasks") or ()) if isinstance(parent, dict) else []


def _parent_of(parent: Parent, **fields: Any) -> dict[str, Any]:
    return {"run": str(parent.root), "fingerprint": parent.fingerprint, **fields}


def _config(
    raw: dict[str, Any], root: Path, what: str, output: Path | None, overrides: Sequence[str], changes: Fields | None
) -> RunConfig:
    raw["name"] = f"{raw.get('name', root.name)}-{what}"
    raw["output"] = str(output or root.parent / f"{root.name}-{what}")
    config = parse_config(raw, root, raw["name"], overrides, changes)
    if root.resolve() in (place := config.output_dir.resolve(), *place.parents):
        what = f"{root} is the run that is gone on from" if place == root.resolve() else f"{place} is inside of {root}"
        remedy = "give another folder: a finished run is only read"
        raise ConfigError(raw["name"], [Problem("output", what, remedy)])
    return config


def _without(section: Any, *fields: str) -> Any:
    return (
        {name: value for name, value in section.items() if name not in fields} if isinstance(section, dict) else section
    )


# ---- a task more -----------------------------------------------------------------------------------------------------


def _new_task(task: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Sequence[str], list[Problem]]:
    """Its fields with whole paths, the tasks to replay, and what is wrong."""
    new = {name: value for name, value in task.items() if name != REPLAY}
    replay = task.get(REPLAY) or []
    problems = secret_problems(new)
    if not isinstance(replay, list) or not all(isinstance(one, str) for one in replay):
        problems.append(Problem(REPLAY, f"is {replay!r}, no list of names", "write replay: [task, task]"))
        replay = []
    if "tasks" in new:
        what = "is a list of tasks, and one is added at a time"
        problems.append(Problem("tasks", what, "write the fields of the one task: name, train, test, metric"))
    elif not isinstance(name := new.get("name"), str):
        what = "is not there" if name is None else f"is {name!r}, and no text"
        problems.append(Problem("name", what, "give the new task a name, in quotes if it is a number"))
    placed = {"tasks": [new]}
    problems += [*resolve_paths(placed, folder), *place_words(placed, folder)]
    return new, replay, problems


def _still_there(task: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier task, less the rows whose files are gone."""
    kept = {name: task[name] for name in _OF_EARLIER if task.get(name) is not None}
    for split in ("train", "test", "validation"):
        file = kept[split].get("file") if isinstance(kept.get(split), dict) else None
        if file is not None and not Path(file).exists():
            del kept[split]
    if "train" not in kept:
        kept.pop("holdout", None)
    return kept


# ---- a task less -----------------------------------------------------------------------------------------------------


def _cannot_forget(root: Path, raw: Mapping[str, Any], task: str) -> list[Problem]:
    own, earlier = [one["name"] for one in raw["tasks"]], [one["name"] for one in _earlier(raw)]
    if task not in (*own, *earlier):
        close = difflib.get_close_matches(task, (*own, *earlier), n=1)
        there = f"there are {', '.join((*earlier, *own))}"
        return [Problem("TASK", f"{root} has no task {task!r}", f"did you mean {close[0]}?" if close else there)]
    if earlier:
        before = raw["parent"].get("run")
        if task in own:
            return [
                Problem("TASK", f"{task!r} came in by `cpift extend`", f"the model without it is the one of {before}")
            ]
        what = f"{task!r} is inside the model that {root} began with, whose other cores it protects"
        again = " and ".join(own)
        return [Problem("TASK", what, f"cpift forget {before} {task}, and then extend that by {again} again")]
    if len(own) == 1:
        return [Problem("TASK", f"{task!r} is the only task of {root}", "the model without it is θ0")]
    return []


def _gone(parent: Parent, raw: Mapping[str, Any], task: str) -> list[Problem]:
    """Probes that are to be kept, and are not there with their weights."""
    kept = [one["name"] for one in raw["tasks"] if one["name"] != task and not one.get("checkpoint")]
    problems = []
    for name in kept if not _earlier(raw) else ():
        probe = parent.probe(name)
        if probe is None or not probe.has_weights:
            problems.append(Problem(f"probe {name}", *_lost(parent, probe)))
    return problems


def _lost(parent: Parent, probe: Artifact | None) -> tuple[str, str]:
    again = f"make it again: {shlex.join(['cpift', 'run', str(parent.root / CONFIG), f'--output={parent.root}'])}"
    if probe is None:
        return f"is not in {parent.root}, and the model without a task is made of the other tasks' probes", again
    state = probe.state()
    why = (
        "its weights were deleted (`cpift clean` does that)" if state.kind == "dropped" else f"is damaged: {state.why}"
    )
    return f"{probe.path}: {why}", again

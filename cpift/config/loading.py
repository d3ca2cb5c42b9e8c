"""From a YAML file to a RunConfig, or to one message that lists everything wrong with it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cpift.config.code import place_words, with_short_words
from cpift.config.paths import expand_paths, is_path, resolve_paths
from cpift.config.problems import problems_of
from cpift.config.run import RunConfig
from cpift.errors import ConfigError, Problem
from cpift.other_tools.answers import answered
from cpift.text.redaction import HIDDEN, holds_secret, redacted_values, secret_fields
from cpift.untrusted.json import CONFIG, UnreadableError
from cpift.untrusted.values import kind_of
from cpift.untrusted.yaml import parse_yaml, read_yaml_file

_EXAMPLE = "`name: value` on each line; `cpift init` writes such a file, `cpift init --example quickstart` copies one"
_SECRET = "holds a password or a key, which does not belong into a config: it is shown in reports and logs"
# Fields of one section of which exactly one may be given: setting one by name takes the other's place.
_ALTERNATIVES = {"tau": "tau_chance", "tau_chance": "tau", "steps": "epochs", "epochs": "steps"}

Value = str | int | float | bool
Fields = dict[str, Any]  # a point of the space that a sweep looks through: dotted field name → value


def load_config(path: Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Read, override (`field.name=value`, the value as in YAML) and validate a run's YAML file.

    changes: values by dotted field, taken as they are and last: what options of the command line say.

    Raises ConfigError listing every problem: unreadable YAML, unknown or missing fields, wrong types, values out of
    range. Files that the config names are checked later, by `preflight`, together with their contents.
    """
    return parse_config(read_yaml(path), path.absolute().parent, str(path), overrides, changes)


def parse_config(
    raw: dict[str, Any],
    folder: Path,
    subject: str,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """As `load_config`, from a mapping whose relative paths are meant from `folder`; `subject` names it in errors."""
    problems = [problem for text in overrides if (problem := _override(raw, text)) is not None]
    problems += secret_problems(raw)  # as it was written: what is made absolute is another text
    problems += resolve_paths(raw, folder)
    problems += _changed(raw, changes or {})
    problems += place_words(raw, folder)
    _require_run(raw, subject)
    return _validated(raw, subject, problems)


def _require_run(raw: Mapping[str, Any], subject: str) -> None:
    """Raise ConfigError for a sweep's or a comparison's file: it names the run that it is about."""
    if not isinstance(raw.get("run"), str) or {"tasks", "model"} & set(raw):
        return
    if "space" in raw:
        what, then = (
            "this is a sweep's file, over values of a run's fields",
            f"`cpift sweep {subject}` checks all points",
        )
    else:
        what, then = "this is a comparison's file, of a run", f"`cpift compare {subject}` checks all methods"
    raise ConfigError(
        subject, [Problem("run", what, f"`cpift plan {raw['run']}` plans its run; {then} before any starts")]
    )


def with_fields(config: RunConfig, fields: Mapping[str, Any], subject: str) -> RunConfig:
    """A loaded config with some fields (by dotted name) set anew; of two alternatives the other one is unset.

    Raises ConfigError for unknown fields and values that do not fit.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    return _validated(raw, subject, _changed(raw, fields))


def check_fields(raw: dict[str, Any], subject: str, problems: Sequence[Problem] = ()) -> None:
    """Raise ConfigError with these problems and whatever else is wrong with a run's fields; paths are not looked at."""
    _validated(raw, subject, list(problems))


def secret_problems(raw: Any) -> list[Problem]:
    """Passwords and keys in what a file holds, by field; they are not repeated."""
    remedy = (
        "take it out and set it in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for an object store, "
        "the variable that evaluation.judge.key_variable names for a judge, HF_TOKEN for the hub"
    )
    return [Problem(field, _SECRET, remedy) for field in secret_fields(raw)]


def _validated(raw: dict[str, Any], subject: str, problems: list[Problem]) -> RunConfig:
    problems = list(dict.fromkeys([*problems, *secret_problems(raw)]))
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        wrong = problems_of(error, RunConfig)
        problems += [replace(problem, where=_with_task(problem.where, raw)) for problem in wrong]
    if problems:
        secret = {problem.where for problem in problems if problem.what == _SECRET}  # all else would show the value
        raise ConfigError(
            subject, [problem for problem in problems if problem.what == _SECRET or problem.where not in secret]
        )
    return config


def _with_task(where: str, raw: Mapping[str, Any]) -> str:
    """A field's path with the name of the task beside its number, where it has one."""
    number = re.match(r"tasks\.(\d+)(?=\.|$)", where)
    tasks = raw.get("tasks")
    if number is None or not isinstance(tasks, list) or int(number[1]) >= len(tasks):
        return where
    name = tasks[int(number[1])].get("name") if isinstance(tasks[int(number[1])], dict) else None
    return f"{number[0]} ({name}){where[number.end() :]}" if isinstance(name, str) and name else where


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, defaults included: what a run was really made with, but for secrets."""
    return dump_fields(with_short_words(config.model_dump(mode="json", exclude_none=True)))


def dump_fields(fields: Any) -> str:
    """Fields of a file as YAML, in their order, without secrets."""
    return yaml.safe_dump(redacted_values(fields), sort_keys=False, allow_unicode=True)


class _OneLine(yaml.SafeDumper):
    """Texts of several lines in quotes with escapes, not over several lines."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        lines = len(f"{text}.".splitlines()) > 1
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if lines else None)


_OneLine.add_representer(str, _OneLine.represent_str)


def one_line_yaml(value: Any) -> str:
    """A value as it stands in one line of a file."""
    dumped = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=2**31, sort_keys=False
    )
    return dumped.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's fields. Raises ConfigError where it is no mapping in YAML within the limits of `untrusted.json.CONFIG`,
    and with the command to use where it is another tool's."""
    try:
        raw = read_yaml_file(path)
    except OSError as error:
        raise ConfigError(str(path), [Problem("file", error.strerror or str(error), _path_remedy(path))]) from None
    except UnreadableError as error:
        raise ConfigError(str(path), [error.problem("YAML")]) from None
    if not isinstance(raw, dict):
        what = f"holds {kind_of(raw)}, not fields" if raw is not None else "is empty"
        raise ConfigError(str(path), [Problem("YAML", what, _EXAMPLE)])
    if answer := answered(raw):
        raise ConfigError(str(path), answer)
    return raw


def _path_remedy(path: Path) -> str:
    """What to do about a file that cannot be read: the one beside it that has nearly its name."""
    beside = {file.stem: file for file in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.stem, beside, n=1)
    return f"did you mean {beside[close[0]]}?" if close and beside[close[0]] != path else "check the path"


def _changed(raw: dict[str, Any], fields: Mapping[str, Any]) -> list[Problem]:
    """Set fields (by dotted name) in the raw mapping; what is wrong with them."""
    problems = (_set_field(raw, name, value, name) for name, value in fields.items())
    return [problem for problem in problems if problem is not None]


def _override(raw: dict[str, Any], text: str) -> Problem | None:
    """Set `a.b=value` (value read as YAML) in the raw mapping; list elements by number: `tasks.0.name=x`."""
    key, equals, value = text.partition("=")
    where = f"--set {key}={HIDDEN}" if holds_secret(text) else f"--set {text}"
    if not equals:
        return Problem(where, "has no '='", "write it as field.name=value")
    try:
        parsed = parse_yaml(value)
    except UnreadableError as error:
        return error.problem(where)
    name, value = key.strip(), value.strip()
    if is_path(name) and parsed not in (None, value) and value[:1] not in ("'", '"'):
        what = f"is read as YAML, where this is {parsed!r}"
        return Problem(where, what, f"put a path in quotes of its own: --set '{name}=\"...\"'")
    return _set_field(raw, name, parsed, where)


def _set_field(raw: dict[str, Any], name: str, value: Any, where: str) -> Problem | None:
    *parents, last = name.split(".")
    if len(parents) >= CONFIG.depth:
        return Problem(f"{where[:60]}…", f"names a field {len(parents) + 1} levels deep", "name a field of the file")
    node: Any = raw
    try:
        for part in parents:
            node = node[_place(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[_place(last) if isinstance(node, list) else last] = value
        if value is not None and isinstance(node, dict):
            node.pop(_ALTERNATIVES.get(last), None)
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        return Problem(where, f"cannot be applied ({error})", _number_of(node, name) or "name a field of the file")
    return None


def _number_of(node: Any, name: str) -> str:
    """The remedy where an element of a list was called by its name."""
    elements = enumerate(node if isinstance(node, list) else ())
    called = (
        f"{element['name']} is element {at}"
        for at, element in elements
        if isinstance(element, dict) and "name" in element
    )
    return ", ".join(element for element in called if element.split(" is element ")[0] in name.split("."))


def _place(part: str) -> int:
    """Of an element of a list. Not from its end: the name of a field is the same however it was set."""
    if re.fullmatch("[0-9]{1,4}", part) is None:
        raise ValueError(f"{part!r} is no number of an element, from 0 on")
    return int(part)


_Model = TypeVar("_Model", bound=BaseModel)


def validated(model: type[_Model], raw: Mapping[str, Any], subject: str) -> _Model:
    """The model that the fields of a sweep's or a comparison's file make. Raises ConfigError with every problem.

    Of its paths, the output folder and the run's file may hold variables; a run in it is looked at by itself.
    """
    own = {name: value for name, value in raw.items() if name != "run" or isinstance(value, str)}
    problems = [*secret_problems(raw), *expand_paths(own, ("output", "run"))]
    try:
        valid = model.model_validate({**raw, **own})
    except ValidationError as error:
        problems += problems_of(error, model)
    if problems:
        raise ConfigError(subject, problems)
    return valid


def base_run(
    run: str | dict[str, Any], fixed: Fields, folder: Path, subject: str, overrides: Sequence[str]
) -> RunConfig:
    """The run that a file names (relative to its folder) or holds, with fields set for all points."""
    if isinstance(run, str):
        base = load_config((folder / Path(run).expanduser()).resolve(), overrides)
    else:
        base = parse_config(dict(run), folder, subject, overrides)
    return with_fields(base, fixed, f"{subject} with `fixed`")


def describe(fields: Mapping[str, Any]) -> str:
    """A point in words, for example `regions.p 0.05, groups.tau 0.1`."""
    return ", ".join(f"{name} {shown(value)}" for name, value in fields.items())


def shown(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)

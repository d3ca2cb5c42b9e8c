"""What `cpift merge` is asked for: models as arguments, or a YAML file of mergekit's, both with options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import at_hand
from cpift.config.run import RunConfig
from cpift.config.settings import layer_of
from cpift.errors import ConfigError, CpiftError, Problem
from cpift.merge_folder import merge_config, named_models
from cpift.other_tools.answers import answered
from cpift.other_tools.mergekit import is_mergekit, read_mergekit
from cpift.other_tools.mergekit_flags import understood
from cpift.other_tools.mergekit_models import Merge
from cpift.untrusted.json import UnreadableError
from cpift.untrusted.values import kind_of
from cpift.untrusted.yaml import read_yaml_file

_WRITE = "`cpift merge BASE MODEL... --out FOLDER`, or `cpift merge config.yml FOLDER`"


@dataclass
class Request:
    """Models, the folder to make, and what a file says. subject: what errors are about."""

    base: str
    models: Mapping[str, str]
    out: Path
    subject: str = "merge"
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: int | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def config(
        self, output: Path, fields: Mapping[str, Any], settings: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> RunConfig:
        """The run that merges them. fields and settings: of options; flags: mergekit's. Raises ConfigError with
        everything that is wrong with file and options."""
        asked = understood(flags, fields.get("dtype"))
        self.notes += asked.notes
        problems = [*self.problems, *asked.problems]
        config = None
        try:
            config = merge_config(self.base, self.models, output, fields, {**asked.settings, **settings})
            problems += self._layers(config)
        except ConfigError as error:  # of a file that is half understood, what follows says nothing
            problems += [] if self.problems else error.problems
        if problems or config is None:
            raise ConfigError(self.subject, problems)
        return config

    def _layers(self, config: RunConfig) -> list[Problem]:
        folder = at_hand(config.model)
        if self.layers is None or folder is None:
            return []
        try:
            found = [layer for name in Checkpoint(folder).tensors if (layer := layer_of(name)) is not None]
        except (CpiftError, OSError):
            return []  # the plan says what is wrong with it
        count = 1 + max((number for _, number in found), default=-1)
        if count == self.layers:
            return []
        what = f"is [0, {self.layers}], and {config.model.path or config.model.hub} has {count} layers"
        return [Problem("slices.0.sources.layer_range", what, f"cpift merges all: give [0, {count}], or `models`")]


def requested(base: str, models: Sequence[str], out: Path | None) -> Request:
    """What the arguments of `cpift merge` ask for. Raises ConfigError where they are no request, or the file cannot be
    read; what a file asks and cpift cannot do is in `problems`."""
    path = Path(base).expanduser()
    if path.suffix.lower() in (".yml", ".yaml") and not path.is_dir():
        return _of_file(path, list(models), out)
    if out is None or not models:
        lacking = [] if models else [Problem("MODEL", "is not there", _WRITE)]
        lacking += [] if out is not None else [Problem("--out", "is not there", _WRITE)]
        raise ConfigError("merge", lacking)
    return Request(base, named_models(models), out)


def _of_file(path: Path, rest: list[str], out: Path | None) -> Request:
    if len(rest) + (out is not None) != 1:
        given = f"{len(rest)} arguments follow it" + (", and --out" if out is not None else "")
        raise ConfigError(str(path), [Problem("OUT", f"is not clear: {given}", "`cpift merge config.yml FOLDER`")])
    merge = _read(path)
    place = out if out is not None else Path(rest[0])
    notes = [f"{path}: {note}" for note in dict.fromkeys(merge.notes)]
    problems = list(dict.fromkeys(merge.problems))
    return Request(merge.base, merge.models, place, str(path), merge.fields, merge.layers, notes, problems)


def _read(path: Path) -> Merge:
    subject = str(path)
    try:
        raw = read_yaml_file(path)
    except OSError as error:
        raise ConfigError(subject, [Problem("file", error.strerror or str(error), "check the path")]) from None
    except UnreadableError as error:
        raise ConfigError(subject, [error.problem("YAML")]) from None
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds {kind_of(raw)}, not fields"
        raise ConfigError(subject, [Problem("YAML", what, "give a file of mergekit's")])
    if is_mergekit(raw):
        return read_mergekit(raw)
    if found := answered(raw):
        raise ConfigError(subject, found)
    what = "is a run's file" if "tasks" in raw else "is no file of mergekit's: it has no merge_method"
    raise ConfigError(subject, [Problem("file", what, f"`cpift fuse {path}` merges as a run's file says")])

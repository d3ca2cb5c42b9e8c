"""What `cpift merge` is asked for: models as arguments, or a YAML file of mergekit's, both with options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import at_hand, locate, pinned
from cpift.checkpoints.stacked import layers_in
from cpift.config.run import RunConfig
from cpift.errors import ConfigError, CpiftError, Problem
from cpift.merge_folder import merge_config, named_models
from cpift.merging.stacks.planning import check_stack
from cpift.other_tools.answers import answered
from cpift.other_tools.mergekit import is_mergekit, read_mergekit
from cpift.other_tools.mergekit_flags import understood
from cpift.other_tools.mergekit_models import OF_SLICES, Merge
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
    slices: Sequence[Mapping[str, Any]] = ()
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def config(
        self,
        output: Path,
        fields: Mapping[str, Any],
        settings: Mapping[str, Any],
        flags: Mapping[str, Any],
        download: bool = False,
    ) -> RunConfig:
        """The run that merges them. fields and settings: of options; flags: mergekit's; download: whether θ0 may be, to
        count its layers. Raises ConfigError with everything that is wrong with file and options."""
        asked = understood(flags, fields.get("dtype"))
        self.notes += asked.notes
        problems = [*self.problems, *asked.problems]
        config = None
        try:
            config = self._config(output, fields, {**asked.settings, **settings}, download)
            problems += check_stack(config) if problems and config.fusion.slices else []
        except ConfigError as error:  # of a file that is half understood, what follows says nothing
            problems += [] if self.problems else error.problems
        if problems or config is None:
            raise ConfigError(self.subject, problems)
        return config

    def _config(
        self, output: Path, fields: Mapping[str, Any], settings: Mapping[str, Any], download: bool
    ) -> RunConfig:
        """One slice of all layers is a merge of whole models."""
        plain = merge_config(self.base, self.models, output, fields, settings)
        if not self.slices or "slices" in fields:
            return plain
        count = self._count(plain, download) if self.layers is not None else None
        if self.layers is not None and count in (None, self.layers):
            if count is None:
                self.notes.append(f"{self.subject}: layers are counted once the models are downloaded")
            return plain
        return merge_config(self.base, self.models, output, self._of_slices(fields), settings)

    def _of_slices(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with slices, which have some of them for themselves, unless an option says otherwise."""
        own = {name for name in OF_SLICES if name in fields and fields[name] != self.fields.get(name)}
        gone = {*own, *({"weight"} if "weights" in own else ()), *({"density"} if "densities" in own else ())}

        def without(part: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in part.items() if name not in gone}

        slices = [without(one) | {"sources": [without(source) for source in one["sources"]]} for one in self.slices]
        return {name: value for name, value in fields.items() if name not in OF_SLICES or name in own} | {
            "slices": slices
        }

    def _count(self, config: RunConfig, download: bool) -> int | None:
        """How many layers θ0 has; None where it is not at hand, or the plan says what is wrong with it."""
        try:
            folder = locate(pinned(config.model)) if download else at_hand(config.model)
            return None if folder is None else layers_in(Checkpoint(folder))
        except (CpiftError, OSError):
            return None


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
    return Request(
        merge.base, merge.models, place, str(path), merge.fields, merge.layers, merge.slices, notes, problems
    )


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

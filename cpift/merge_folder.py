"""A merge of checkpoints into an ordinary model folder at a path of the user's, without a YAML file.

It is a run that fuses alone. Its output folder lies beside the path under a name of its own, `.NAME.merge`; the fused
model is renamed to the path once it is whole and checked. After a kill the same merge goes on from there.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.inputs import MODELS
from cpift.config.loading import parse_config
from cpift.config.run import RunConfig
from cpift.console.view import View
from cpift.disk.artifact_state import read_manifest, state_of
from cpift.disk.artifacts import Artifact, claimed
from cpift.disk.files import MANIFEST, read_json
from cpift.disk.locks import exclusive
from cpift.errors import CheckpointError, ConfigError, Problem
from cpift.hub import HUB_ID
from cpift.merging.conflicts import by_stage
from cpift.merging.options import OPTIONS, tune_names
from cpift.merging.registry import METHODS, OF_ALL, reads_moments
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.stages.fuse import FUSION_RECORD
from cpift.text.redaction import is_template

if TYPE_CHECKING:
    from cpift.merging.engine import Merging
    from cpift.method.cores import Cores

_SUBJECT = "merge"
_DEFAULTS = {"backbone.source": "pretrained"}  # `staged`, a run's own, is trained
_OF_METHODS = ("fusion.", "regions.", "groups.", "backbone.")  # sections that decide the values of a merge
_OWN = re.compile(rf"(output|name|tasks|model\.({'|'.join(MODELS)}))(\..*)?|model")
_KEPT = re.compile(r"\.(failed-checks|damaged)(-\d+)?$")


@dataclass(frozen=True)
class MergeResult:
    """A merged model: its folder, what was checked of it, and whether it was there before."""

    path: Path
    checks: tuple[Mapping[str, Any], ...] = field(repr=False)
    cached: bool

    def __fspath__(self) -> str:
        return str(self.path)


def merge_config(
    base: str | os.PathLike[str],
    models: Mapping[str, str | os.PathLike[str]],
    output: Path,
    fields: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run that merges `models` onto `base`; folders, or hub ids with `@revision` where one is meant.

    fields: by keyword of `merging.options.OPTIONS`. settings: of a run, by dotted name. Raises ConfigError.
    """
    problems = [_unknown(name) for name in fields if name not in OPTIONS]
    problems += [Problem(name, what, "leave it out") for name, what in _unused(fields).items()]
    fields = dict(fields)
    moments = _moments(fields, settings or {}, models, problems)
    problems += [
        Problem(name, "is decided by a merge's own arguments", "leave it out") for name in _own(settings or {})
    ]
    if not isinstance(models, Mapping):
        remedy = 'name each: {"maths": "ft-maths"}'
        raise ConfigError(_SUBJECT, [Problem("models", f"is a {type(models).__name__}, not a mapping", remedy)])
    pretrained = given_source("base", base, problems)
    sources = {task: given_source(task, model, problems) for task, model in models.items()}
    if problems:
        raise ConfigError(_SUBJECT, problems)
    name = (
        re.sub(r"[^\w.-]+", "-", output.name.strip(".").removesuffix(".merge"), flags=re.ASCII).strip("-.")[:60]
        or _SUBJECT
    )
    raw: dict[str, Any] = {
        "name": name,
        "model": pretrained,
        "tasks": [{"name": task, "checkpoint": source, **moments.get(task, {})} for task, source in sources.items()],
    }
    changes = {**_DEFAULTS, **{OPTIONS[name].field: _plain(value) for name, value in fields.items()}}
    for place in ("model.chat_template", "backbone.source"):  # paths: from the working directory, as any argument
        if isinstance(value := changes.get(place), str) and not is_template(value):
            changes[place] = str(Path(value).absolute()) if Path(value).expanduser().exists() else value
    changes |= {name: _plain(value) for name, value in (settings or {}).items()} | {"output": str(output)}
    return parse_config(raw, Path.cwd(), _SUBJECT, changes=changes)


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Task names and sources of arguments `NAME=PATH` or `PATH`, which is named by its folder. Raises ConfigError."""
    parts = [_named(argument) for argument in arguments]
    free = iter(tune_names([source for name, source in parts if name is None]))
    pairs = [(name if name is not None else next(free), source) for name, source in parts]
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        problems = [Problem(name, "is the name of two models", "name them apart: NAME=PATH") for name in twice]
        raise ConfigError(_SUBJECT, problems)
    return dict(pairs)


def _named(argument: str) -> tuple[str | None, str]:
    name, equals, source = argument.partition("=")
    if not equals or Path(argument).expanduser().exists() or "/" in name:
        return None, argument
    return name, source


def _unused(fields: Mapping[str, Any]) -> dict[str, str]:
    """Keywords that say nothing to the method that is asked for, and why."""
    method = str(fields.get("method", "cpift"))
    if method not in METHODS:
        return {}
    known = {f"fusion.{name}" for name in (*METHODS[method].fields, *OF_ALL)}
    isolates = ("regions.", "groups.", "backbone.") if method == "cpift" else ()
    unused = [
        name
        for name, option in OPTIONS.items()
        if name in fields and option.field.startswith(_OF_METHODS) and not option.field.startswith(isolates)
    ]
    return {name: f"is not used by {method}" for name in unused if OPTIONS[name].field not in known}


def _moments(
    fields: dict[str, Any], settings: Mapping[str, Any], models: Any, problems: list[Problem]
) -> dict[str, dict[str, str]]:
    """By task, where its second moments are, taken out of the keywords; what is wrong with them goes to `problems`."""
    given = fields.pop("moments", None)
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(file, (str, os.PathLike)) for file in given.values()):
        problems.append(Problem("moments", "are no files by the name of a model", "NAME=FILE of each"))
        return {}
    method = str(settings.get("fusion.method", fields.get("method", "cpift")))
    measure = settings.get("regions.measure", fields.get("measure"))
    if not (reads_moments(method) or (method == "cpift" and measure == "curvature")):
        remedy = "leave them out, or set measure: curvature, or a method that reads them"
        problems.append(Problem("moments", "are read by nothing that is asked for", remedy))
    known = list(models) if isinstance(models, Mapping) else []
    for task in (task for task in given if task not in known):
        problems.append(Problem(f"moments: {task}", "is no model", f"one of {', '.join(map(str, known))}"))
    return {task: {"moments": str(Path(file).expanduser().absolute())} for task, file in given.items()}


def _unknown(name: str) -> Problem:
    close = difflib.get_close_matches(name, OPTIONS, n=1)
    return Problem(name, "is no field of a merge", f"did you mean {close[0]!r}?" if close else f"one of {_known()}")


def _known() -> str:
    return ", ".join(OPTIONS)


def _own(settings: Mapping[str, Any]) -> list[str]:
    """The settings that arguments decide: what is merged, and where to."""
    return [name for name in settings if _OWN.fullmatch(name)]


def given_source(task: str, where: Any, problems: list[Problem]) -> dict[str, str]:
    """A model's place as a config has it: `path`, or `hub` and `revision`. What is wrong goes to `problems`."""
    if not isinstance(where, (str, os.PathLike)):
        problems.append(Problem(str(task), f"is a {type(where).__name__}, not a path", "give a folder or a hub id"))
        return {}
    text = os.fspath(where)
    path = Path(text).expanduser()
    if path.is_dir():
        return {"path": str(path.absolute())}
    hub, _, revision = text.partition("@")
    meant = path.parent != Path(".") and path.parent.is_dir()  # a folder beside others that are there
    if path.exists() or meant or not HUB_ID.fullmatch(hub):
        what = f"{text!r} is a file" if path.exists() else f"{text!r} is no model folder and no hub id"
        remedy = "give a folder with config.json and safetensors, or org/name"
        if path.suffix in (".yaml", ".yml"):  # mergekit's, for example
            remedy = f"`cpift merge {text} OUT` reads a file of mergekit's, which stands alone"
        problems.append(Problem(task, what, remedy))
    return {"hub": hub, **({"revision": revision} if revision else {})}


def _plain(value: Any) -> Any:
    """A value as a file has it."""
    if isinstance(value, Mapping):
        return {name: _plain(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return str(value) if isinstance(value, os.PathLike) else value


# ---- the place -----------------------------------------------------------------------------------------------------


def place_of(out: str | os.PathLike[str], subject: str = _SUBJECT) -> Path:
    """The absolute folder that is to be made; links are followed. Raises ConfigError where there can be none."""
    path = Path(os.path.realpath(Path(out).expanduser()))
    remedy = "give the name of a folder to make"
    if not path.name or os.path.ismount(path):
        raise ConfigError(subject, [Problem("out", f"{path} is a mount point, which cannot be renamed to", remedy)])
    if path.exists() and not path.is_dir():
        raise ConfigError(subject, [Problem("out", f"{path} is a file", remedy)])
    return path


def work_of(place: Path) -> Path:
    """Where partial work lies."""
    return place.with_name(f".{place.name}.merge")


def occupied(place: Path) -> bool:
    """Whether a folder that is to be made is there and holds something."""
    return place.is_dir() and any(place.iterdir())


def _require_free(place: Path, wanted: str | None = None) -> None:
    """Raise ConfigError where a folder holds something else than the merge of the fingerprint `wanted`; None: any."""
    if not occupied(place):
        return
    remedy = "give another --out, or move it away: nothing that exists is replaced"
    try:
        manifest = read_manifest(place)
    except ValueError:
        raise ConfigError(_SUBJECT, [Problem("out", f"{place} holds files that no merge made", remedy)]) from None
    if wanted is not None and manifest["fingerprint"] != wanted:
        method = manifest["fields"].get("method", manifest["stage"])
        what = f"{place} holds another merge ({method}, {manifest['started']})"
        raise ConfigError(_SUBJECT, [Problem("out", what, remedy)])
    if wanted is not None and (state := state_of(place, wanted)).kind != "whole":
        raise ConfigError(_SUBJECT, [Problem("out", f"{place} was changed since it was made ({state.why})", remedy)])


# ---- the merge -----------------------------------------------------------------------------------------------------


def checked(config: RunConfig, place: Path, download: bool) -> list[str]:
    """What is worth knowing of a merge before it starts. Raises ConfigError with everything wrong with it."""
    _require_free(place)
    work = work_of(place)
    if work.exists() and any(work.iterdir()) and not (work / ".lock").is_file():
        what = "is there and is no merge's work, and this name is needed"
        raise ConfigError(_SUBJECT, [Problem(str(work), what, "move it away, or give another --out")])
    return preflight(config, stage="fuse", download=download)


def merge_into(
    config: RunConfig, place: Path, view: View, merging: Merging | None = None, cores: Cores | None = None
) -> MergeResult:
    """Make the merged model at `place`; a config of `merge_config`, whose output is `work_of(place)`.

    Raises ConfigError and CheckpointError before anything is written, StageError if the result is not what it has to
    be: it is then kept in the work folder.
    """
    checked(config, place, download=True)
    made_work = not work_of(place).exists()
    pipeline = Pipeline(config, NoEngine(merging), view)
    with exclusive(pipeline.root), view.screen(), pipeline.session():
        try:
            if cores is not None:
                _adopt(cores, pipeline)
            fused = _artifact(pipeline)
            _require_free(place, fused.fingerprint)
        except BaseException:
            if made_work:
                _clear(pipeline.root)
            raise
        cached = occupied(place)
        if not cached:
            view.note(f"Partial work lies in {pipeline.root} until the model is whole")
            try:
                pipeline.fuse()
            except CheckpointError:  # of other inputs it will be other work
                if made_work and not _has_finished(pipeline.root):
                    _clear(pipeline.root)
                raise
            os.rename(fused.path, place)
        _clear(pipeline.root)
    checks = read_json(place / FUSION_RECORD)["checks"]
    return MergeResult(place, tuple(checks), cached)


def _artifact(pipeline: Pipeline) -> Artifact:
    """The fused model's, before it is made; where stages decide conflicts, regions and groups are made for it."""
    fusion = pipeline.config.fusion
    ordered = fusion.isolates and by_stage(fusion.conflict)
    pipeline.pretrained()
    backbone = pipeline.backbone() if fusion.isolates else pipeline.pretrained()
    return pipeline.artifacts.fuse(pipeline.group().groups if ordered else (), backbone)


def _adopt(cores: Cores, pipeline: Pipeline) -> None:
    """Take core regions that were selected before for those of this merge. Raises ConfigError where they are not."""
    pipeline.pretrained()
    artifacts = pipeline.artifacts
    models = {task: model.fingerprint for task, model in artifacts.tuned.items()}
    cores.require_of(artifacts.base.fingerprint, models)
    with claimed([artifacts.regions], pipeline.view.warn):
        if not artifacts.regions.has_weights:
            with artifacts.regions.build() as out:
                cores.subset(list(models)).write_masks(out)


def _has_finished(work: Path) -> bool:
    """Whether an output of a stage is whole: a copy of θ0, or core regions."""
    return any(work.glob(f"[!.]*/[!.]*/{MANIFEST}"))


def _clear(work: Path) -> None:
    """Delete the work folder, but not what was set aside in it."""
    if any(_KEPT.search(path.name) for path in work.glob("*/*")):
        return
    shutil.rmtree(work, ignore_errors=True)

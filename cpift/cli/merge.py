"""`cpift merge`: checkpoints into an ordinary model folder, every field an option, or a file of mergekit's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpift.cli.options import say_code, settings_of
from cpift.cli.score import Tests, check_tests, show_scores
from cpift.console.terminal import say
from cpift.errors import ConfigError, Problem
from cpift.merging.options import OPTIONS, Option
from cpift.other_tools.mergekit_flags import FLAGS, Flag
from cpift.text.units import show_size

if TYPE_CHECKING:
    from cpift.config.run import RunConfig
    from cpift.given_models import ToScore
    from cpift.merge_request import Request

_KINDS: Mapping[str, Any] = {
    "value": str | None,
    "values": list[str] | None,
    "pairs": list[str] | None,
    "switch": bool | None,
}
_FIELDS = "Fields of the merge"
# Places and names are taken as they stand: read as YAML, `v #2.safetensors` is another file.
_TEXTS = ("model.chat_template", "backbone.source", "backbone.revision", "tasks.moments", "fusion.into")


def register_merge(app: typer.Typer, panel: str) -> None:
    """Add the command, with an option for each of OPTIONS."""

    def command(**options: Any) -> None:
        fields = {name: options.pop(name) for name in OPTIONS}
        flags = {name: options.pop(_keyword(name)) for name in FLAGS}
        set_fields = {name: value for name, value in fields.items() if value not in (None, [])}
        merge(**options, fields=set_fields, flags={name: value for name, value in flags.items() if value is not None})

    own = [
        parameter
        for parameter in inspect.signature(merge, eval_str=True).parameters.values()
        if parameter.name not in ("fields", "flags")
    ]
    parameters = [*own, *(_parameter(name, option) for name, option in OPTIONS.items())]
    parameters += [_flag(name, flag) for name, flag in FLAGS.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = merge.__doc__
    app.command("merge", rich_help_panel=panel)(command)


def _keyword(flag: str) -> str:
    return f"mergekit_{flag.replace('-', '_')}"


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flag(name: str, flag: Flag) -> inspect.Parameter:
    """An option that people know from mergekit; help does not list it."""
    kind: Any = str | None if flag.value else bool | None
    info = typer.Option(f"--{name}" if flag.value else f"--{name}/--no-{name}", hidden=True)
    annotation: Any = Annotated.__class_getitem__((kind, info))  # type: ignore[attr-defined]  # a type made at run time
    return inspect.Parameter(_keyword(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(name: str, option: Option) -> inspect.Parameter:
    flag = _flag_of(name)
    declared = f"{flag}/--no-{flag[2:]}" if option.kind == "switch" else flag
    metavar = {"pairs": "NAME=VALUE", "values": "PATTERN", "value": "VALUE"}.get(option.kind)
    info = typer.Option(declared, metavar=metavar, help=option.help, rich_help_panel=_FIELDS, show_default=False)
    annotation: Any = Annotated.__class_getitem__((_KINDS[option.kind], info))  # type: ignore[attr-defined]  # a type made at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def merge(
    *,
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE | FILE", help="the model that all were tuned from: folder or hub id; or mergekit's YAML file"
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL... | NAME=MODEL... | OUT",
            help="fine-tunes, whole or LoRA adapters: folders, hub ids; after a file the folder to make",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the folder to make")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="any other field of a run (repeatable)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
    tests: Tests = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="folder for scores and their page [default: runs/scores]")
    ] = None,
    fields: Mapping[str, Any],
    flags: Mapping[str, Any],
) -> None:
    """Merge fine-tunes of one model into a model folder: as options say, or as mergekit's YAML file does.

    `cpift merge config.yml OUT` reads mergekit's fields, and takes its options. What cannot be done is one list before
    anything is read.

    The folder appears under its name when it is whole and checked; nothing that exists is replaced. Partial work lies
    beside it in .NAME.merge: after a kill the same command goes on from there.

    With --as-lora the folder is a PEFT adapter: of adapters, concatenated (exact); with --rank of any models.

    With --test the base, the models and the merge are scored, with intervals and what the merge keeps of each.
    """
    from cpift.merge_folder import checked, merge_into, place_of, work_of
    from cpift.merge_request import requested

    asked = requested(base, models or [], out)
    place = place_of(asked.out)
    values = {**asked.fields, **{name: _value(name, value) for name, value in fields.items()}}
    settings = settings_of(overrides or [])
    config = asked.config(work_of(place), values, settings, flags, not dry_run)
    for note in asked.notes:
        say(note)
    say_code(config)
    to_score = _to_score(asked, tests, {**settings, **_template(values)}, scores, config, dry_run) if tests else None
    if dry_run:
        _tell(config, checked(config, place, download=False), place)
        return
    from cpift.cluster.choice import merging_for
    from cpift.console.view import View

    result = merge_into(config, place, View(), merging_for(config.resources))
    if result.cached:
        say("It is there already: nothing to do.")
    if config.fusion.as_lora:
        from cpift.checkpoints.lora_extraction import read_extraction
        from cpift.cli.change import say_adapter

        say_adapter(read_extraction(result.path), result.path)
    else:
        say(f"Merged model: {result.path}")
    if to_score is not None:
        show_scores(to_score.with_merged(config.name, result.path))


def _to_score(
    asked: Request,
    tests: list[str],
    settings: Mapping[str, Any],
    output: Path | None,
    config: RunConfig,
    dry_run: bool,
) -> ToScore | None:
    """What is scored after the merge, looked at before it; None where a dry run would have to download BASE for it."""
    from cpift.checkpoints.opening import at_hand
    from cpift.given_models import FOLDER, to_score
    from cpift.merge_folder import place_of

    if dry_run and at_hand(config.model) is None:
        say("--test: rows are looked at once BASE is downloaded")
        return None
    output = output or FOLDER
    if place_of(asked.out) in (found := output.expanduser().resolve(), *found.parents):
        remedy = "give another folder: the merged model's holds nothing else"
        raise ConfigError("merge", [Problem("--scores", f"{output} is in the folder of the merged model", remedy)])
    scored = to_score(asked.models, tests, base=asked.base, settings=settings, output=output, reserved=(config.name,))
    check_tests(scored, download=not dry_run)
    return scored


def _template(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"model.chat_template": values["chat_template"]} if "chat_template" in values else {}


def _value(name: str, value: Any) -> Any:
    """An option's value as a file would have it. Raises ConfigError."""
    option = OPTIONS[name]
    if option.kind == "pairs":
        return _pairs(name, [_pair(name, pair) for pair in value])
    return value if option.kind in ("switch", "values") else _parsed(name, value)


def _pairs(name: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise ConfigError("merge", [Problem(_flag_of(name), f"{key} is given twice", "give it once") for key in twice])
    return dict(pairs)


def _pair(name: str, pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError("merge", [Problem(_flag_of(name), f"{pair!r} has no '='", "NAME=VALUE")])
    return key, _parsed(name, value)


def _parsed(name: str, text: str) -> Any:
    from cpift.untrusted.json import UnreadableError
    from cpift.untrusted.yaml import parse_yaml

    if OPTIONS[name].field in _TEXTS:
        return text
    try:
        return parse_yaml(text)
    except UnreadableError as error:
        raise ConfigError("merge", [error.problem(_flag_of(name))]) from None


def _tell(config: RunConfig, notes: list[str], place: Path) -> None:
    from cpift.merge_folder import work_of
    from cpift.merging.registry import method_named
    from cpift.pipeline.identity import StageArtifacts
    from cpift.pipeline.plan import plan

    planned = plan(StageArtifacts(config), notes)
    say(f"{config.fusion.method_name}: {method_named(config.fusion.method).described(config.fusion)}")
    for note in planned.notes:
        say(note)
    if planned.parameters is not None:
        say(f"Parameters: {planned.parameters:,}")
    say(f"Disk: about {show_size(planned.disk_needed or 0)} more, {show_size(planned.disk_free)} free")
    partial = work_of(place)
    say(f"Goes on from {partial}" if partial.exists() else f"Would write {place}, by way of {partial}")

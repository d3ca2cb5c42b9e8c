"""What several commands take: the run's file, fields that differ from it, and the folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.console.terminal import say
from cpift.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cpift.config.loading import Fields

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, for example configs/smoke.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="override a field, for example --set regions.p=0.05 (repeatable)"
    ),
]
Output = Annotated[Path | None, typer.Option("--output", help="folder for all results [default: runs/<name>]")]


def say_code(*configs: BaseModel, tell: Callable[[str], None] = lambda line: say(line, err=True)) -> None:
    """Whose code a command is about to run, before it does: of configs that name the user's own."""
    from cpift.config.code import code_lines

    for line in dict.fromkeys(line for config in configs for line in code_lines(config)):
        tell(line)


def settings_of(overrides: Sequence[str]) -> Fields:
    """Fields by dotted name, of `--set FIELD=VALUE`. Raises ConfigError."""
    from cpift.untrusted.json import UnreadableError
    from cpift.untrusted.yaml import parse_yaml

    fields: Fields = {}
    for text in overrides:
        field, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--set", [Problem("--set", f"{text!r} has no '='", "write it as field.name=value")])
        try:
            fields[field.strip()] = parse_yaml(value)
        except UnreadableError as error:
            raise ConfigError("--set", [error.problem(f"--set {field}")]) from None
    return fields

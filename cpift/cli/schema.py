"""`cpift schema`: the fields of each kind of file as a JSON schema, so that an editor completes and checks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cpift.console.terminal import say
from cpift.errors import entry


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(schema)


def _run() -> dict[str, Any]:
    from cpift.config.run import RunConfig

    return RunConfig.model_json_schema()


def _sweep() -> dict[str, Any]:
    from cpift.sweep.config import SweepConfig

    return SweepConfig.model_json_schema()


def _compare() -> dict[str, Any]:
    from cpift.compare.config import CompareConfig

    return CompareConfig.model_json_schema()


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"run": _run, "sweep": _sweep, "compare": _compare}


def schema(
    kind: Annotated[str, typer.Argument(metavar="[run|sweep|compare]", help="the kind of file")] = "run",
) -> None:
    """Print the JSON schema of a run's, a sweep's or a comparison's file.

    Save it, and name it in the file's first line: `# yaml-language-server: $schema=run.schema.json`.
    """
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(kind)}
    say(json.dumps(described, indent=1, ensure_ascii=False))


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of one of SCHEMAS. Raises ConfigError for another name."""
    return dict(_plain(entry(SCHEMAS, kind, "schema")()))


def _plain(node: Any) -> Any:
    """Without what fields say for the project itself."""
    if isinstance(node, dict):
        return {name: _plain(value) for name, value in node.items() if not (name == "identity" and "named" in value)}
    return [_plain(value) for value in node] if isinstance(node, list) else node

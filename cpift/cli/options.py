"""What several commands take: the run's file, fields that differ from it, and the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, for example configs/smoke.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="override a field, for example --set regions.p=0.05 (repeatable)"
    ),
]
Output = Annotated[Path | None, typer.Option("--output", help="folder for all results [default: runs/<name>]")]

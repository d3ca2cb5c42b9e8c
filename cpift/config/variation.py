"""A run that others vary: how a file names it, and a point of the space of its fields, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpift.config.loading import load_config, parse_config, with_fields
from cpift.config.run import RunConfig

Value = str | int | float | bool
Fields = dict[str, Any]  # a point of the space: dotted field name → value


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

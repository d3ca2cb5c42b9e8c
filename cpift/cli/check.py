"""`cpift check`: whether everything in an output folder is what was written there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from cpift.console.terminal import say
from cpift.errors import CpiftError

_NAME = re.compile(r"(?:.+-)?[0-9a-f]{12}")  # of an artifact's folder


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(check)


def check(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the output folder of a run, a sweep or a comparison")],
) -> None:
    """Read everything in an output folder and compare it with the hashes that were recorded when it was written.

    Touches nothing. Ends with 0 if all is as it was written, with 1 if something is damaged (what the same `cpift run`
    will set aside and make again), with 2 if the folder cannot be looked at.
    """
    from cpift.disk.top_files import RUN_FILES, SCORES_FILES, SWEEP_FILES, is_ours

    if not folder.is_dir():
        raise CpiftError(f"{folder} is no folder: give the output folder of a run")
    artifacts = list(_artifacts(folder))
    if not artifacts:
        raise CpiftError(f"{folder} holds nothing that cpift made: give the output folder of a run")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        damaged = {path: why for path, why in zip(artifacts, pool.map(_damage, artifacts), strict=True) if why}
    for path in artifacts:
        say(f"{path.relative_to(folder)}: {damaged.get(path, 'as it was written')}")
    for name in dict.fromkeys((*RUN_FILES, *SWEEP_FILES, *SCORES_FILES)):
        if os.path.lexists(folder / name) and not is_ours(folder / name):
            say(f"{name}: not as cpift wrote it (a run would refuse to replace it)")
    if damaged:
        _say_remedy(folder, damaged)
        raise typer.Exit(1)
    say(f"{len(artifacts)} outputs, all as they were written")


def _say_remedy(folder: Path, damaged: dict[Path, str]) -> None:
    stages = ", ".join(f"{path.parent.name} {path.name}" for path in damaged)
    say(f"{len(damaged)} damaged: {stages}")
    say("The command that made them (its config is in config.yaml) sets them aside and makes them again.")


def _artifacts(folder: Path) -> Iterator[Path]:
    """What has the place and the name of an artifact, whole or not; and files in the place of a stage's folder."""
    from cpift.disk.artifact_state import STAGES

    for stage in sorted(path for path in folder.iterdir() if path.name in STAGES):
        if stage.is_dir():
            yield from sorted(path for path in stage.iterdir() if _NAME.fullmatch(path.name))
        else:
            yield stage


def _damage(path: Path) -> str | None:
    """What is wrong with an artifact; None where nothing is. OSError where it cannot be read."""
    from cpift.disk.artifact_state import read_manifest, state_of

    if not path.is_dir():
        return "damaged: is no folder"
    try:
        fingerprint = read_manifest(path)["fingerprint"]
    except ValueError as error:
        return f"damaged: {error}"
    if not path.name.endswith(fingerprint[:12]):
        return f"damaged: its manifest is of something else, {fingerprint[:12]}"
    state = state_of(path, fingerprint, thorough=True)
    return f"damaged: {state.why}" if state.kind == "damaged" else None

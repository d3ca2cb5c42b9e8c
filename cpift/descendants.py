"""Runs that go on from a finished run: `cpift extend`, a task more, and `cpift forget`, a task less."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpift.api import RunResult, ShowProgress, StrPath, given_changes
from cpift.api import run as run_config
from cpift.config.loading import read_yaml
from cpift.lineage.derive import extended, forgotten


def extend(
    run: StrPath,
    task: StrPath | Mapping[str, Any],
    *,
    output: StrPath | None = None,
    progress: ShowProgress = False,
    in_process: bool = False,
    **overrides: Any,
) -> RunResult:
    """Add a task to a finished run: its fine-tune from θ0, its core, and both put into the model that is there.

    run: the folder of the finished run, which is only read. task: the fields of a task, or the YAML file with them;
    `replay` names earlier tasks whose training rows go along in the last stage. output: default RUN-with-TASK. All
    else as in `run`; the same call again goes on, or finds everything done. Raises ConfigError before anything starts.
    """
    if isinstance(task, Mapping):
        fields, folder = dict(task), Path.cwd()
    else:
        fields, folder = read_yaml(Path(task)), Path(task).expanduser().absolute().parent
    config = extended(_folder(run), fields, folder, _output(output), changes=given_changes(overrides))
    return run_config(config, progress=progress, in_process=in_process)


def forget(
    run: StrPath,
    task: str,
    *,
    output: StrPath | None = None,
    progress: ShowProgress = False,
    in_process: bool = False,
    **overrides: Any,
) -> RunResult:
    """Take a task out of a finished run: the model that the other tasks' fine-tunes make.

    run: the folder of the finished run, which is only read, and whose fine-tunes and core regions are used again.
    output: default RUN-without-TASK. All else as in `run`. Raises ConfigError before anything starts.
    """
    config = forgotten(_folder(run), task, _output(output), changes=given_changes(overrides))
    return run_config(config, progress=progress, in_process=in_process)


def _folder(run: StrPath) -> Path:
    return Path(os.fspath(run)).expanduser().absolute()


def _output(output: StrPath | None) -> Path | None:
    return None if output is None else Path(output).expanduser().absolute()

"""`cpift init` beside a run: a merge of checkpoints, a sweep over a run, and the examples that come with cpift."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import cpift
from cpift.config.loading import load_config, one_line_yaml, parse_config
from cpift.config.words import MergeName
from cpift.errors import ConfigError, CpiftError, Problem
from cpift.evaluation.metrics import metric_of
from cpift.hub import HUB_ID
from cpift.merging.options import tune_names
from cpift.untrusted.yaml import parse_yaml


def merge_file(models: Sequence[str], out: Path, schema: str) -> str:
    """The YAML file of a merge of checkpoints onto the first. Raises ConfigError."""
    if len(models) < 3:
        raise ConfigError(
            "init merge", [Problem("MODELS", f"{len(models)} given", "give BASE and two or more fine-tunes")]
        )
    folder = out.absolute().parent
    base, *tunes = (_checkpoint(model, folder) for model in models)
    names = tune_names(models[1:])
    text = "\n".join(
        [
            f"# yaml-language-server: $schema={schema}",
            f"# By `cpift init merge`. `cpift plan {out.name}` reads headers alone; `cpift fuse {out.name}` merges.",
            f"name: {out.stem}",
            "seed: 0",
            "",
            f"model: {base}",
            "",
            "tasks:",
            *(f"  - {{name: {name}, checkpoint: {tune}}}" for name, tune in zip(names, tunes, strict=True)),
            "",
            "regions: {p: 0.01}             # the share of all elements that each keeps; the paper's 1 %",
            "groups: {tau: 0.1}             # tasks whose cores overlap more are one group",
            "backbone: {source: pretrained} # cores go into the first model; or a model trained on everything",
            f"fusion: {{method: cpift}}        # or {', '.join(get_args(MergeName)[1:])}",
            "resources: {memory_budget: 1GiB}",
        ]
    )
    return text + "\n"


def check_merge(text: str, out: Path) -> None:
    """Raise ConfigError with what a plan would find wrong with the file."""
    from cpift.pipeline.preflight import preflight

    preflight(parse_config(parse_yaml(text), out.absolute().parent, str(out)), stage="fuse", download=False)


def _checkpoint(name: str, folder: Path) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{{path: {one_line_yaml(os.path.relpath(path, folder))}}}"
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ConfigError("init merge", [Problem(name, "is no model folder and no hub id", "give one of these")])
    from cpift.hub import resolve_revision

    commit = resolve_revision("model", name, None)
    return f"{{hub: {one_line_yaml(name)}, revision: {one_line_yaml(commit)}}}"


def sweep_file(run: Path, out: Path, schema: str) -> str:
    """The YAML file of a sweep over a run's core fraction and threshold. Raises ConfigError."""
    config = load_config(run)
    if not config.fusion.isolates:
        problem = Problem("fusion.method", f"{config.fusion.method_name} has no core regions", "sweep a run of cpift")
        raise ConfigError("init sweep", [problem])
    scored = config.scores
    if not scored:
        raise ConfigError("init sweep", [Problem("tasks", "not all have test rows", "give `test`, or `holdout`")])
    figure = "mean_loss" if any(metric_of(task.metric).by_loss for task in config.tasks) else "mean_retention"
    why = "a task is scored by its loss" if figure == "mean_loss" else "of what each probe reaches on its own task"
    return (
        "\n".join(
            [
                f"# yaml-language-server: $schema={schema}",
                "# By `cpift init sweep`. Probes are trained once; every point has its own masks and fused model.",
                f"# `cpift sweep {out.name}` tries every combination below.",
                f"run: {one_line_yaml(os.path.relpath(run.absolute(), out.absolute().parent))}",
                "",
                "space:",
                "  regions.p: [0.01, 0.02, 0.05, 0.1]",
                "  groups.tau_chance: [1.2, 1.5, 3.0]  # in multiples of chance, p/(2−p), which follows p",
                "",
                f"model: {'final' if config.integration else 'fused'}  # what is scored",
                f"objectives: [{figure}]  # {why}",
            ]
        )
        + "\n"
    )


def check_sweep(text: str, out: Path) -> None:
    """Raise ConfigError with what a sweep would find wrong with the file."""
    from cpift.sweep.config import load_sweep

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=out.absolute().parent, suffix=".yaml") as file:
        file.write(text)
        file.flush()
        load_sweep(Path(file.name))


def examples() -> dict[str, Path]:
    """The runs that come with cpift, by name."""
    folder = _configs()
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def example_files(name: str) -> dict[Path, Path]:
    """What an example consists of: the place below the working directory → the file that comes with cpift.

    A program that makes its data has its name before it. Raises CpiftError for a name that is none.
    """
    known = examples()
    if name not in known:
        raise CpiftError(f"--example {name}: there is none of this name → one of {', '.join(known)}")
    path, folder = known[name], _configs()
    beside = sorted(path.parent.glob(f"{path.stem}_*.py"))
    return {Path("configs") / file.relative_to(folder): file for file in (path, *beside)}


def _configs() -> Path:
    """In a wheel inside the package, in a source tree beside it."""
    package = Path(cpift.__file__).parent
    configs = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), None)
    if configs is None:
        raise CpiftError(f"the examples are not at {package / 'configs'} → install cpift again")
    return configs

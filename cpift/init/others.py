"""`cpift init` beside a run: a merge of checkpoints, a sweep over a run, and the examples that come with cpift."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import cpift
from cpift.config.loading import load_config, one_line_yaml, parse_config
from cpift.config.needs import absent_extra
from cpift.config.run import RunConfig
from cpift.config.words import MergeName
from cpift.errors import ConfigError, CpiftError, Problem
from cpift.evaluation.metrics import metric_of
from cpift.hub import HUB_ID
from cpift.init.given_tests import GivenTest, given_tests, scoring_fields
from cpift.init.model import base_model
from cpift.init.run import source_line, with_choices
from cpift.merge_folder import named_models
from cpift.untrusted.yaml import parse_yaml


def merge_file(
    models: Sequence[str], out: Path, schema: str, tests: Sequence[str] = (), vocabulary: str | None = None
) -> str:
    """The YAML file of a merge of checkpoints, `MODEL` or `NAME=MODEL`, onto the first.

    tests: `NAME=FILE`, rows to score each model's task on. vocabulary: `fusion.vocabulary`, where models have other
    tokens; by tokens there are no core regions, and the file says linear. Raises ConfigError.
    """
    if len(models) < 3:
        raise ConfigError(
            "init merge", [Problem("MODELS", f"{len(models)} given", "give BASE and two or more fine-tunes")]
        )
    folder = out.absolute().parent
    tuned, base = named_models(models[1:]), _checkpoint(models[0], folder)
    scoring = _scoring(models[0], list(tuned), tests, folder)
    says = f"`cpift evaluate {out.name}` scores it; `cpift init sweep {out.name}` looks for a better one."
    text = "\n".join(
        [
            f"# yaml-language-server: $schema={schema}",
            f"# By `cpift init merge`. `cpift plan {out.name}` reads headers alone; `cpift fuse {out.name}` merges.",
            *([f"# {says}"] if tests else []),
            f"name: {out.stem}",
            "seed: 0",
            "",
            f"model: {base[:-1]}{scoring.template}}}",
            "",
            "tasks:",
            *(
                f"  - {{name: {name}, checkpoint: {_checkpoint(model, folder)}{scoring.by_task.get(name, '')}}}"
                for name, model in tuned.items()
            ),
            "",
            *_fusion(vocabulary),
            *scoring.evaluation,
            "resources: {memory_budget: 1GiB}",
        ]
    )
    return text + "\n"


def _fusion(vocabulary: str | None) -> list[str]:
    """The lines of the merge itself."""
    cores = [
        "regions: {p: 0.01}             # the share of all elements that each keeps; the paper's 1 %",
        "groups: {tau: 0.1}             # tasks whose cores overlap more are one group",
        "backbone: {source: pretrained} # cores go into the first model; or a model trained on everything",
    ]
    if vocabulary in (None, "base"):
        rows = "" if vocabulary is None else f", vocabulary: {vocabulary}"
        return [*cores, f"fusion: {{method: cpift{rows}}}        # or {', '.join(get_args(MergeName)[1:])}"]
    others = ", ".join(name for name in get_args(MergeName) if name not in ("cpift", "linear"))
    said = f"fusion: {{method: linear, vocabulary: {one_line_yaml(vocabulary)}}}"
    return ["backbone: {source: pretrained}", f"{said} # rows by tokens; or {others}"]


@dataclass(frozen=True)
class _Scoring:
    """What a merge's file says of scores, in the model's line, in each task's, and in lines of its own."""

    template: str = ""
    by_task: Mapping[str, str] = field(default_factory=dict)
    evaluation: tuple[str, ...] = ()


def _scoring(base: str, names: Sequence[str], tests: Sequence[str], folder: Path) -> _Scoring:
    """Raises ConfigError unless every fine-tune has a test of its name: a run's tasks have one each."""
    if not tests:
        return _Scoring()
    origin = base_model(base)
    found = {test.name: test for test in given_tests(tests, origin.tokenizer)}
    alike = "name models and tests alike: NAME=MODEL and --test NAME=FILE"
    problems = [Problem(name, "has no test of its name", alike) for name in names if name not in found]
    problems += [Problem(f"--test {name}", "is the name of no model", alike) for name in found if name not in names]
    if problems:
        raise ConfigError("init merge", problems)
    template = f", chat_template: {origin.added}" if origin.added else ""
    evaluation = f"evaluation: {one_line_yaml(scoring_fields(list(found.values())))}"
    return _Scoring(template, {name: _scored(test, folder) for name, test in found.items()}, (evaluation,))


def _scored(test: GivenTest, folder: Path) -> str:
    """What a task's line says of its rows."""
    others = "".join(f", {name}: {value}" for name, value in test.fields.items() if name != "test")
    return f", test: {source_line(with_choices(test.look, test.guess), folder)}{others}"


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
    """The YAML file of a sweep over a run's core fraction and threshold; where all fine-tunes are given, over ways to
    merge them. Raises ConfigError."""
    config = load_config(run)
    if not config.fusion.isolates and not config.merges_only:
        problem = Problem("fusion.method", f"{config.fusion.method_name} has no core regions", "sweep a run of cpift")
        raise ConfigError("init sweep", [problem])
    scored = config.scores
    if not scored:
        raise ConfigError("init sweep", [Problem("tasks", "not all have test rows", "give `test`, or `holdout`")])
    figure = "mean_loss" if any(metric_of(task.metric).by_loss for task in config.tasks) else "mean_retention"
    why = "a task is scored by its loss" if figure == "mean_loss" else "of what each probe reaches on its own task"
    if config.merges_only and config.integration is None:
        return _merges_sweep(config, os.path.relpath(run.absolute(), out.absolute().parent), out, schema, figure, why)
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


def _merges_sweep(config: RunConfig, run: str, out: Path, schema: str, figure: str, why: str) -> str:
    search = "random" if absent_extra("optuna", "optuna", "search.method") else "optuna"
    beside = "optuna learns from earlier points: pip install 'cpift[optuna]'" if search == "random" else "or random"
    each = [f"task.{task.name}.{'loss' if metric_of(task.metric).by_loss else 'score'}" for task in config.tasks[:4]]
    lines = [
        f"# yaml-language-server: $schema={schema}",
        "# By `cpift init sweep`: which merge of these fine-tunes is best. Nothing is trained.",
        f"# `cpift sweep {out.name}` searches; killed, it goes on.",
        f"run: {one_line_yaml(run)}",
        "",
        "space:                             # any field; of a merge method only those that it looks at count",
        "  fusion.method: [linear, task_arithmetic, ties, dare_ties]",
        "  fusion.weight: {low: 0.2, high: 1.5}",
        "  fusion.density: {low: 0.1, high: 1.0}",
        f"  # fusion.weights.{config.tasks[0].name}: {{low: 0.2, high: 1.5}}   # of one model",
        "",
        f"search: {{method: {search}, samples: 20}}  # {beside}",
        "report: 0.5                        # the share of test rows that the search never sees, and that decides",
        "model: fused",
        f"objectives: [{figure}]  # {why}; for a Pareto front {one_line_yaml(each)}",
    ]
    return "\n".join(lines) + "\n"


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

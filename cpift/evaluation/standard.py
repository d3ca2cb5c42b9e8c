"""Standard benchmarks (GSM8K, LogiQA, …) by EleutherAI's lm-eval, the `eval` extra: its tasks, prompts and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.checkpoints.layout import key_mapping
from cpift.errors import ConfigError, CpiftError, Problem
from cpift.evaluation.task_files import task_file_problems
from cpift.pretrained.loading import lm_eval_arguments

BenchmarkScores = dict[str, dict[str, dict[str, float | None]]]  # by model and task: `metric` and `metric_stderr`


@dataclass(frozen=True)
class Benchmarks:
    """What is run.

    tasks: names that lm-eval knows, or has in the YAML files of `folder`; limit: rows a task at most; shots: examples
    before each question, None: as the task says; chat: whether prompts go through the model's template; gpu: whether
    it runs on a GPU; functions: whether Python functions that those files name may run.
    """

    tasks: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    batch_size: int = 8
    gpu: bool = False
    functions: bool = False


def standard_scores(
    models: Mapping[str, Path], wanted: Benchmarks, on_model: Callable[[str], None] = lambda title: None
) -> BenchmarkScores:
    """Every figure that lm-eval has for these models, its standard errors included.

    Raises CpiftError for a model or a task file that would run code, before any is scored, where the extra is not
    installed, or for a task that lm-eval does not know or holds to be unsafe.
    """
    arguments = {title: lm_eval_arguments(path) | _names(path) for title, path in models.items()}
    tasks = _tasks(wanted)
    scores: BenchmarkScores = {}
    for title in models:
        on_model(title)
        scores[title] = _scores(arguments[title], wanted, tasks)
    return scores


def _names(path: Path) -> dict[str, Any]:
    """How the names of the files are to be read, where the class has others."""
    mapping = key_mapping(path)
    return {"key_mapping": mapping} if mapping else {}


def _tasks(wanted: Benchmarks) -> Any:
    """lm-eval's index, with all tasks in it."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CpiftError(f"lm-eval cannot be imported ({error}): pip install 'cpift[eval]'") from None
    _sandbox()
    if wanted.folder is not None:
        _check(wanted.folder, wanted.functions)
    manager = TaskManager(include_path=str(wanted.folder.absolute()) if wanted.folder else None)
    unknown = [name for name in wanted.tasks if not manager.match_tasks([name])]
    if unknown:
        raise CpiftError(
            f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists its own; give the folder of your "
            "YAML files with --task-folder"
        )
    return manager


def _check(folder: Path, functions: bool) -> None:
    from lm_eval.api.registry import METRIC_REGISTRY

    if not folder.is_dir():
        raise ConfigError("command line", [Problem("--task-folder", f"{folder} is no folder", "check the path")])
    if problems := task_file_problems(folder, METRIC_REGISTRY, functions):
        raise ConfigError(f"task files in {folder}", problems)


def _sandbox() -> None:
    """Templates in task files reach no Python: lm-eval renders them with jinja as it comes."""
    from jinja2 import Environment
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain: Environment = utils.env
    if not plain.sandboxed:
        utils.env = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
        utils.env.filters.update(plain.filters)


def _scores(model: dict[str, Any], wanted: Benchmarks, tasks: Any) -> dict[str, dict[str, float | None]]:
    from jinja2.exceptions import SecurityError
    from lm_eval import simple_evaluate

    from cpift.devices import compute_device

    try:
        results = simple_evaluate(
            model="hf",
            model_args=model,
            tasks=list(wanted.tasks),
            num_fewshot=wanted.shots,
            batch_size=wanted.batch_size,
            device=compute_device(wanted.gpu),
            limit=wanted.limit,
            log_samples=False,
            apply_chat_template=wanted.chat,
            task_manager=tasks,
            confirm_run_unsafe_code=False,
        )
    except (ValueError, SecurityError) as error:
        if isinstance(error, SecurityError) or "unsafe" in str(error):
            raise CpiftError(
                f"{error} → leave the task out: what a model writes, or a template does, is not run"
            ) from None
        raise
    if results is None:  # lm-eval's other processes get none
        raise CpiftError(f"lm-eval gave no results for {model['pretrained']}")
    return {task: _figures(result) for task, result in results["results"].items()}


def _figures(result: Mapping[str, Any]) -> dict[str, float | None]:
    """`exact_match,strict-match` and the like, by lm-eval's own names; None where it has no standard error."""
    numbers = {name: value for name, value in result.items() if "," in name}
    return {name: float(value) if _known(value) else None for name, value in numbers.items()}


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

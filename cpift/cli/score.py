"""Scoring of models that are there already: `cpift evaluate MODEL… --test`, `cpift merge … --test`, and on standard
benchmarks `cpift standard`. `cpift bench`: the kernels on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpift.console.terminal import Terminal, say
from cpift.disk.files import SOURCE_TREE
from cpift.errors import ConfigError, CpiftError, Problem

if TYPE_CHECKING:
    from cpift.given_models import ToScore

Tests = Annotated[
    list[str] | None,
    typer.Option(
        "--test",
        metavar="NAME=FILE",
        help="rows to score models on, of any kind that `cpift init` reads; what they are and their metric is "
        "recognised (repeatable)",
    ),
]


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands."""
    app.command(rich_help_panel=panel)(standard)
    as_they_are = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(rich_help_panel=panel, context_settings=as_they_are)(bench)


_FILES = (".yaml", ".yml")


def is_model(argument: str) -> bool:
    """Whether an argument means a model, not a run's file: a folder, or the name of a repository."""
    path = Path(argument).expanduser()
    return path.is_dir() or not (path.exists() or path.suffix.lower() in _FILES)


def holds_model(folder: Path) -> bool:
    """Whether a folder is that of a model or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def score_models(
    models: list[str], tests: list[str], base: str | None, settings: Mapping[str, Any], output: Path | None
) -> None:
    """Score model folders, adapters and hub ids on files of rows, and show what came out."""
    from cpift.given_models import FOLDER, SETTINGS, SUBJECT, to_score
    from cpift.merge_folder import named_models

    if files := [model for model in models if Path(model).suffix.lower() in _FILES and not is_model(model)]:
        what = "is a run's file, which has tests and models of its own"
        raise ConfigError(SUBJECT, [Problem(files[0], what, f"`cpift evaluate {files[0]}` alone, or name models")])
    if others := [name for name in settings if not name.startswith(SETTINGS)]:
        remedy = f"give fields of {', '.join(one.rstrip('.') for one in SETTINGS)}"
        raise ConfigError(SUBJECT, [Problem(f"--set {name}", "decides nothing of scores", remedy) for name in others])
    if not tests:
        what = "is not there, and models are scored on some rows"
        raise ConfigError(SUBJECT, [Problem("--test", what, "--test NAME=FILE, for each file of rows")])
    if output is not None and holds_model(output.expanduser()):
        what = f"{output} is a model's folder, which holds nothing else"
        raise ConfigError(SUBJECT, [Problem("--output", what, "give another folder: scores and their page go there")])
    asked = to_score(named_models(models), tests, base=base, settings=settings, output=output or FOLDER)
    check_tests(asked)
    show_scores(asked)


def check_tests(asked: ToScore, download: bool = True, tell: Callable[[str], None] = say) -> None:
    """Say what the tests are. Raises ConfigError with all that would end their scoring later."""
    from cpift.given_models import check

    for test in asked.tests:
        tell(f"{test.summary}; metric {test.guess.metric}: {test.guess.why}")
    for note in check(asked, download):
        tell(note)


def show_scores(asked: ToScore) -> None:
    """Score, write the page, and show table and sentences."""
    from cpift.cluster.engine import RayEngine
    from cpift.console.view import View
    from cpift.given_models import score
    from cpift.scorecard.show import card_table, write_card

    view = View()
    with view.screen():
        card = score(asked, RayEngine(asked.config, stored=False), view)
    page = write_card(card, asked.config.output_dir)
    for sentence in card.warnings():
        say(f"! {sentence}", "yellow")
    Terminal().print(card_table(card))
    for sentence in card.sentences():
        say(sentence)
    say(f"Report: {page}")


def standard(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="folders of models, such as `run` prints")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="gsm8k,logiqa", help="lm-eval's names")],
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="folder with lm-eval YAML files of your own")
    ] = None,
    task_code: Annotated[
        bool, typer.Option("--task-code", help="let Python functions run that those files name (!function)")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="rows of each task at most")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="examples before a question")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put prompts through the model's chat template")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="rows scored at once")] = 8,
    gpu: Annotated[bool, typer.Option("--gpu", help="compute on this machine's first GPU; else on the CPU")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="also write everything as JSON to this new file")] = None,
) -> None:
    """Score models on standard benchmarks with lm-eval (needs the `eval` extra): its tasks, prompts and metrics."""
    from cpift.config.needs import require_extra
    from cpift.disk.files import json_text
    from cpift.disk.top_files import write_new
    from cpift.evaluation.standard import Benchmarks, standard_scores

    require_extra("standard", "cpift standard")
    if out is not None and out.exists():
        raise CpiftError(f"{out} is there already: give --out another name")
    for path in models:
        if not (path / "config.json").is_file():
            raise CpiftError(f"{path}: no model's folder, for it has no config.json")
    wanted = Benchmarks(
        [name for name in tasks.split(",") if name], task_folder, limit, shots, chat, batch_size, gpu, task_code
    )
    by_model = standard_scores({str(path): path for path in models}, wanted, lambda title: say(f"scoring {title}"))
    for title, scores in by_model.items():
        for task, figures in scores.items():
            for name, value in figures.items():
                if "_stderr," not in name and value is not None:
                    error = figures.get(name.replace(",", "_stderr,"))
                    say(f"{title}  {task}  {name}: {value:.4f}" + (f" ± {error:.4f}" if error else ""))
    if out is not None:
        write_new(out, json_text(by_model))


def bench(context: typer.Context) -> None:
    """Time the kernels on this machine beside its read ceiling and plain torch. Needs a source tree.

    Options are those of benchmarks/kernels/speed.py, for example: cpift bench --sizes 256M --dtypes bf16 fp32
    """
    script = SOURCE_TREE / "benchmarks" / "kernels" / "speed.py"
    if not script.is_file():
        raise CpiftError(f"{script} is not there: run `cpift bench` from a clone of the repository (pip install -e .)")
    path = os.pathsep.join(filter(None, [str(SOURCE_TREE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.kernels.speed", *context.args]
    raise typer.Exit(subprocess.call(command, env=os.environ | {"PYTHONPATH": path}))

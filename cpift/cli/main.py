"""The `cpift` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpift import __version__
from cpift.cli import change as cli_change
from cpift.cli import check as cli_check
from cpift.cli import compare as cli_compare
from cpift.cli import data as cli_data
from cpift.cli import init as cli_init
from cpift.cli import many as cli_many
from cpift.cli import plan as cli_plan
from cpift.cli import push as cli_push
from cpift.cli import runs as cli_runs
from cpift.cli import schema as cli_schema
from cpift.cli import score as cli_score
from cpift.cli.group import Commands
from cpift.cli.merge import register_merge
from cpift.cli.options import Config, Output, Overrides, say_code, settings_of
from cpift.cli.score import Tests, is_model, score_models
from cpift.console.terminal import say, standard_streams
from cpift.errors import CpiftError, explain_os_error
from cpift.text.redaction import redacted

if TYPE_CHECKING:
    from cpift.config.loading import Fields
    from cpift.config.run import RunConfig
    from cpift.console.view import View
    from cpift.evaluation.scores import Score
    from cpift.pipeline.pipeline import Pipeline


def _version(asked: bool) -> None:
    if asked:
        say(f"cpift {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune one language model on many tasks without the seesaw (CPI-FT).\n\n"
    "A run is one YAML file. [bold]cpift init DATA --model MODEL[/] writes one from your data. [bold]cpift plan "
    "CONFIG[/] says what it takes, [bold]cpift run CONFIG[/] does it: it trains a probe "
    "a task, finds each task's core region, groups the tasks, trains a backbone, fuses, integrates, evaluates and "
    "writes a report.\n\nEvery stage is cached by what it depends on: the same command again does nothing, and after a "
    "crash it goes on.",
)

Budget = Annotated[
    str | None,
    typer.Option("--memory-budget", metavar="SIZE", help="most memory to hold, page cache apart, for example 512MiB"),
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="as Ray tasks, here or at RAY_ADDRESS; output on storage all nodes see")
]
_METHOD, _LOOK = "The stages, in order (each makes what it needs)", "Looking"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and stop")
    ] = False,
) -> None:
    pass


cli_init.register(app, "Everything")
register_merge(app, "Everything")
cli_change.register(app, "Everything")
cli_runs.register_descendants(app, "Everything", lambda load: run_all(load))
cli_push.register(app, "Everything")


def _checked(run: RunConfig, stage: str, tell: Callable[[str], None]) -> RunConfig:
    """A config that was checked for a stage. `tell` gets what has to be said before."""
    from cpift.pipeline.preflight import preflight

    say_code(run, tell=tell)
    preflight(run, stage=stage)
    return run


def _open(load: Callable[[], RunConfig], stage: str, view: View) -> Pipeline:
    """The pipeline of a config, which is checked, on Ray where something is trained or scored."""
    view.waiting("checking the configuration, the models and the data")
    run = _checked(load(), stage, view.note)
    from cpift.compare.run_baselines import OF_RUNS
    from cpift.pipeline.engine import NoEngine
    from cpift.pipeline.pipeline import Pipeline

    trains = not (run.merges_only and stage in ("probe", "regions", "group", "fuse"))
    if trains:
        view.waiting("loading Ray")
        from cpift.cluster.engine import RayEngine

        return Pipeline(run, RayEngine(run), view, baselines=OF_RUNS)
    from cpift.cluster.choice import merging_for

    return Pipeline(run, NoEngine(merging_for(run.resources)), view, baselines=OF_RUNS)


def _made(load: Callable[[], RunConfig], stage: str) -> tuple[Pipeline, Any]:
    """The pipeline of the config that is loaded, and what `stage` of it gives: made with all it needs while the run's
    folder is held.

    What is waited for is shown from the first moment on.
    """
    from cpift.console.view import View

    view = View()
    with view.screen():
        pipeline = _open(load, stage, view)
        from cpift.pipeline.session import at_work

        with at_work(pipeline, stage):
            if stage in ("run", "report"):
                from cpift.pipeline.report import report

                return pipeline, report(pipeline)
            return pipeline, getattr(pipeline, stage)()


def _stage(config: Path, overrides: list[str] | None, changes: Fields, stage: str) -> Any:
    """What a stage gives."""
    return _made(_loading(config, overrides, changes), stage)[1]


def _loading(config: Path, overrides: list[str] | None, changes: Fields) -> Callable[[], RunConfig]:
    """What loads a config with fields changed."""
    from cpift.config.loading import load_config

    return lambda: load_config(config, overrides or [], changes)


@app.command(rich_help_panel="Everything")
def run(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """Run all stages and show the scores."""
    run_all(_loading(config, overrides, _changes(output)))


def run_all(load: Callable[[], RunConfig]) -> None:
    """Run all stages of the config that is loaded, and show the scores."""
    pipeline, (data, page) = _made(load, "run")
    from cpift.report.write import show_result

    if not pipeline.worked:
        say("Everything was cached: nothing to do.")
    show_result(data, pipeline.root, page)


@app.command(rich_help_panel=_METHOD)
def probe(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """1. Fine-tune θ0 on each task alone, in parallel."""
    for model in _stage(config, overrides, _changes(output), "probe").values():
        say(f"{model.title}: {model.path}")


@app.command(rich_help_panel=_METHOD)
def regions(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    memory_budget: Budget = None,
    distributed: Distributed = False,
) -> None:
    """2. Select each task's core region: the elements that moved most."""
    artifact = _stage(config, overrides, _changes(output, memory_budget, distributed), "regions")
    from cpift.method.masks import read_summary

    for task, region in read_summary(artifact.path)["regions"].items():
        share = region["count"] / region["space"]
        say(f"{task}: {region['count']:,} elements ({share:.3%}), |Δ| ≥ {region['threshold']:.3g}")
    say(f"Masks: {artifact.path}")


@app.command(rich_help_panel=_METHOD)
def group(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """3. Group tasks by the overlap of their core regions."""
    grouping = _stage(config, overrides, _changes(output), "group")
    for name, row in zip(grouping.tasks, grouping.jaccard, strict=True):
        say(f"{name:>20}  " + "  ".join(f"{value:.4f}" for value in row))
    say(f"chance {grouping.chance:.4f}, τ {grouping.tau:.4f}")
    say("Stages: " + " → ".join(" + ".join(group) for group in grouping.groups))


@app.command(rich_help_panel=_METHOD)
def fuse(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    memory_budget: Budget = None,
    distributed: Distributed = False,
    verify: Annotated[bool, typer.Option(help="read the fused model back and compare it with its inputs")] = True,
) -> None:
    """4–5. Train the backbone, transplant every core into it and SLERP the rest.

    Fine-tunes that exist already are fused without training: give each task a `checkpoint` (configs/merge.yaml).
    """
    changes = _changes(output, memory_budget, distributed) | ({} if verify else {"resources.verify": False})
    say(f"Fused model: {_stage(config, overrides, changes, 'fuse').path}")


def _changes(output: Path | None, memory_budget: str | None = None, distributed: bool = False) -> Fields:
    """What these options set, as they were typed."""
    stated = {"output": None if output is None else str(output), "resources.memory_budget": memory_budget}
    return {field: value for field, value in stated.items() if value is not None} | (
        {"resources.distributed": True} if distributed else {}
    )


@app.command(rich_help_panel=_METHOD)
def integrate(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """6. Fine-tune the fused model stage by stage with earlier cores frozen."""
    say(f"Final model: {_stage(config, overrides, _changes(output), 'integrate').path}")


@app.command(rich_help_panel=_METHOD)
def evaluate(
    config: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG | MODEL... | NAME=MODEL...",
            help="the run's YAML file; or models to score on rows of --test: folders, adapters, hub ids",
        ),
    ],
    tests: Tests = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="the model behind the others, scored beside them")
    ] = None,
    overrides: Overrides = None,
    output: Output = None,
) -> None:
    """7. Score θ0, every probe, the backbone, the fused and the final model on every task; or any models on any rows.

    `cpift evaluate models/a models/b --test maths=gsm8k.jsonl` needs no run's file: shapes of rows and metrics are
    recognised as `cpift init` does. What was scored before in the folder of results is not scored again.
    """
    if tests or base is not None or len(config) > 1 or is_model(config[0]):
        score_models(config, tests or [], base, settings_of(overrides or []), output)
        return
    scored = _stage(Path(config[0]), overrides, _changes(output), "evaluate")
    from cpift.evaluation.retention import learning_of, sentences

    _warn(sentences(learning_of(list(next(iter(scored.values()))), scored)))
    for title, scores in scored.items():
        figures = (f"{task} {_figure(score)}" for task, score in scores.items())
        say(f"{title}: " + ", ".join(figures))


def _warn(sentences: list[str]) -> None:
    """What has to be said before any figure."""
    for sentence in sentences:
        say(f"! {sentence}", "yellow")


def _figure(score: Score) -> str:
    return f"loss {score['loss']:.3f}" + ("" if score["score"] is None else f" {score['metric']} {score['score']:.3f}")


@app.command(rich_help_panel=_METHOD)
def report(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """8. Write the report of a run: one HTML page."""
    say(f"Report: {_stage(config, overrides, _changes(output), 'report').page}")


cli_many.register(app)
cli_data.register(app, _LOOK)
cli_check.register(app, _LOOK)
cli_runs.register(app, _LOOK)
cli_plan.register(app, _LOOK)
cli_compare.register(app, _LOOK)
cli_schema.register(app, _LOOK)
cli_score.register(app, _LOOK)


def require_arguments(arguments: Sequence[str]) -> None:
    """Raise CpiftError for an argument that is empty: of a path it would mean the current folder, or nothing at all."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not argument or re.fullmatch("--[a-z-]+=", argument):
            where = argument.rstrip("=") or f"the argument {f'after {before}' if before else 'at the start'}"
            raise CpiftError(f"{where}: is empty → give a value (is a variable of your shell unset?), or leave it out")


def main() -> None:
    """Run a command: problems that the message explains end with exit code 2 and no traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.set_threshold(50_000)  # torch's import alone makes objects enough for hundreds of collections that find nothing

    with standard_streams():
        try:
            require_arguments(sys.argv[1:])
            app()
        except Exception as error:
            message = str(error) if isinstance(error, CpiftError) else explain_os_error(error)
            if message is None:  # for us to mend: where it happened is what helps
                say(redacted(traceback.format_exc()), err=True)
                sys.exit(1)
            say(f"cpift: {message}", "red", err=True)
            sys.exit(2)


def process() -> None:
    """`main`, as all that its process is for: a failed command does not wait for threads that wait for a lost Ray."""
    from cpift.console.ending import leave_threads

    try:
        main()
    except SystemExit as end:
        if end.code == 2:
            leave_threads(2)
        raise

"""`cpift data`: look at the data as the model sees it, before anything is trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.cli.options import say_code
from cpift.console.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from cpift.config.run import RunConfig, TaskConfig

_app = typer.Typer(no_args_is_help=True, help="Look at the data as the model sees it.")


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands."""
    app.add_typer(_app, name="data", rich_help_panel=panel)


@_app.callback()
def _group() -> None:
    """Look at the data as the model sees it."""


@_app.command()
def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")],
    task: Annotated[str | None, typer.Option("--task", help="one task [default: all]")] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="examples shown of each task")] = 2,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="override a field (repeatable)")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="folder of the run [default: runs/<name>]")] = None,
) -> None:
    """Print examples with what the probes train on in green, and count tokens.

    Green are all turns of the assistant with the token that ends each, and nothing else; red is what `probe.max_length`
    cuts off. Where there are no colours, ⟦ ⟧ stand around what is trained on and ✂ before what is cut off. Makes θ0 if
    its tokenizer is not at hand.
    """

    from cpift.config.loading import load_config
    from cpift.data.preview import coloured, count
    from cpift.data.tasks import read_examples
    from cpift.pipeline.preflight import preflight

    run = load_config(config, overrides or [], {} if output is None else {"output": str(output)})
    say_code(run)
    preflight(run)
    tokenizer, console = _tokenizer(run), Terminal()
    marks = not console.is_terminal or console.no_color
    table = _table(run.probe_training.packing)
    for task_config in _chosen(run, task):
        for number, example in enumerate(islice(read_examples(task_config.train_data), rows), start=1):
            console.print(f"{task_config.name}, example {number}", style="bold")
            console.print(coloured(example, tokenizer, run.probe_training.max_length, marks=marks), soft_wrap=True)
        counts = count(read_examples(task_config.train_data), tokenizer, run.probe_training)
        trained = f"{counts.trained:,} ({counts.trained / max(counts.tokens, 1):.0%})"
        numbers = [f"{counts.examples:,}", f"{counts.tokens:,}", trained, f"{counts.cut:,}", f"{counts.left_out:,}"]
        table.add_row(
            task_config.name,
            *numbers,
            *([f"{counts.rows:,} ({counts.fill:.0%} full)"] if run.probe_training.packing else []),
        )
    console.print(table)


def _table(packing: bool) -> Table:
    from rich.table import Table

    columns = ["task", "examples", "tokens", "trained on", "cut", "left out"] + ["packed rows"] * packing
    table = Table(*columns, title="Training data of the probes", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _chosen(run: RunConfig, name: str | None) -> list[TaskConfig]:
    from cpift.errors import ConfigError, Problem

    chosen = [task for task in run.trained if name in (None, task.name)]
    if not chosen:
        known = ", ".join(task.name for task in run.trained)
        raise ConfigError(f"run {run.name}", [Problem("--task", f"there is no task {name!r}", f"one of {known}")])
    return chosen


def _tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """θ0's, from where it lies; otherwise θ0 is made first, which the run needs anyway."""
    from cpift.disk.locks import exclusive
    from cpift.models.sources import load_tokenizer, source_of
    from cpift.pipeline.engine import NoEngine
    from cpift.pipeline.pipeline import Pipeline

    if (there := source_of(run.model).tokenizer()) is not None:
        return there
    pipeline = Pipeline(run, NoEngine())
    if not pipeline.artifacts.model.complete:
        with exclusive(pipeline.root):
            pipeline.pretrained()
    return load_tokenizer(pipeline.artifacts.model.path)

"""`cpift plan`: what a run of a config will do and need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift import cli_cluster
from cpift.terminal import Terminal, say
from cpift.units import show_size

if TYPE_CHECKING:
    from cpift.planning import Plan

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, for example configs/smoke.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="override a field, for example --set regions.p=0.05 (repeatable)"
    ),
]
Output = Annotated[Path | None, typer.Option("--output", help="folder for all results [default: runs/<name>]")]


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(plan)


def plan(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """Show the stages, what is cached, and what the run needs. Touches nothing."""
    from cpift.config_loading import load_config
    from cpift.preflight import preflight
    from cpift.run_baselines import plan_all
    from cpift.stage_artifacts import StageArtifacts

    run = load_config(config, overrides or [], {} if output is None else {"output": str(output)})
    notes = preflight(run, stage=None, download=False)
    artifacts = StageArtifacts(run)
    _print_plan(plan_all(artifacts, notes), artifacts.root)
    if (note := cli_cluster.unused_gpus(run)) is not None:
        say(note)


def _print_plan(made: Plan, root: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "", "state", "what", title=f"Plan for {root}", title_justify="left")
    colours = {"cached": "green", "to do": "cyan"}
    for step in made.steps:
        table.add_row(step.stage, step.label, Text(step.state, colours.get(step.state, "yellow")), step.detail)
    console = Terminal()
    console.print(table)
    if made.parameters is None:
        console.print("Parameters: known once the model has been downloaded")
    else:
        console.print(f"Parameters: {made.parameters:,}; a core region: {made.core_size:,} elements")
        disk, free = show_size(made.disk_needed or 0), show_size(made.disk_free)
        console.print(f"Disk: about {disk} more, {free} free")
    if made.memory_per_worker is not None:
        memory = show_size(made.memory_per_worker)
        console.print(
            f"Memory of a training worker: about {memory} for weights, gradients and AdamW, and the activations",
            highlight=False,
        )
    for note in made.notes:
        console.print(note)

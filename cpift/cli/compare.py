"""`cpift compare`: whether CPI-FT pays, beside everything else that the same tokens could have bought."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.cli.options import say_code
from cpift.console.terminal import Terminal, say

if TYPE_CHECKING:
    from cpift.config.loading import Fields
    from cpift.config.run import ResourcesConfig
    from cpift.pipeline.engine import Engine


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(compare)


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a run's YAML file, or a comparison's")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="a field of the run, for all methods (repeatable)"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="folder for all results [default: the run's]")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0,1,2", help="train every method with each of these")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="total|after_probes", help="tokens that plain SFT may use")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="in this process, one fine-tune after another, no Ray")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="only list the methods; trains nothing")] = False,
) -> None:
    """Train and score CPI-FT beside its baselines on the same data, budget and evaluation.

    Baselines: full multi-task SFT, multi-stage SFT (random and heuristic order), sequential SFT, the probes, linear
    average, SLERP, task arithmetic, TIES, DARE, and CPI-FT without each of its parts. `--budget total` gives plain SFT
    as many tokens as CPI-FT's probes, backbone and integration together, `after_probes` as many as the last two.

    Intervals are over test rows and seeds; with one seed they say nothing about another training run. What a run of
    this config made already is used; the same command again goes on after a crash. Writes comparison.jsonl (every
    method's score on every test row), comparison.html, comparison.md and comparison.csv.
    """
    from cpift.compare.config import load_comparison

    changes: Fields = {"output": output} if output else {}
    changes |= {} if seeds is None else {"seeds": _seeds(seeds)}
    changes |= {} if budget is None else {"budgets": [budget]}
    comparison = load_comparison(config, overrides or [], changes)
    from cpift.compare.files import RUN_FILE, written_files
    from cpift.pipeline.preflight import preflight

    say_code(comparison.base, comparison.config)
    arrival = comparison.config.arrival
    writes = (*written_files(comparison.config.curves, arrival.pairs if arrival is not None else ()), RUN_FILE)
    preflight(comparison.base, stage="compare", download=not plan, writes=writes)
    from cpift.compare.methods import methods_of, require_possible

    require_possible(comparison)
    if plan:
        for method in methods_of(comparison):
            say(f"{method.kind:12} {method.name}")
        say(f"Each with seeds {', '.join(map(str, comparison.seeds))}; results in {comparison.base.output_dir}")
        return

    from cpift.compare.files import arrival_table, comparison_table, first_sentences, write_comparison
    from cpift.compare.work import run_comparison
    from cpift.console.view import View
    from cpift.disk.locks import exclusive

    view, folder = View(), comparison.base.output_dir
    engine = _engine(comparison.base.resources, here)
    with exclusive(folder), view.recorded(folder, "compare"), engine.session():
        record = run_comparison(comparison, engine, view)
    report = write_comparison(record, comparison.base.output_dir)
    for sentence in first_sentences(record):
        say(f"! {sentence}", "yellow")
    Terminal().print(comparison_table(record))
    if (arrived := arrival_table(record)) is not None:
        Terminal().print(arrived)
    say(f"Report: {report}")


def _seeds(text: str) -> list[int]:
    from cpift.errors import ConfigError, Problem

    if re.fullmatch(r" *[0-9]{1,10} *(, *[0-9]{1,10} *)*", text) is None:
        raise ConfigError("command line", [Problem("--seeds", repr(text), "write numbers, for example 0,1,2")])
    return [int(part) for part in text.split(",")]


def _engine(resources: ResourcesConfig, here: bool) -> Engine:
    """Ray's, or this process."""
    if here:
        from cpift.merging.on_device import device_merging
        from cpift.pipeline.inprocess import InProcessEngine

        return InProcessEngine(device_merging(resources))
    from cpift.cluster.tasks import TaskEngine

    return TaskEngine(resources)

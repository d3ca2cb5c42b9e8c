"""`cpift plan`: what a run of a config will do and need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpift.cli.many import require_gpus, unused_gpus
from cpift.cli.options import Config, Output, Overrides, say_code
from cpift.console.terminal import Terminal, say
from cpift.text.units import parse_size, show_size

if TYPE_CHECKING:
    from rich.table import Table

    from cpift.config.run import RunConfig
    from cpift.data.use import RowFacts
    from cpift.pipeline.plan import Plan
    from cpift.training.memory import Fitting, Holding


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(plan)


def plan(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; docs/plan.md has its fields")] = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE", help="a GPU's memory, as 24GB: which fine-tunes fit, and what would"),
    ] = None,
) -> None:
    """Show the stages, what is cached, and what the run needs. Touches nothing."""
    from cpift.config.loading import load_config

    show_plan(load_config(config, overrides or [], {} if output is None else {"output": str(output)}), as_json, gpu)


def show_plan(run: RunConfig, as_json: bool = False, gpu: str | None = None) -> None:
    """What a run of this config will do and need. Raises ConfigError with everything that would stop it."""
    from cpift.compare.run_baselines import plan_all
    from cpift.pipeline.identity import StageArtifacts
    from cpift.pipeline.preflight import examined

    say_code(run)
    seen = examined(run, stage=None, download=False)
    require_gpus(run)
    artifacts = StageArtifacts(run)
    planned, idle = plan_all(artifacts, seen.notes, seen.rows), unused_gpus(run)
    fits, held = _on_gpu(run, gpu) if gpu is not None else ([], [])
    if as_json:
        record = plan_record(planned, run.name, artifacts.root, idle, fits, held)
        say(json.dumps(record, indent=1, ensure_ascii=False))
        return
    _print_plan(planned, artifacts.root, idle)
    for line in (*_told(fits, str(gpu)), *_held(held, str(gpu))):
        say(line)


def _fitting(run: RunConfig, limit: int, folder: Path) -> list[Fitting]:
    """The fine-tunes of a run on a GPU of so many bytes. Imports torch and the model's class, which takes seconds."""
    from cpift.config.needs import trained_in
    from cpift.training.memory import fitting

    shards = run.resources.workers if run.resources.sharded else 1
    every = {section: fit for task in run.tasks for section, fit in trained_in(run, task, "run").items()}
    strategy = run.resources.strategy
    return [fitting(section, folder, training, shards, limit, strategy) for section, training in every.items()]


def _on_gpu(run: RunConfig, gpu: str) -> tuple[list[Fitting], list[Holding]]:
    """What of a run fits the GPU that `--gpu` says."""
    from cpift.errors import ConfigError, Problem
    from cpift.pipeline.row_checks import folder_at_hand

    try:
        limit, folder = parse_size(gpu), folder_at_hand(run)
    except ValueError as error:
        raise ConfigError("plan", [Problem("--gpu", str(error), "give a size such as 24GB")]) from error
    if folder is None:
        what = "counts on the model's config, which is not here yet"
        raise ConfigError("plan", [Problem("--gpu", what, "give model.path, or ask again once the model is there")])
    return _fitting(run, limit, folder), list(_holding(run, limit, folder))


def _holding(run: RunConfig, limit: int, folder: Path) -> Iterator[Holding]:
    """What regions, fusion and scoring hold on it."""
    from cpift.merging.gpu.room import merge_holds
    from cpift.merging.on_device import on_cpus
    from cpift.training.memory import Holding, scoring_weights

    slices, now = merge_holds(run), "" if run.resources.device != "cpu" else "; resources.device is cpu now"
    now += "".join(f"; {what}" for what, _ in on_cpus(run))
    yield Holding("regions and fusion", slices, slices <= limit, f"slices of the models, whatever their size{now}")
    if all(task.source("test") for task in run.tasks):
        weights = scoring_weights(folder, run.evaluation.precision != "float32")
        now = "" if run.resources.gpus_per_worker else "; resources.gpus_per_worker is 0 now"
        yield Holding("scoring", weights, weights <= limit, f"a model's weights{now}")


def _held(holdings: Sequence[Holding], gpu: str) -> Iterator[str]:
    for one in holdings:
        verdict = "fits" if one.fits else "does not fit"
        yield f"{one.section} on {gpu}: {verdict}, {show_size(one.held)} ({one.what})"


def _told(fits: list[Fitting], gpu: str) -> Iterator[str]:
    """Sentences of what fits."""
    limit = parse_size(gpu) if fits else 0
    for fit in fits:
        parts = [f"{name} {show_size(size)}" for name, size in asdict(fit.memory).items() if size]
        verdict = "fits" if fit.fits else "does not fit"
        yield f"{fit.section} on {gpu}: {verdict}, {show_size(fit.memory.total)} a worker ({', '.join(parts)})"
        if fit.recomputes is not None:
            what = "are computed twice" if fit.recomputes else "are kept"
            yield f"  gradient_checkpointing: auto: activations {what} there"
        for change, memory in fit.ways:
            yield f"  {change}: {show_size(memory.total)}"
        if fit.workers is not None:
            shared = "all of these but optimizer and lora"
            yield f"  resources: {{strategy: fsdp, workers: {fit.workers}}} and {shared}: fits"
        elif not fit.fits and not any(memory.total <= limit for _, memory in fit.ways):
            least = min((fit.memory, *(memory for _, memory in fit.ways)), key=lambda memory: memory.total)
            batch = "its longest batch holds too much; lower max_length"
            fixed = "what it holds beside a batch is too much"
            yield f"  no change of these makes room: {batch if least.total - least.activations < limit else fixed}"


def plan_record(
    planned: Plan,
    name: str,
    root: Path,
    idle: str | None,
    fits: Sequence[Fitting] = (),
    held: Sequence[Holding] = (),
) -> dict[str, Any]:
    """As `--json` gives it; fields are added and none changes its meaning within one `format`."""
    on_gpu = {"gpu": [asdict(fit) for fit in fits], "holding": [asdict(one) for one in held]} if held else {}
    record = asdict(planned) | on_gpu
    return {"format": 1, "name": name, "output": str(root), "unused_gpus": idle, **record}


def _print_plan(planned: Plan, root: Path, idle: str | None) -> None:
    console = Terminal()
    console.print(_stages(planned, root))
    if planned.rows:
        console.print(_rows(planned))
    for label, text in _needs(planned, idle):
        console.print(f"{label}: {text}")
    shown = tuple(f"tasks.{row['task']}.train at {row['field']} = " for row in planned.rows if not _lost(row))
    for note in planned.notes:
        if not note.startswith(shown):  # the table has it
            console.print(note)


def _lost(row: RowFacts) -> bool:
    return bool(row["cut"] or row["left_out"])


def _stages(planned: Plan, root: Path) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Plan for {root}", title_justify="left")
    for name, right in (("stage", False), ("state", False), ("steps", True), ("tokens", True), ("what", False)):
        table.add_column(name, justify="right" if right else "left")
    colours, costs = {"cached": "green", "to do": "cyan"}, {(fit.stage, fit.label): fit for fit in planned.fits}
    for step in planned.steps:
        cost = costs.get((step.stage, step.label))
        figures = ("", "") if cost is None else (_count(cost.steps), _about(cost.tokens))
        state = Text(step.state, colours.get(step.state, "yellow"))
        table.add_row(f"{step.stage} {step.label}".strip(), state, *figures, step.detail)
    return table


def _rows(planned: Plan) -> Table:
    """A line for tasks and fine-tunes whose rows are used alike."""
    from rich.table import Table

    table = Table("rows of", "for", title="Training rows", title_justify="left")
    for name in ("rows", "used", "cut", "left out"):
        table.add_column(name, justify="right")
    shown: dict[tuple[Any, ...], list[str]] = {}
    for row in planned.rows:
        looked = "" if row["all"] else f" (of the first {row['rows']:,})"
        key = (row["task"], row["in_all"], row["used"], row["cut"], row["left_out"], looked)
        shown.setdefault(key, []).append(str(row["field"]).removesuffix(".max_length"))
    for (task, rows, used, cut, left_out, looked), fields in shown.items():
        table.add_row(task, ", ".join(fields), f"{rows:,}", f"{used:,}{looked}", f"{cut:,}", f"{left_out:,}")
    return table


def _needs(planned: Plan, idle: str | None) -> Iterator[tuple[str, str]]:
    """What the run needs of the machine, as far as it is known."""
    if planned.parameters is None:
        yield "Parameters", "known once the model has been downloaded"
    else:
        yield "Parameters", f"{planned.parameters:,}; a core region: {planned.core_size:,} elements"
        yield "Disk", f"about {show_size(planned.disk_needed or 0)} more, {show_size(planned.disk_free)} free"
    if planned.memory_per_worker is not None:
        memory = show_size(planned.memory_per_worker)
        yield (
            "Memory of a training worker",
            f"about {memory} for weights, gradients and the optimizer, and the activations",
        )
    if planned.fits:
        yield "Device", planned.device + (f". {idle}" if idle else "")
        yield "Time", _time(planned)
    elif idle:
        yield "Device", idle


def _time(planned: Plan) -> str:
    from cpift.console.screen import duration

    if planned.seconds is not None:
        measured = "at the best speed of earlier ones on this machine, their start included"
        return f"about {duration(planned.seconds)} of fine-tuning, {measured}"
    todo = {(step.stage, step.label) for step in planned.steps if step.state not in ("cached", "given")}
    if not any((fit.stage, fit.label) in todo for fit in planned.fits):
        return "no fine-tune is left to do"
    known = {f"{fit.stage} {fit.label}".strip(): fit.seconds for fit in planned.fits if fit.seconds is not None}
    first = "unknown until a first run: no fine-tune of this size was timed on this machine"
    some = ", ".join(f"{name} about {duration(seconds)}" for name, seconds in known.items())
    return f"{some}; the rest is not known before the tasks are grouped" if known else first


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _about(value: int | None) -> str:
    """Two digits, with the unit that people use of tokens."""
    if value is None:
        return "?"
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if value >= size:
            return f"{value / size:.2g}{unit}" if value < 100 * size else f"{value / size:.0f}{unit}"
    return str(value)

"""Commands about runs that are there: `cpift watch`, `cpift runs`, `cpift clean`; `cpift extend` and `cpift forget`,
which go on from one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.cli.options import Overrides
from cpift.console.terminal import Terminal, say
from cpift.errors import CpiftError
from cpift.text.units import show_size

if TYPE_CHECKING:
    from cpift.config.run import RunConfig
    from cpift.pipeline.run_folders import RunState

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the output folder of a run, a sweep or a comparison")]
_POLL_SECONDS = 1.0
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red", "damaged": "red"}


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands."""
    app.command(rich_help_panel=panel)(watch)
    app.command(rich_help_panel=panel)(runs)
    app.command(rich_help_panel=panel)(clean)


Finished = Annotated[Path, typer.Argument(metavar="RUN", help="the output folder of a finished run; it is only read")]
PlanOnly = Annotated[bool, typer.Option("--plan", "--dry-run", help="show what it will do and need; touch nothing")]


def register_descendants(app: typer.Typer, panel: str, run_all: Callable[[Callable[[], RunConfig]], None]) -> None:
    """Add the commands that go on from a finished run. run_all: makes every stage of the config that is loaded."""

    @app.command(rich_help_panel=panel)
    def extend(
        run: Finished,
        task: Annotated[
            Path,
            typer.Argument(metavar="TASK.yaml", help="fields of the new task: name, train, test, metric; and replay"),
        ],
        overrides: Overrides = None,
        output: Annotated[Path | None, typer.Option("--output", help="new folder [default: RUN-with-TASK]")] = None,
        plan: PlanOnly = False,
    ) -> None:
        """Add a task to a finished run, into the model that it made; cores of earlier tasks stay as they are.

        Rows of earlier tasks are not needed. Where their test rows are there, they are scored before and after.
        """

        def load() -> RunConfig:
            from cpift.config.loading import read_yaml
            from cpift.lineage.derive import extended

            return extended(run.absolute(), read_yaml(task), task.absolute().parent, output, overrides or [])

        _go_on(load, plan)

    @app.command(rich_help_panel=panel)
    def forget(
        run: Finished,
        task: Annotated[str, typer.Argument(metavar="TASK", help="the task that is taken out")],
        overrides: Overrides = None,
        output: Annotated[Path | None, typer.Option("--output", help="new folder [default: RUN-without-TASK]")] = None,
        plan: PlanOnly = False,
    ) -> None:
        """Make the model again without a task of a finished run, from the other tasks' fine-tunes and cores.

        Groups, backbone, fusion and integration are made anew, for the task's rows went into them; these need the other
        tasks' training rows.
        """

        def load() -> RunConfig:
            from cpift.lineage.derive import forgotten

            return forgotten(run.absolute(), task, output, overrides or [])

        _go_on(load, plan)

    def _go_on(load: Callable[[], RunConfig], plan: bool) -> None:
        from cpift.cli.plan import show_plan

        if plan:
            show_plan(load())
        else:
            run_all(load)


def watch(folder: Run) -> None:
    """Show how far a run is that was started elsewhere: in another shell, or on a machine that sees the same folder.

    Ends with the run: with 0 if it finished, with 1 if it failed, was stopped or was killed. Ctrl-C ends the watching
    and not the run.
    """
    from cpift.pipeline.watch import Watch

    try:
        state = Watch(_require_run(folder), Terminal(stderr=True)).until_the_end(_POLL_SECONDS)
    except KeyboardInterrupt:
        say(f"{folder}: no longer watched; the run goes on", err=True)
        raise
    say(f"{folder}: {_sentence(state)}", None if state.kind == "finished" else "yellow")
    raise typer.Exit(0 if state.kind == "finished" else 1)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to look")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="as a JSON array, for programs")] = False,
) -> None:
    """List runs with their state, age and size."""
    from cpift.pipeline.run_folders import last_change, run_state, runs_below, size_of

    if not folder.is_dir():
        raise CpiftError(f"{folder} is no folder: give one that holds runs")
    rows = [(path, run_state(path), last_change(path), size_of(path)) for path in runs_below(folder)]
    rows.sort(key=lambda row: -row[2])
    if as_json:
        records = [
            {"run": str(path), "state": state.kind, "step": _step(state), "changed": changed, "bytes": size}
            | _origin(path)
            for path, state, changed, size in rows
        ]
        say(json.dumps(records, indent=1))
    elif not rows:
        say(f"{folder} holds no runs")
    else:
        _print_runs(rows)


def _print_runs(rows: list[tuple[Path, RunState, float, int]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cpift.console.screen import duration

    table = Table("run", "state", "step", "changed", "size")
    for path, state, changed, size in rows:
        age = f"{duration(time.time() - changed)} ago"
        origin = _origin(path)
        title = f"{path}\n  {origin['change']}, from {origin['parent']}" if origin else str(path)
        table.add_row(Text(title), Text(state.kind, _COLOURS.get(state.kind, "")), _step(state), age, show_size(size))
    Terminal().print(table)
    say(f"{len(rows)} run{'s' * (len(rows) != 1)}, {show_size(sum(size for *_, size in rows))}")


def _origin(folder: Path) -> dict[str, str]:
    """Of a run that goes on from another: that, and what task came or went."""
    from cpift.lineage.history import generation

    found = generation(folder)
    return {} if found is None or found.parent is None else {"parent": str(found.parent), "change": found.change}


def _step(state: RunState) -> str:
    progress = state.progress
    return "" if progress is None or not progress.step else f"{progress.place} {progress.step}".strip()


def clean(
    folder: Run,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show it and delete nothing")] = False,
) -> None:
    """Free what can be made again: weights of every model but the final one, and what interrupted work left.

    Masks, scores, records, reports and the final model stay, and so do files that are not cpift's, and checkpoints
    that an unfinished fine-tune goes on from. The run's own command makes the weights again.
    """
    from cpift.disk.locks import exclusive
    from cpift.pipeline.run_folders import free, freeable, run_state

    _require_run(folder)
    if run_state(folder).kind == "running":
        raise CpiftError(f"{folder} is in use: wait for the run, or stop it (`cpift watch {folder}` shows it)")
    with nullcontext() if dry_run else exclusive(folder):
        freed, alone = freeable(folder)
        for removed in freed:
            say(f"{show_size(removed.size):>8}  {removed.path.relative_to(folder)}  ({removed.what})")
        for line in alone:
            say(f"left alone: {line}")
        if not freed:
            say("Nothing to free.")
            return
        total = show_size(sum(part.size for part in freed))
        if dry_run:
            say(f"{total} could be freed; nothing was deleted.")
            return
        if not yes and not _agreed(f"Delete {total}? The command that made them makes them again [y/N] "):
            say("Nothing was deleted.")
            return
        for removed in freed:
            free(removed, folder)
    say(f"Freed {total}.")


def _agreed(question: str) -> bool:
    """Whether somebody says yes; nobody who is not there does. Raises CpiftError where nobody can be asked."""
    import sys

    if not sys.stdin or not sys.stdin.isatty():
        raise CpiftError("nobody can be asked here, for standard input is no terminal → --yes, or --dry-run")
    say(question, err=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _sentence(state: RunState) -> str:
    from cpift.console.screen import duration

    progress = state.progress
    when = ""
    if progress is not None:
        during = f" during {progress.step}" if progress.step and state.kind != "finished" else ""
        when = f"{during} after {duration(progress.updated - progress.started)}"
    return {
        "finished": f"finished{when}",
        "failed": f"failed{when}: {state.why}",
        "stopped": f"was stopped{when}; the same command goes on",
        "killed": f"is dead{when}: {state.why}",
        "unknown": "nothing runs, and there is no record of a run (an earlier release, or nothing was started)",
        "damaged": f"nothing can be said of it: {state.why}",
    }[state.kind]


def _require_run(folder: Path) -> Path:
    from cpift.pipeline.run_folders import is_run

    if not folder.is_dir():
        raise CpiftError(f"{folder} is no folder: give the output folder of a run")
    if not (is_run(folder) or (folder / ".lock").is_file()):
        raise CpiftError(f"{folder} holds nothing that cpift made: give the output folder of a run")
    return folder

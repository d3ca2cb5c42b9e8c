"""The commands that run more than one run, or run elsewhere: `cpift sweep` and `cpift submit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.cli.options import say_code
from cpift.console.terminal import Terminal, say

if TYPE_CHECKING:
    from cpift.config.run import RunConfig

_PANEL = "Many runs, other machines"

SweepFile = Annotated[
    Path, typer.Argument(metavar="SWEEP", help="the sweep's YAML file, for example sweeps/smoke_p_tau.yaml")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="a field of the run for the whole sweep (repeatable)"),
]
Output = Annotated[Path | None, typer.Option("--output", help="folder for all results [default: runs/<sweep's name>]")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=_PANEL)(sweep)
    app.command(rich_help_panel=_PANEL)(submit)


def unused_gpus(run: RunConfig) -> str | None:
    """What to say where the cluster, or without one this machine, has GPUs and nothing of the run would use any."""
    from cpift.devices import visible_gpus
    from cpift.errors import CpiftError

    asked = [run.resources.gpus_per_worker, *(task.resources.gpus_per_worker or 0 for task in run.tasks)]
    if any(asked) or (run.merges_only and run.integration is None and not run.scores):
        return None
    named = run.resources.cluster
    try:
        if named is None:
            where, count = "this machine", float(visible_gpus())
        else:
            from cpift.cluster.session import cluster_gpus

            where, count = f"the cluster at {named}", cluster_gpus(run.resources)
    except CpiftError as error:
        return f"whether there are GPUs that the run leaves idle is not known: {error}"
    gpus = f"{count:g} GPU{'s' * (count != 1)}"
    idle = "fine-tunes and evaluations run on CPUs → set resources.gpus_per_worker: 1"
    used = "this config uses none" if run.resources.device == "cpu" else "fine-tunes of this config use none"
    return f"{where} has {gpus}, and {used}: {idle}" if count else None


def require_gpus(run: RunConfig) -> None:
    """Raise ConfigError where regions and fusion are to run on the GPUs of a cluster that answers and has none."""
    named = run.resources.cluster
    if named is None or run.resources.device != "cuda":
        return
    from cpift.cluster.session import cluster_gpus
    from cpift.errors import ConfigError, CpiftError, Problem

    try:
        count = cluster_gpus(run.resources)
    except CpiftError:  # the plan says of other things too that they are not known then
        return
    if count < 1:
        what = f"is `cuda`, and the cluster at {named} has no GPU"
        raise ConfigError(f"run {run.name}", [Problem("resources.device", what, "use `cpu`, or add nodes with GPUs")])


def sweep(config: SweepFile, overrides: Overrides = None, output: Output = None) -> None:
    """Run a config with many values of its fields, sharing all work that they have in common.

    Probes are trained once, core regions of all p come from one pass, and points with the same groups are one trial.
    The same command again goes on after a crash, and does nothing once all is there. Ends with an HTML report and the
    best config as a YAML file.
    """

    from cpift.config.needs import require_extra
    from cpift.errors import StageError
    from cpift.sweep.config import KEEPS, load_sweep

    loaded = load_sweep(config, overrides or [], output)
    require_extra(loaded.config.search.method, "search.method")
    require_extra(loaded.config.search.sampler or "", "search.sampler")
    from cpift.disk.locks import exclusive
    from cpift.pipeline.preflight import preflight
    from cpift.sweep.points import check_points

    stage = f"sweep {loaded.config.model}"
    say_code(loaded.base, loaded.config)
    preflight(loaded.base, stage=stage)
    check_points(loaded, stage)
    from cpift.console.view import View
    from cpift.scorecard.show import card_table
    from cpift.sweep.judging import with_report_rows
    from cpift.sweep.results import failures, gather, results_table, write_results
    from cpift.sweep.scores import remaking
    from cpift.sweep.search import pipeline, run_sweep

    view, folder = View(), loaded.base.output_dir
    with exclusive(folder), view.recorded(folder, "sweep"):
        data = with_report_rows(loaded, gather(loaded, run_sweep(loaded, view), pipeline), view)
        report = write_results(data, loaded.base.output_dir)
    for sentence in data.learning:
        say(f"! {sentence}", "yellow")
    Terminal().print(results_table(data))
    if data.reported is not None:
        Terminal().print(card_table(data.reported))
        say("\n".join(data.reported.sentences()))
    say(f"Report: {report}")
    if data.best_model:
        say(f"Best model: {data.best_model}")
    if data.best_yaml:
        made = "finds its model made" if data.reported is not None else "finds everything made"
        effect = made if KEEPS[data.keep].best else "makes its model again"
        say(f"Best config: {report.with_name('best.yaml')} (cpift {remaking(data.model)} {effect})")
    if failed := failures(data):
        lines = "\n".join(f"  - {line}" for line in failed)
        raise StageError(f"{len(failed)} of {len(data.trials)} trials failed; the rest is kept\n{lines}")


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a run's or a sweep's YAML file")],
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="the head's dashboard, http://HEAD:8265")
    ],
    output: Annotated[
        str | None, typer.Option("--output", help="folder for all results, on storage that every node sees")
    ] = None,
    overrides: Overrides = None,
    wheel: Annotated[bool, typer.Option(help="send this cpift along; else the nodes must have cpift installed")] = True,
    wait: Annotated[bool, typer.Option(help="show the job's log until it ends")] = True,
) -> None:
    """Send a run or a sweep to a Ray cluster as a job, and follow its log.

    The config and the data files it names are sent along; models must be hub ids or lie on shared storage. A job that
    died goes on from its artifacts when the same command is given again. Needs the extra `cluster`.
    """
    from tempfile import TemporaryDirectory

    from cpift.cluster.submit import follow, package
    from cpift.cluster.submit import submit as send

    with TemporaryDirectory(prefix="cpift-submit-") as folder:
        spec = package(config, overrides or [], output, Path(folder), wheel)
        job = send(spec, address, config.stem)
    say(f"Job {job}: {spec.entrypoint}")
    if wait:
        say(f"Ctrl-C leaves it running; stop it with: ray job stop --address {address} {job}")
        follow(address, job)

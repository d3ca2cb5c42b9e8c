"""The report of a run: a page for readers, a table for the terminal, a summary for machines."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from cpift.console.terminal import Terminal, say
from cpift.disk.files import json_text
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.retention import learning_of, sentences
from cpift.report.data import LEFT_OUT, ReportData, compare, left_out_marks, standing, summary, usage
from cpift.report.files import report_md, scores_csv
from cpift.report.index import RUN, write_page

__all__ = ["ReportData", "first_sentences", "scores_table", "show_result", "summary", "write_run"]


def write_run(data: ReportData, folder: Path) -> Path:
    """Write a run's config, its figures (for machines, spreadsheets and readers of Markdown), and the page that shows
    them, which is kept in `reports` beside those of other configurations and listed in index.html; returns its path.

    The page needs no network and no other file. Raises ConfigError where one of the files is somebody's own.
    """
    from cpift.report.page import page

    beside = {
        "config.yaml": data.config_yaml,
        "summary.json": json_text(summary(data)),
        "scores.csv": scores_csv(data),
        "report.md": report_md(data),
    }
    return write_page(folder, RUN, page(data), beside)


def first_sentences(data: ReportData) -> list[str]:
    """What has to be said before the table: of tasks that their own probes did not learn."""
    return sentences(learning_of(data.tasks, data.scores))


def show_result(data: ReportData, folder: Path, page: Path) -> None:
    """The last screen of a run in `folder`: the verdict, the model and how to use it, then figures and the report."""
    model = _from_here(folder / data.model)
    say(f"{data.headline}\n\nFinal model: {model}\n")
    say("".join(f"    {line}\n" for line in usage(data, str(model)).splitlines()))
    for sentence in first_sentences(data):
        say(f"! {sentence}", "yellow")
    Terminal().print(scores_table(data))
    say(f"Report: {_from_here(page)}")


def _from_here(path: Path) -> Path:
    """A path as one types it in the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def scores_table(data: ReportData) -> Table:
    """Scores of every model on every task for the terminal; the best of each column is bold."""
    marks = left_out_marks(data)
    note = f"\n{LEFT_OUT} Its own probe did not learn it: in no mean, and not the worst task." if marks else ""
    table = Table(
        title=f"{data.name}: test scores",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="Above: metric in %, higher is better. Below: loss per answer token.\n"
        f"Retention: score ÷ the own probe's, of losses the other way round. Bold: best.{note}",
    )
    table.add_column("model", no_wrap=True)
    for task in data.tasks:
        metric = data.scores[data.models[0]][task]["metric"]
        below = ("" if metric_of(metric).by_loss else f"\n{metric}") + "\n"
        table.add_column(Text.assemble(f"{task}{marks.get(task, '')}{below}", ("loss", "dim")), justify="right")
    table.add_column("mean\nreten-\ntion", justify="right")
    table.add_column("worst\ntask", justify="right")
    for model in data.models:
        found = standing(data, model)
        mean = f"{found.mean:.1%}" if found else "–"
        worst = Text.assemble(f"{found.worst:.1%}\n", (found.worst_task, "dim")) if found else "–"
        table.add_row(model, *(_cell(data, model, task) for task in data.tasks), mean, worst)
    return table


def _cell(data: ReportData, model: str, task: str) -> Text:
    score = data.scores[model][task]
    best = all(compare(score, data.scores[other][task]) >= 0 for other in data.models)
    main, below = f"{score['loss']:.3f}", ""
    if score["score"] is not None:
        main, below = f"{100 * score['score']:.1f}", f"\n{score['loss']:.3f}"
    return Text.assemble((main, "bold" if best else ""), (below, "dim"))

"""The report of a run: a page for readers, a table for the terminal, a summary for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable
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

_LEAST = 20  # letters of a model's name in the terminal, however narrow
_CAPTION = (
    "Above: metric in %, higher is better. Below: loss per answer token.\n"
    "Retention: score ÷ the own probe's, of losses the other way round. Bold: best."
)
_LEFT_OUT = f"\n{LEFT_OUT} Its own probe did not learn it: in no mean, and not the worst task."


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


@dataclass(frozen=True)
class _ScoreTables:
    """Scores of every model on every task; as many tables below each other as the terminal's width asks for."""

    data: ReportData

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        marks, parts = left_out_marks(self.data), list(_parts(self.data, options.max_width))
        for place, tasks in enumerate(parts):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.title = None if place else f"{self.data.name}: test scores"
            table.add_column("model", no_wrap=True, max_width=max(_LEAST, options.max_width // 3))
            for task in tasks:
                table.add_column(_head(self.data, task, marks.get(task, "")), justify="right", min_width=5)
            last = place == len(parts) - 1
            if last:
                table.add_column("mean\nreten-\ntion", justify="right", min_width=6)
                table.add_column("worst\ntask", justify="right", min_width=6)
                table.caption = _CAPTION + (_LEFT_OUT if marks else "")
            for model in self.data.models:
                cells = [_cell(self.data, model, task) for task in tasks]
                table.add_row(model, *cells, *(_standing(self.data, model) if last else ()))
            yield table


def scores_table(data: ReportData) -> ConsoleRenderable:
    """Scores of every model on every task for the terminal; the best of each column is bold."""
    return _ScoreTables(data)


def _parts(data: ReportData, width: int) -> Iterator[list[str]]:
    """Tasks that stand beside each other; of the last part there is room for the mean and the worst task too."""
    room = width - min(max(map(cell_len, data.models)), max(_LEAST, width // 3)) - 2
    part: list[str] = []
    taken, means = 0, 8 + max(_wide(task) for task in data.tasks)
    for place, task in enumerate(data.tasks):
        wide = max(_wide(task), len(data.scores[data.models[0]][task]["metric"]) + 2)
        if part and taken + wide + (means if place == len(data.tasks) - 1 else 0) > room:
            yield part
            part, taken = [], 0
        part.append(task)
        taken += wide
    yield part


def _wide(task: str) -> int:
    """Of a task's column, with the space beside it; a longer name is written over several lines."""
    return min(max(cell_len(task) + 1, 6), 12) + 2


def _head(data: ReportData, task: str, mark: str) -> Text:
    metric = data.scores[data.models[0]][task]["metric"]
    below = ("" if metric_of(metric).by_loss else f"\n{metric}") + "\n"
    return Text.assemble(f"{task}{mark}{below}", ("loss", "dim"))


def _standing(data: ReportData, model: str) -> tuple[str, str | Text]:
    mean = standing(data, model)
    if mean is None:
        return "–", "–"
    return f"{mean.mean:.1%}", Text.assemble(f"{mean.worst:.1%}\n", (mean.worst_task, "dim"))


def _cell(data: ReportData, model: str, task: str) -> Text:
    score = data.scores[model][task]
    best = all(compare(score, data.scores[other][task]) >= 0 for other in data.models)
    main, below = f"{score['loss']:.3f}", ""
    if score["score"] is not None:
        main, below = f"{100 * score['score']:.1f}", f"\n{score['loss']:.3f}"
    return Text.assemble((main, "bold" if best else ""), (below, "dim"))

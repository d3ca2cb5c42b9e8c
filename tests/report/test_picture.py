"""What a report shows before any table, and the files beside it: figures by hand, and names that are hostile."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpift.config.run import TaskConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import write_json
from cpift.evaluation.verdict import share_of
from cpift.report.chart import Retained, right_end
from cpift.report.data import ReportData, Sample, total_tokens
from cpift.report.facts import halves, samples, tokens_by_model
from cpift.report.files import csv_text, report_md, scores_csv
from cpift.report.page import page
from cpift.report.picture import kept_on, picture, replies, tokens
from cpift.report.plots import training_curve
from cpift.report.write import write_run
from tests.helpers.reports import Page, made_up_run
from tests.helpers.scores import RUN


@pytest.fixture(scope="module")
def data() -> ReportData:
    parts = {"base": {}, "probe a": {"probe a": 10}, "fused": {"probe a": 10, "probe b": None}}
    parts |= {"final": {"probe a": 10, "probe b": 20, "integration": 5}}
    return replace(
        made_up_run(),
        headline="One model: <9 %>.",
        model="integrate/abc",
        halves={"final": {"a": 0.25}},
        mean_halves={"final": 0.2},
        tokens=parts,
        samples=[Sample("a", "1+1", "2", {"final": ("2", 1.0), "base": ("<b>", 0.0), "fused": ("x" * 900, 0.25)})],
    )


@pytest.fixture(scope="module")
def text(data: ReportData) -> str:
    return page(data)


def test_verdict_model_and_picture_come_before_any_table(text: str) -> None:
    order = ["One model: &lt;9 %&gt;.", "integrate/abc", "pipeline(", "<svg", "<table"]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections[:4] == ["retention", "tokens", "replies", "scores"]
    assert sections[4:8] == ["overlap", "cores", "fusion", "training"]
    assert Page(text).open == []


def test_every_plot_has_a_title_and_a_table_behind(text: str) -> None:
    plots = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(plots) == text.count("<svg") == 9
    for plot in plots:
        assert re.match(r'<svg [^>]*role="img"><title>[^<]+</title>', plot)
        assert '<details class="behind">' in plot
        assert "<td>" in plot
    assert "aria-hidden" not in "".join(re.findall("<svg[^>]*>", text))


def test_a_task_that_its_probe_did_not_learn_is_not_drawn(data: ReportData, text: str) -> None:
    assert "Retention on a<" in text
    assert "Retention on c<" not in text
    assert "did not learn the task (probe 0.0 %, θ0 0.0 %)" in text
    nothing = replace(data, tasks=["c"])
    assert "<svg" not in picture(nothing)


def test_what_is_drawn(data: ReportData, text: str) -> None:
    """Final on a: 0.75 ÷ 0.5; on b, a loss, 1 ÷ 1.25."""
    assert kept_on(data, "a")["final"] == Retained(1.5, 0.25)
    assert kept_on(data, "b")["final"] == Retained(0.8)
    assert "150.0 % ±25.0" in text
    assert right_end([Retained(0.5)]) == pytest.approx(110)
    assert right_end([Retained(0.9, 0.5)]) == pytest.approx(140)
    assert right_end([Retained(9.0), Retained(0.1)]) == 170
    far = replace(
        data, scores=data.scores | {"final": data.scores["final"] | {"a": data.scores["base"]["a"] | {"score": 1.0}}}
    )
    assert "200 % ▸" in picture(far), "beyond the end of the axis, with its figure"


def test_cells_up_to_chance_are_pale(text: str) -> None:
    assert 'rgba(var(--heat), 0.000)">0.0100' in text
    assert 'rgba(var(--heat), 0.550)">0.3000' in text


def test_a_curve_breaks_where_a_stage_begins(data: ReportData) -> None:
    log = data.curves["integration"]
    plain = [row | {"stage": 0, "step": place} for place, row in enumerate(log)]
    lines = [
        len(re.findall(r"fill: none; stroke: var\(--s0\)", training_curve("x", rows).svg)) for rows in (plain, log)
    ]
    assert lines[1] == lines[0] + 1
    assert [row[:2] for row in training_curve("x", log).rows][2:4] == [["1", "15"], ["2", "20"]]


def test_tokens_of_every_model(data: ReportData) -> None:
    assert [total_tokens(data, model) for model in data.tokens] == [0, 10, None, 35]
    shown = tokens(data)
    assert "2 probes 30, integration 5" in shown
    assert "2 probes not counted" in shown
    assert tokens(replace(data, tokens={})) == ""


def test_replies_side_by_side(data: ReportData) -> None:
    text = replies(data)
    assert "&lt;b&gt;" in text
    assert "[300 more letters]" in text
    assert re.findall(r"<strong>(\w+)</strong>", text) == ["expected", "final", "fused", "base"]
    assert replies(replace(data, samples=[])) == ""


# ---- files beside the page -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_beside_the_page(data: ReportData, tmp_path: Path) -> None:
    write_run(data, tmp_path)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8")))
    assert len(rows) == len(data.models) * len(data.tasks)
    last = rows[-3]
    assert (last["model"], last["task"], last["score"], last["retention"]) == ("final", "a", "0.75", "1.5")
    assert (last["retention_half_interval"], last["judged"], last["training_tokens"]) == ("0.25", "yes", "35")
    assert (rows[-1]["retention"], rows[-1]["judged"]) == ("", "no")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| final | 115.0 % ±20.0 | 150.0 % ±25.0 | 80.0 % | – |" in text
    assert text.index("One model") < text.index("integrate/abc") < text.index("## Retention")


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "\t=x", "\r=x", '"=x', "a,b\n=c"])
def test_no_spreadsheet_takes_a_name_for_a_formula(name: str, data: ReportData) -> None:
    scores = {name if model == "final" else model: found for model, found in data.scores.items()}
    text = scores_csv(replace(data, scores=scores, models=list(scores), tokens={}))
    cells = list(csv.reader(text.splitlines()))
    assert {len(row) for row in cells} == {10}
    assert not any(cell.lstrip()[:1] in ("=", "+", "@") for row in cells for cell in row)
    assert list(csv.reader(csv_text(["n"], [["\uff1dA1"]]).splitlines()))[1] == ["'\uff1dA1"], "its wide form"
    assert not any(re.match("-(?![0-9.])", cell) for row in cells for cell in row)
    assert list(csv.reader(csv_text(["n"], [[-1.5], [None]]).splitlines())) == [["n"], ["-1.5"], [""]]


def test_code_in_the_markdown_ends_where_it_ends(data: ReportData) -> None:
    text = report_md(replace(data, prompt="[{'content': '```\\n# x'}]"))
    assert "````python" in text


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_verdict() -> None:
    by_task, means = halves(["right", "loss"], RUN)
    assert by_task["final"]["right"] == share_of(RUN, "final", ["right"]).half
    assert means["final"] == share_of(RUN, "final", ["right", "loss"]).half
    assert "right" not in by_task["probe right"], "the probe against itself"
    assert by_task["probe loss"]["right"] == pytest.approx((1 - 0.05 ** (1 / 5)) / 0.8), "0 of 5 rows: not surely 0"


def test_tokens_follow_what_a_model_was_made_from(tmp_path: Path) -> None:
    def made(stage: str, label: str, inputs: dict[str, Artifact | str], counts: list[int] | None = None) -> Artifact:
        prints = {name: one if isinstance(one, str) else one.fingerprint for name, one in inputs.items()}
        artifact = Artifact(tmp_path, stage, label, prints, {}, 1)
        if counts is not None:
            artifact.path.mkdir(parents=True)
            write_json(artifact.path / "training.json", {"tokens": counts} if counts else {})
        return artifact

    model = made("model", "", {})
    probe = made("probe", "a", {"model": model, "data": "d"}, [3, 4])
    old = made("probe", "b", {"model": model}, [])
    regions = made("regions", "", {"model": model, "probe a": probe})
    backbone = made("backbone", "", {"model": model, "data a": "d"}, [10])
    fused = made("fuse", "", {"regions": regions, "probe a": probe, "backbone": backbone})
    final = made("integrate", "", {"fused": fused, "regions": regions}, [5])
    given = made("fuse", "x", {"model": model, "probe a": probe, "probe c": "given", "backbone": model})
    everything = {"model": model, "probe a": probe, "probe b": old, "regions": regions, "backbone": backbone}
    everything |= {"fuse": fused, "integrate": final, "merge": given}
    models = {"base": model, "final": final, "probe b": old, "merge": given}
    found = tokens_by_model(everything, {name: one.fingerprint for name, one in models.items()}, model.fingerprint)
    assert found == {
        "base": {},
        "final": {"probe a": 7, "backbone": 10, "integration": 5},
        "probe b": {"probe b": None},
        "merge": {"probe a": 7, "probe c": None},
    }


def test_samples_are_the_first_rows(tmp_path: Path) -> None:
    rows = tmp_path / "t.jsonl"
    rows.write_text('{"prompt": "1+1", "completion": "it is 2"}\n{"prompt": "2+2", "completion": "4"}\n' * 2)
    task = TaskConfig.model_validate({"name": "t", "metric": "number", "train": {"file": rows}, "test": {"file": rows}})
    other = task.model_copy(update={"name": "u", "metric": "loss"})

    def said(*texts: str) -> dict[str, Any]:
        return {"metric": "number", "examples": [{"prediction": text, "score": float(text == "4")} for text in texts]}

    loss = {"u": {"examples": [{"loss": 1.0}] * 3}}
    scores = {"base": {"t": said("9", "4", "4")} | loss, "probe t": {"t": said("2")} | loss}
    scores |= {"probe u": {"t": said("8", "8", "8")} | loss}
    assert samples([task, other], scores) == [
        Sample("t", "1+1", "it is 2", {"base": ("9", 0.0), "probe t": ("2", 0.0)}),
        Sample("t", "2+2", "4", {"base": ("4", 1.0)}),
    ]

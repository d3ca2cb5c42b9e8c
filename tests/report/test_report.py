"""The report on made-up figures: what it computes, what it says, and that the page stands alone."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpift.config.run import RunConfig
from cpift.disk.top_files import REPORTS, RUN_FILES
from cpift.method.changes import Change
from cpift.report import chart as report_chart
from cpift.report import plots as report_plots
from cpift.report.data import compare, retention, standing, verdict
from cpift.report.model_card import license_of, model_card, write_model_card
from cpift.report.page import page
from cpift.report.places import moves_of
from cpift.report.tensor_names import kind_of, layer_of
from cpift.report.write import ReportData, scores_table, summary, write_run
from cpift.training.spec import HeldOutRow
from tests.helpers.reports import Page, made_up_run, score


@pytest.fixture
def data() -> ReportData:
    return made_up_run()


def test_retention(data: ReportData) -> None:
    """0.75 ÷ 0.5; losses 1 ÷ 1.25 where the metric is the loss; none where the probe scored 0, as θ0 did."""
    assert [retention(data, "final", task) for task in data.tasks] == [1.5, 0.8, None]
    kept = standing(data, "final")
    assert kept is not None
    assert kept.mean == pytest.approx((1.5 + 0.8) / 2)
    assert (kept.worst_task, kept.worst) == ("b", 0.8)


def test_every_probe_retains_its_own_task(data: ReportData) -> None:
    for task in ("a", "b"):
        assert retention(data, f"probe {task}", task) == 1.0


def test_standing_is_unknown_without_every_probe(data: ReportData) -> None:
    scores = {model: found for model, found in data.scores.items() if model != "probe b"}
    partial = replace(data, scores=scores, models=list(scores))
    assert standing(partial, "final") is None
    assert summary(partial)["models"]["final"]["mean_retention"] is None
    assert "–" in rendered(partial)


@pytest.mark.parametrize(
    ("one", "other", "sign"),
    [
        (score("choice", 0.5, 9.0), score("choice", 0.4, 1.0), 1),
        (score("choice", 0.5, 9.0), score("choice", 0.5, 1.0), 0),
        (score("loss", None, 1.0), score("loss", None, 2.0), 1),
        (score("loss", None, 2.0), score("loss", None, 1.0), -1),
        (score("loss", None, float("nan")), score("loss", None, 9.0), -1),
        (score("loss", None, 9.0), score("loss", None, float("nan")), 1),
    ],
)
def test_compare(one: dict[str, Any], other: dict[str, Any], sign: int) -> None:
    assert compare(one, other) == sign


def test_verdict_says_better_equal_and_worse_by_name(data: ReportData) -> None:
    sentences = verdict(data)
    assert sentences.pop(0).endswith("retention means nothing there: c (probe 0.0 %, θ0 0.0 %).")
    assert sentences[0] == (
        "The final model against θ0: better on 2 of 3 (a, b); equal on 1 of 3 (c). "
        "By loss per answer token: better on 2 of 3 (a, b); worse on 1 of 3 (c)."
    )
    assert sentences[1].startswith("The final model against the fused model: better on 2 of 3 (a, b); equal on 1")
    assert sentences[2].startswith(
        "The final model against each task's own probe: better on 1 of 3 (a); equal on 1 of 3 (c); worse on 1 of 3 (b)."
    )
    assert "loss per answer" not in verdict(replace(data, tasks=["b"]))[0], "by metric and by loss are one question"
    assert "one seed on 64 test rows" in sentences[-1]
    assert "±12 points" in sentences[-1], "1.96 · √(¼ ÷ 64) = 0.1225"


def test_summary_is_plain_json(data: ReportData) -> None:
    found = summary(data)
    assert json.loads(json.dumps(found)) == found
    assert found["models"]["final"]["worst_task"] == "b"
    assert found["checks_passed"] is True
    failing = replace(data, checks=[*data.checks, {"name": "x", "passed": False, "detail": ""}])
    assert summary(failing)["checks_passed"] is False


def rendered(data: ReportData, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(scores_table(data))
    return console.export_text()


def test_terminal_table_shows_every_figure_in_80_columns(data: ReportData) -> None:
    text = rendered(data)
    for words in ("base", "probe a", "final", "75.0", "1.250", "115.0%", "25.0%"):
        assert words in text, text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_page_stands_alone(data: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_run(data, path.parent)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.seen
    assert len(page.ids) == len(set(page.ids)), "ids of one plot must not shadow those of another"
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert {file.name for file in path.parent.iterdir()} == {*RUN_FILES, REPORTS}


@pytest.mark.slow
def test_page_escapes_what_users_wrote(data: ReportData, tmp_path: Path) -> None:
    write_run(data, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for raw in ("<script>", "<b>a</b>", "<warning>"):
        assert raw not in text
    for shown in ("&lt;script&gt;", "&lt;b&gt;a&lt;/b&gt;", "a &lt;warning&gt;"):
        assert shown in text


@pytest.mark.slow
def test_page_shows_the_figures(data: ReportData, tmp_path: Path) -> None:
    write_run(data, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        "75.0",
        "1.250",
        "80%",
        "0.3000",
        "(30.0×)",
        "2 groups of the 3",
        "4.000%",
        "✓ passed",
        "torch: 9.9",
    ):
        assert words in text, words
    assert text.count('class="edge"') == 2, "one pair reaches τ, shown twice in a symmetric matrix"
    assert text.count('class="own"') == 3
    assert "FAILED" not in text
    failing = replace(data, checks=[{"name": "frozen", "passed": False, "detail": "3 moved"}])
    write_run(failing, tmp_path)
    assert "✗ FAILED" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_page_shows_where_tasks_moved_the_model_if_it_is_known(data: ReportData, tmp_path: Path) -> None:
    write_run(data, tmp_path)
    assert "moved θ0</summary>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
    tensors = {name: Change(8, 4, 0.5, 1.0, l2, 2.0) for name, l2 in zip(names, (1.0, 0.5, 0.25), strict=True)}
    tensors["model.layers.1.self_attn.q_proj.bias"] = Change(8, 4, 0.5, 1.0, 1.0, 0.0)
    farther = moves_of(tensors | {"lm_head.weight": Change(8, 8, 9.0, 60.0, 24.0, 2.0)})
    write_run(replace(data, moves={"a": moves_of(tensors), "<b>": farther}), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert text.count("moved θ0</summary>") == 2
    assert "Where the probe of &lt;b&gt; moved θ0" in text
    assert 'rgba(var(--heat), 0.550)">50</td>' in text
    assert 'rgba(var(--heat), 0.138)">12</td>' in text
    assert 'rgba(var(--heat), 0.550)">1200</td>' in text
    assert '<th scope="row">1</th><td>new</td><td style="background: rgba(var(--heat), 0.275)">25</td><td></td>' in text


@pytest.mark.slow
def test_page_is_the_same_for_the_same_data(data: ReportData, tmp_path: Path) -> None:
    first, second = (write_run(data, tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_page_of_the_smallest_run(data: ReportData, tmp_path: Path) -> None:
    """One task, no layers in the tensors' names, one angle for the whole model, nothing logged."""
    scores = {model: {"a": found["a"]} for model, found in data.scores.items() if model in ("base", "probe a", "final")}
    small = replace(
        data,
        models=list(scores),
        tasks=["a"],
        scores=scores,
        jaccard=[[1.0]],
        groups=[["a"]],
        checks=[],
        provenance=[],
        cores={"a": [{"tensor": "weight", "numel": 10, "core": 0}]},
        regions={"a": {"requested": 1, "count": 0, "threshold": None}},
        slerp=[
            {"tensor": "weight", "numel": 10, "core": 0},
            {"tensor": "(model)", "angles": [0.0], "lerp": [1.0], "core": 0, "numel": 0},
        ],
        curves={"probe a": []},
        warnings=[],
    )
    write_run(small, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "100.0% of them" in text
    write_run(replace(small, slerp=[]), tmp_path)
    assert "No vector was interpolated" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_plots_are_svg_with_text_and_variables(data: ReportData) -> None:
    plots = {
        "layer": report_plots.density_by_layer(data.cores),
        "norm": report_plots.density_by_kind(data.cores),
        "tensors × folds": report_plots.angle_histogram(data.slerp),
        data.tasks[1]: report_plots.angles_by_layer(data.slerp, data.tasks),
        "optimizer step": report_plots.training_curve("integration", data.curves["integration"]),
    }
    for words, plot in plots.items():
        svg = plot.svg
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title"), "said first by who does not see it"
        assert root[0].text
        assert {len(row) for row in plot.rows} == {len(plot.head)}
        assert words in svg
        assert "mathdefault" not in svg
        assert "var(--ink)" in svg or "var(--muted)" in svg
        assert not re.search(r"#0[1-4]0[0-9a-f]{3}\b", svg), "a stand-in colour was left"
        assert len(svg) < 60_000


def test_sixteen_tasks_fit(data: ReportData) -> None:
    cores = {f"task{i}": data.cores["a"] for i in range(16)}
    assert "task15" in report_plots.density_by_layer(cores).svg
    assert "task15" in report_plots.density_by_kind(cores).svg


@pytest.mark.parametrize(
    ("steps", "running", "starts"),
    [
        ([(0, 5), (0, 10), (1, 5), (1, 10), (2, 5)], [5, 10, 15, 20, 25], [0, 10, 20]),
        ([(0, 5), (0, 10), (1, 15), (1, 20)], [5, 10, 15, 20], [0, 10]),
        ([(0, 1)], [1], [0]),
    ],
)
def test_steps_run_on_through_stages(steps: list[tuple[int, int]], running: list[int], starts: list[int]) -> None:
    rows = [{"stage": stage, "step": step} for stage, step in steps]
    assert report_plots._running_steps(rows) == (running, starts)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.embed_tokens.weight", None, "embed"),
        ("model.layers.0.self_attn.q_proj.weight", 0, "q"),
        ("model.layers.11.self_attn.k_proj.bias", 11, "k"),
        ("model.layers.2.self_attn.v_proj.weight", 2, "v"),
        ("model.layers.2.self_attn.o_proj.weight", 2, "o"),
        ("model.layers.2.self_attn.q_norm.weight", 2, "norm"),
        ("model.layers.2.mlp.gate_proj.weight", 2, "gate"),
        ("model.layers.2.mlp.up_proj.weight", 2, "up"),
        ("model.layers.2.mlp.down_proj.weight", 2, "down"),
        ("model.layers.2.post_attention_layernorm.weight", 2, "norm"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("transformer.wte.weight", None, "embed"),
        ("transformer.h.7.attn.c_attn.weight", 7, "qkv"),
        ("transformer.h.7.attn.c_proj.weight", 7, "o"),
        ("transformer.h.7.mlp.c_fc.weight", 7, "up"),
        ("transformer.h.7.mlp.c_proj.weight", 7, "down"),
        ("transformer.h.7.ln_1.bias", 7, "norm"),
        ("gpt_neox.layers.3.attention.query_key_value.weight", 3, "qkv"),
        ("gpt_neox.layers.3.attention.dense.weight", 3, "o"),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h.weight", 3, "down"),
        ("model.layers.2.block_sparse_moe.experts.3.w2.weight", 2, "down"),
        ("something.else", None, "other"),
    ],
)
def test_layer_and_kind_of_a_tensor(name: str, layer: int | None, kind: str) -> None:
    assert (layer_of(name), kind_of(name)) == (layer, kind)


def run_config(model: dict[str, Any]) -> RunConfig:
    source = {"procedural": "addition", "size": 4}
    return RunConfig.model_validate(
        {
            "name": "card",
            "model": model,
            "tasks": [{"name": name, "train": source, "test": source} for name in ("a", "b")],
            "probe": {"steps": 1},
            "integration": {"steps": 7, "learning_rate": 3e-5},
        }
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"hub": "someone/model", "revision": "abc"},
            ["`someone/model`, revision `abc`", 'base_model: "someone/model"'],
        ),
        ({"gguf": {"file": "m.gguf", "package": "pack"}}, ["GGUF file `m.gguf` of the Python package `pack`"]),
        ({"path": "/secret/place/model"}, ["A local checkpoint, `model`."]),
        ({"scratch": {}}, ["random weights"]),
    ],
)
def test_model_card(model: dict[str, Any], words: list[str]) -> None:
    manifest = {"fingerprint": "abc123", "versions": {"torch": "9.9"}, "commit": None}
    text = model_card("final", run_config(model), [["b"], ["a"]], manifest, None)
    for expected in [
        *words,
        "| 1 | b |",
        "| 2 | a |",
        "7 steps a stage",
        "3e-05",
        "abc123",
        "torch 9.9",
        "not recorded",
    ]:
        assert expected in text
    assert "/secret" not in text, "a card is published: no paths of the machine that made it"
    assert text.startswith("---\nlibrary_name: transformers")
    assert "Integration" not in model_card("fused", run_config(model), [["b"], ["a"]], manifest, None)


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: mit\n---\n# Model\n", "mit"),
        ("---\ntags: [x]\n---\n", None),
        ("# license: mit\n", None),
        ("---\n: [\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ],
)
def test_license_is_read_from_front_matter_only(tmp_path: Path, readme: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert license_of(tmp_path) == found
    write_model_card(tmp_path, "fused", run_config({"scratch": {}}), [["a", "b"]], {}, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("license is stated as `mit`" in text) == (found == "mit")


def test_license_of_nothing(tmp_path: Path) -> None:
    assert license_of(None) is None
    assert license_of(tmp_path) is None


def test_the_terminal_has_as_many_tables_as_its_width_asks_for(data: ReportData) -> None:
    tasks = [f"task number {place}" for place in range(12)]
    scores = {model: {task: score("choice", 0.5, 1.0) for task in tasks} for model in data.models}
    many = replace(data, tasks=tasks, scores=scores)
    for width in (60, 80):
        text = rendered(many, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("50.0") == 12 * len(data.models)
        assert text.count("mean") == 1


@pytest.mark.slow
def test_figures_that_are_no_numbers_leave_json_readable(data: ReportData, tmp_path: Path) -> None:
    scores = data.scores | {"final": data.scores["final"] | {"b": score("loss", None, float("nan"), rows=0)}}
    write_run(replace(data, scores=scores), tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert found["models"]["final"]["scores"]["b"]["loss"] is None


def test_long_names_leave_a_panel_its_title() -> None:
    """The title begins at the figure's edge, whatever room the names beside the axis take."""
    names = {f"probe {'x' * 40}{place}": report_chart.Retained(0.5) for place in range(3)}
    looks = dict.fromkeys(names, report_chart.MADE)
    svg = report_chart.kept_panel("a title of twenty letters", names, looks, 150).svg
    box = re.search(r'viewBox="0 0 ([0-9.]+) ', svg)
    place = re.search(r'<text[^>]* x="([0-9.]+)"[^>]*>a title of twenty letters', svg)
    assert box is not None
    assert place is not None
    assert float(place[1]) < 0.1 * float(box[1])


@pytest.mark.slow
def test_held_out_losses_are_shown_with_the_lowest_of_each_stage() -> None:
    rows: list[HeldOutRow] = [
        {"stage": stage, "step": 4 * place, "loss": loss, "tokens": 9}
        for stage, losses in enumerate(((2.5, 1.25, 1.5), (1.75, float("nan"), 1.125)))
        for place, loss in enumerate(losses, start=1)
    ]
    data = made_up_run()
    assert "held-out" not in page(data)
    shown = page(replace(data, held_out={"probe a": rows, "probe b": []}))
    assert "probe a: held-out loss 2.500 → 1.125, lowest 1.250 at step 8, 1.125 at step 12" in shown
    assert "Held-out loss of probe a" in shown
    assert "probe b: held-out" not in shown

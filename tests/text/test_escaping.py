"""Names that are somebody's own attack nothing: not the terminal, not the page, nor the card; no stream ends work."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.table import Table

from cpift.compare.files import comparison_table, first_sentences, write_comparison
from cpift.compare.findings import FULL
from cpift.compare.record import BASE, OURS, PROBES, Header, Record, Row
from cpift.config.inputs import ScratchModel
from cpift.config.run import RunConfig
from cpift.console.terminal import Terminal, say
from cpift.console.view import View
from cpift.data.preview import coloured
from cpift.errors import CheckpointError, Problem
from cpift.models.scratch import make_scratch_tokenizer
from cpift.report.data import Sample
from cpift.report.files import report_md, scores_csv
from cpift.report.model_card import model_card
from cpift.report.page import page as run_page
from cpift.report.write import scores_table
from cpift.rows.examples import Example, Message
from cpift.sweep.files import sweep_md, trials_csv
from cpift.sweep.page import sweep_page
from cpift.sweep.results import results_table
from cpift.text.escaping import code, html, markdown, one_line, terminal
from tests.helpers.reports import made_up_run, made_up_sweep

MARKUP = (
    "a[/b]c",
    "[red]x[/red]",
    "[link=http://x]y[/link]",
    ":smile:",
    "{{x}}",
    "%s%n",
    "{x!r:>9}",
    "[[x]]",
    "a\\[b]",
)
CONTROLS = ("a\x1b[2Jb", "a\x1b]0;title\x07b", "\x9b31m", "a\rb", "a\x00b", "a\x7fb", "\t x", "a\u2028b", "a\x0bb")
LETTERS = ("a\u202eb", "\u2066x\u2069", "\u200bx", "\ud800", "\ufeffx", "\U000e0041x")
TAGS = (
    "<script>alert(1)</script>",
    'a"><img src=x>',
    "'><svg onload=x>",
    "</code></pre><h1>x",
    "--> <!--",
    "]]>",
    "<a\nb=x>",
)
ENTITIES = ("&lt;b&gt;", "&#35; x", "&amp", "&copy;")
BLOCKS = (
    "# heading",
    "a\n# heading",
    "a\n\n---\n\nb",
    "- x",
    "+ x",
    "1. x",
    "2) x",
    "=====",
    "| a |\n|---|",
    "> x",
    "    x",
)
INLINE = (
    "`",
    "``` x",
    "a`b``c",
    "*b* _i_ **s**",
    "[x](http://y)",
    "![x](y)",
    "<http://x>",
    "a|b|c",
    "a\\",
    "~~x~~",
    "[x]: y",
)
MATHS = ("$x^{$", "$$\\input{x}$$", "\\frac{", "a_b", "_a_")
HOSTILE = [*MARKUP, *CONTROLS, *LETTERS, *TAGS, *ENTITIES, *BLOCKS, *INLINE, *MATHS, "x" * 3000]
SHORT = [name for name in HOSTILE if len(name) < 100]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff\u2028]")


def printed(*things: Any, **settings: Any) -> str:
    stream = io.StringIO()
    console = Terminal(file=stream, width=200, **settings)
    for thing in things:
        console.print(thing)
    return stream.getvalue()


def parsed(text: str) -> tuple[list[str], list[str], str]:
    """The kinds of blocks and of what is inside them, and the text, of a page in Markdown."""
    blocks = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
    inside = [child for block in blocks for child in block.children or ()]
    kinds = [child.type for child in inside if not child.type.startswith("text")]
    return [block.type for block in blocks], kinds, "".join(child.content for child in inside)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_every_medium_shows_a_name_and_nothing_else(name: str) -> None:
    assert not CONTROL.search(terminal(name))
    assert "\n" not in one_line(name)
    assert not set(html(name)) & set("<>\"'")
    message = str(CheckpointError("x", [Problem(name, name, name)]))
    assert not CONTROL.search(message)
    assert len(message.splitlines()) == 2
    shown = one_line(name).strip()
    for before, after, of in (("", "", markdown), ("a ", " b", markdown), ("# ", "", markdown), ("a ", " b", code)):
        blocks, kinds, text = parsed(f"{before}{of(name)}{after}\n")
        assert {block.split("_")[0] for block in blocks} <= {"inline", "paragraph", "heading"}
        assert kinds == ["code_inline"] * (of is code)
        assert len([block for block in blocks if block == "inline"]) == 1
        assert shown in text.replace("\\|", "|"), text
        assert of is code or "\\" in shown or "\\" not in text, text
    row = parsed(f"| a | b |\n|---|---|\n| {markdown(name)} | {code(name)} |\n")
    assert row[0].count("td_open") == 2
    assert row[1] == ["code_inline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_the_terminal_shows_names_as_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    for live in (False, True):
        stream = io.StringIO()
        view = View(Terminal(file=stream, width=200, force_terminal=live, color_system=None))
        with view.stage(name):
            view.progress({"title": name, "done": 0.5, "task": name})
            view.finish(name)
        for say_it in (view.note, view.cached, view.warn):
            say_it(name)
        cursor = re.compile(r"\x1b\[\??\d*[A-Zhl]|\r")
        text = printed(name, table) + (cursor.sub("", stream.getvalue()) if live else stream.getvalue())
        assert not CONTROL.search(text)
        if name in (*MARKUP, *TAGS):
            assert sum(text.count(form) for form in {name, one_line(name)}) >= 5
    say(name, "red")
    assert not CONTROL.search(capsys.readouterr().out)


def elements(page: str) -> tuple[list[str], set[str]]:
    """Of the page, one by one; and the kinds in its plots, which have as many marks on an axis as names leave room."""
    plots = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    kinds = {part.tag for plot in plots for part in ElementTree.fromstring(plot).iter()}
    return re.findall(r"<(/?[a-zA-Z!][a-zA-Z0-9-]*)", re.sub(r"<svg .*?</svg>", "<svg>", page, flags=re.DOTALL)), kinds


def run_named(name: str) -> Any:
    data, own = made_up_run(), {"a": name}

    def renamed(found: dict[str, Any]) -> dict[str, Any]:
        return {own.get(key, key): value for key, value in found.items()}

    scores = {model.replace("probe a", f"probe {name}"): renamed(one) for model, one in data.scores.items()}
    return replace(
        data,
        name=name,
        config_yaml=name,
        tasks=[name, "b", "c"],
        models=list(scores),
        scores=scores,
        groups=[["c"], [name, "b"]],
        cores=renamed(data.cores),
        regions=renamed(data.regions),
        slerp=[{**one, "tensor": f"{one['tensor']}{name}"} for one in data.slerp],
        curves={f"probe {name}": data.curves["probe a"], "integration": data.curves["integration"]},
        checks=[{"name": name, "passed": True, "detail": name}],
        provenance=[data.provenance[0] | dict.fromkeys(("label", "stage", "device", "platform", "commit"), name)],
        warnings=[name],
        headline=name,
        model=name,
        prompt=name,
        tokens={f"probe {name}": {f"probe {name}": 1}, "final": {f"probe {name}": 1, name: None}},
        samples=[Sample(name, name, name, {f"probe {name}": (name, 1.0), "final": (name, 0.5)})],
    )


def sweep_named(name: str) -> Any:
    data = made_up_sweep()
    trials = [replace(one, reason=one.reason and name, groups=[[[name], ["b"]]]) for one in data.trials]
    overlaps = [replace(one, tasks=[name, "b", "c"]) for one in data.overlaps]
    return replace(data, name=name, trials=trials, sweep_yaml=name, best_yaml=name, overlaps=overlaps)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return elements(run_page(run_named("plain"))), elements(sweep_page(sweep_named("plain")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        TAGS[0],
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (f"{MARKUP[0]}{LETTERS[0]}", f"{CONTROLS[1]}{TAGS[3]}", "$x^{$\"'><img>_a_")
        ),
    ],
    ids=ascii,
)
def test_pages_have_the_same_elements_whatever_names_they_show(name: str, plain: tuple[Any, Any]) -> None:
    run, sweep = run_named(name), sweep_named(name)
    for text, wanted in ((run_page(run), plain[0]), (sweep_page(sweep), plain[1])):
        assert elements(text) == wanted
        assert not CONTROL.search(text)
    assert parsed(report_md(run))[:2] == parsed(report_md(run_named("plain")))[:2]
    assert {len(row) for row in csv.reader(scores_csv(run).splitlines())} == {10}
    assert parsed(sweep_md(sweep))[:2] == parsed(sweep_md(sweep_named("plain")))[:2]
    assert len({len(row) for row in csv.reader(trials_csv(sweep).splitlines())}) == 1
    assert not CONTROL.search(report_md(run) + scores_csv(run) + sweep_md(sweep) + trials_csv(sweep))
    assert not CONTROL.search(printed(scores_table(run), results_table(sweep)))


def comparison_named(name: str) -> Record:
    """Every text of a record that somebody else can have chosen; and of methods, which a file of theirs may hold."""
    run = RunConfig.model_validate(
        {"name": "x", "model": {"hub": name}, "probe": {"steps": 1}, "integration": {"steps": 1}}
        | {"tasks": [{"name": task, "train": {"hub": name}, "test": {"hub": name}} for task in "ab"]}
    )
    curve = [f"backbone.source = {value}" for value in (name, "staged")]
    kinds = {BASE: "reference", PROBES: "reference", "probe a": "probe", "probe b": "probe", f"SFT {name}": "sft"}
    kinds |= {FULL: "sft", "linear": "merge", f"{OURS}, backbone alone": "cpift", f"{OURS}, fused alone": "cpift"}
    kinds |= {OURS: "cpift", f"no {name}": "part", f"so {name}": "variant"} | dict.fromkeys(curve, "curve")

    def row(place: int, method: str, kind: str) -> Row:
        items = [float((place + number) % 3 > 0) for number in range(6)]
        scores = {task: {"score": sum(items) / 6, "loss": 1.0, "items": items} for task in "ab"}
        return Row(method, kind, 0, None, None, {}, [["a"], ["b"]], 10, 1.0, scores)

    overlaps = [{"jaccard": [[1.0, 0.1], [0.1, 1.0]], "chance": 0.01, "groups": [["a"], ["b"]]}]
    header = Header(
        name,
        run.model_dump(mode="json", exclude_none=True),
        {"curves": {"backbone.source": [name, "staged"]}},
        dict.fromkeys("ab", "choice"),
        [0],
        7,
        {"torch": name, "transformers": name},
        name,
        name,
        0.95,
        100,
        overlaps,
    )
    return Record(header, [row(place, *one) for place, one in enumerate(kinds.items())])


def comparison_form(name: str, folder: Path) -> tuple[Any, ...]:
    """Of a comparison's Markdown the blocks and what is inside them, of its plots the kinds of elements, of its page
    the elements, of its table the columns."""
    record = comparison_named(name)
    page = write_comparison(record, folder)
    assert not CONTROL.search(printed(comparison_table(record)) + "".join(first_sentences(record)))
    text = page.with_suffix(".md").read_text(encoding="utf-8").rpartition("<!-- ")[0]
    shown = page.read_text(encoding="utf-8").rpartition("<!-- ")[0]
    cells = page.with_suffix(".csv").read_text(encoding="utf-8")
    plots = [(folder / file).read_text(encoding="utf-8") for file in ("comparison-methods.svg",)]
    assert not CONTROL.search(text + shown + cells + "".join(plots))
    kinds = [{part.tag for part in ElementTree.fromstring(plot).iter()} for plot in plots]
    columns = {len(row) for row in csv.reader(cells.splitlines())}
    return *parsed(text)[:2], kinds, elements(shown), columns


@pytest.fixture(scope="module")
def plain_comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return comparison_form("plain", tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "".join((CONTROLS[1], LETTERS[0], TAGS[1], INLINE[2], MATHS[0])),
        *(pytest.param(name, marks=pytest.mark.slow) for name in (TAGS[0], *INLINE[:5:2])),
    ],
    ids=ascii,
)
def test_a_comparisons_page_keeps_its_form(name: str, plain_comparison: tuple[Any, ...], tmp_path: Path) -> None:
    form = comparison_form(name, tmp_path)
    assert form == plain_comparison
    assert len(form[-1]) == 1


def card(text: str) -> str:
    hub, steps = {"hub": text, "revision": text}, {"steps": 1}
    source = hub | {"subset": text, "split": text}
    tasks = [{"name": name, "train": source, "test": source} for name in "abc"]
    fields = {"name": "x", "model": hub, "tasks": tasks, "probe": steps, "integration": steps}
    config = RunConfig.model_validate(fields | {"backbone": {"source": text}})
    manifest = dict.fromkeys(("fingerprint", "started", "device", "platform", "commit"), text)
    return model_card("final", config, [["a", "b", "c"]], manifest | {"versions": {"torch": text}}, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHORT if name != "\ud800"], ids=ascii)
def test_the_model_card_keeps_its_form(name: str) -> None:
    front, body = card(name).split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["license"] == name
    assert not CONTROL.search(body)
    assert parsed(body)[:2] == parsed(card("plain").split("\n---\n", 1)[1])[:2]


def test_rows_are_previewed_as_text() -> None:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    for name in (name for name in SHORT if name != "\ud800"):
        example = Example((Message("user", name), Message("assistant", name)))
        assert not CONTROL.search(printed(coloured(example, tokenizer, 4000, marks=True)))


ASCII = {"PYTHONIOENCODING": "ascii"}
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SPEAKS = """from cpift.console.terminal import Terminal, say, standard_streams
with standard_streams():
    say("\\u2192 \\u03b8 \\u6a21")
    Terminal().print("to do " * 1000)
    say("no such", "red", err=True)
    raise SystemExit(STATUS)
"""


def spoken(program: list[str], redirect: str, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = f"{shlex.join([sys.executable, *program])} {redirect}"
    environment = os.environ | environment
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, check=False, timeout=300)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 2])
@pytest.mark.parametrize(
    ("redirect", "environment", "ends", "said"),
    [
        ("", ASCII, 0, "no such"),
        ("", POSIX, 0, "no such"),
        (">&- 2>&- <&-", {}, 0, ""),
        (">&-", POSIX, 0, "no such"),
        ("> /dev/full", {}, 2, "no such\ncpift: standard output could not be written: No space left"),
        ("2> /dev/full | head -c 1; exit ${PIPESTATUS[0]}", {}, 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", POSIX, 0, "no such"),
    ],
)
def test_streams_that_fail_end_no_work(
    redirect: str, environment: dict[str, str], ends: int, said: str, status: int
) -> None:
    done = spoken(["-c", SPEAKS.replace("STATUS", str(status))], redirect, environment)
    assert done.returncode == max(ends, status), done.stderr
    assert said in done.stderr.decode("ascii" if environment else "utf-8")
    if not redirect:
        assert done.stdout.decode("ascii").startswith("-> theta \\u6a21\nto do to do")


@pytest.mark.slow
def test_a_command_runs_where_nothing_but_ascii_is_known(smoke_config: Path, tmp_path: Path) -> None:
    command = ["-m", "cpift.cli", "plan", str(smoke_config), "--output", str(tmp_path / "o→θ")]
    done = spoken(command, "", POSIX)
    assert done.returncode == 2, done.stderr  # the name could be read, and not be written into a record
    assert b"output: " in done.stderr
    assert b"has a name that is no UTF-8" in done.stderr
    done = spoken([*command[:-1], str(tmp_path / "o")], "", POSIX)
    assert done.returncode == 0, done.stderr
    assert "to do" in done.stdout.decode("ascii")

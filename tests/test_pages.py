"""README and the pages of docs/: what they link to is there, and the commands and files that they show are ours."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from cpift.cli.main import app
from cpift.config.loading import read_yaml
from cpift.config.run import RunConfig
from cpift.sweep.config import SweepConfig

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted([README, *DOCS.rglob("*.md")])
LINK, SOURCE = (
    re.compile(r"\]\(([^)\s]+)\)"),
    re.compile(r"`((?:benchmarks|configs|cpift|examples|ray_jobs)/[\w./-]+)`"),
)
TREES = ("benchmarks", "configs", "cpift", "docs", "examples", "kernels", "ray_jobs", "sweeps", "tests")
NAMED_FILE = re.compile(rf"(?<![\w/.{{<}}-])((?:{'|'.join(TREES)})/[\w./-]+\.(?:py|md|yaml|jsonl))\b")
NAMED_MODULE = re.compile(r"python -m ((?:benchmarks|cpift|tests)\.[\w.]+)")
PROSE = sorted(
    [path for kind in ("*.md", "Makefile", "pyproject.toml") for path in ROOT.glob(kind)]
    + [path for tree in TREES for kind in ("*.md", "*.py", "*.yaml") for path in (ROOT / tree).rglob(kind)]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def shown_commands() -> list[tuple[str, list[str]]]:
    """Every line of a shell block that begins with cpift, as page and words."""
    found = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "bash") + blocks(page, "console")).splitlines()
        words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        found += [(page.name, line[1:]) for line in words if line[:1] == ["cpift"]]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_those_of_the_site_stay_in_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if "://" not in link:
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.exists(), link
            assert page == README or target.is_relative_to(DOCS), f"{link} leaves docs/: write it as a name in code"
    assert [name for name in SOURCE.findall(text) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_that_are_named_are_there(path: Path) -> None:
    """In pages, and in code whose comments and docstrings send a reader on. Of tests the first docstring: they invent
    files."""
    text = path.read_text(encoding="utf-8")
    if ROOT / "tests" in path.parents:
        text = ast.get_docstring(ast.parse(text)) or ""
    named = {name for name in NAMED_FILE.findall(text) if "NAME" not in name}
    modules = {name.rstrip(".").replace(".", "/") for name in NAMED_MODULE.findall(text)}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    runnable = ("{}.py", "{}/__main__.py")
    assert {name for name in modules if not any((ROOT / form.format(name)).exists() for form in runnable)} == set()


def test_the_tour_names_what_is_there() -> None:
    """Files of the table of changes by the end of their path, and names that stand in one of the row's files."""
    table = (DOCS / "tour.md").read_text(encoding="utf-8").partition("## What changes")[2].splitlines()
    sources = [path for tree in ("cpift", "kernels/cpift_kernels", "tests") for path in (ROOT / tree).rglob("*.py")]
    for row in (line for line in table if line.startswith(("| a", "| how"))):
        named = re.findall(r"`([\w/.]+)`", row)
        ends = {f"/{name}" for name in named if name.endswith(".py")}
        files = [path for path in sources if any(str(path).endswith(end) for end in ends)]
        assert {end for end in ends if not any(str(path).endswith(end) for path in files)} == set(), row
        text = "\n".join(path.read_text(encoding="utf-8") for path in files)
        words = {name for name in named if re.fullmatch(r"\w+", name)}
        assert {word for word in words if not re.search(rf"\b{word}\b", text)} == set(), row


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 120


def test_every_command_shown_has_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = shown_commands()
    assert len(shown) > 10
    for page, words in shown:
        command = commands[words[0]]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, (page, words)


def test_every_command_is_in_the_quick_start() -> None:
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert names == set(re.findall(r"^\| `cpift ([\w-]+)", text, re.MULTILINE))


def test_runs_that_are_shown_load(tmp_path: Path) -> None:
    for name in ("quickstart.md", "merging.md"):
        for block in blocks(DOCS / name, "yaml"):
            (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
            RunConfig.model_validate(read_yaml(tmp_path / "run.yaml"))


def test_sections_that_are_shown_are_sections(tmp_path: Path) -> None:
    """Parts of a run's file: each is put into a run that is complete."""
    whole = blocks(DOCS / "quickstart.md", "yaml")[0]
    (tmp_path / "run.yaml").write_text(whole, encoding="utf-8")
    run = read_yaml(tmp_path / "run.yaml")
    for name in ("data.md", "training.md"):
        for block in blocks(DOCS / name, "yaml"):
            (tmp_path / "part.yaml").write_text(block, encoding="utf-8")
            part = read_yaml(tmp_path / "part.yaml")
            task = {"name": "shown", "metric": "loss", **part} if "train" in part else None
            RunConfig.model_validate({**run, "tasks": [task]} if task else {**run, **part})


def test_the_sweep_that_is_shown_is_one(tmp_path: Path) -> None:
    (block,) = blocks(DOCS / "sweeps.md", "yaml")
    (tmp_path / "sweep.yaml").write_text(block, encoding="utf-8")
    assert SweepConfig.model_validate(read_yaml(tmp_path / "sweep.yaml")).seeds == (0, 1, 2)


def test_the_picture_of_the_seesaw_has_the_scores_of_the_demo() -> None:
    """README's bars are the quick start's table: a block for every ten points."""
    rows = re.findall(r"^\| \**(?:probe )?([^|*]+?)\** \| (.+?) \|$", (DOCS / "quickstart.md").read_text("utf-8"), re.M)
    told = {name.split(" (")[0].removeprefix("final: "): line for name, line in rows}
    picture = re.findall(r"^ (θ0|fine-tune \w+|the one model)((?: +[█·]+ +\d+)+)$", README.read_text("utf-8"), re.M)
    assert len(picture) == 5
    for name, bars in picture:
        scores = [float(one.strip("* ")) for one in told[name.removeprefix("fine-tune ")].split("|")[:3]]
        wanted = [("█" * round(score / 10) or "·", f"{score:.0f}") for score in scores]
        assert re.findall(r"([█·]+) +(\d+)", bars) == wanted, name


def test_messages_that_are_explained_are_ours() -> None:
    """Three words in a row of each are in the source; what pydantic or a format adds is not looked for."""
    sources = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "cpift").rglob("*.py")))
    source = re.sub(r"\"\s+f?\"", "", sources)
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for message in rows:
        words = message.split()
        assert any(" ".join(words[at : at + 3]) in source for at in range(len(words) - 2)), message


def test_the_site_has_every_page_once_and_asks_the_net_for_nothing() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = [page for section in site["nav"] for one in next(iter(section.values())) for page in _pages_of(one)]
    assert sorted(shown) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert site["theme"]["font"] is False
    assert (DOCS / site["extra"]["polyfills"][0]).is_file()  # in place of the one that `offline` has pages fetch
    assert not any("```mermaid" in page.read_text(encoding="utf-8") for page in PAGES)  # the theme fetches its program


def _pages_of(entry: str | dict[str, str]) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry.values())

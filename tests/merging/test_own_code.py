"""Merge methods and conflict rules that users bring: the same checks as for ours, errors that name the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import cpift
from cpift.cli.main import app
from cpift.config.loading import load_config
from cpift.errors import ConfigError, CpiftError, ProblemsError, StageError
from cpift.extensions import modules_beside
from cpift.merging.conflicts import conflict_named
from cpift.merging.registry import METHODS, method_named, seeded
from cpift.pipeline.identity import StageArtifacts
from tests.helpers.merges import config_file

METHOD = """
from cpift import UpdateMerge

class Half(UpdateMerge):
    formula, source, fields = "θ0 + ½·mean(θi − θ0)", "a test", ("weight",)

    def update(self, name, start, stop, updates):
        return sum(updates) / (2 * len(updates))

    def defined_update(self, name, start, stop, updates):
        return updates.mean(0) / 2
"""
RULE = """
from cpift import ConflictRule

class First(ConflictRule):
    def owners(self, claims):
        found, taken = [], None
        for core in claims.cores.values():
            found.append(core if taken is None else core & ~taken)
            taken = core if taken is None else taken | core
        return found
"""
UPDATE = "return sum(updates) / (2 * len(updates))"
FORMULA = "formula, source, fields"
DEFINED = "return updates.mean(0) / 2"
OWNERS = "return found"


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models, a method and a rule in it."""
    for name in ("base", "one", "two"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "my_methods.py").write_text(METHOD)
    (tmp_path / "my_rules.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(out: str = "merged", **fields: str) -> Path:
    return cpift.merge("base", {"one": "one", "two": "two"}, out, **fields).path  # type: ignore[arg-type]


def test_a_method_beside_the_run_is_named_by_its_bytes(here: Path, models: Path) -> None:
    path = config_file(here, models, fusion={"method": "my_methods:Half"})

    def named() -> tuple[str, str]:
        fused = StageArtifacts(load_config(path)).fuse((), None)  # type: ignore[arg-type]
        return fused.label, fused.fingerprint

    label, before = named()
    assert label == "my_methods-Half"
    assert named() == (label, before)
    (here / "my_methods.py").write_text(METHOD.replace("½", "1/2"))
    assert named()[1] != before
    assert seeded("my_methods:Half")
    assert not any(str(one.__file__).startswith(str(here)) for one in modules_beside()), "naming imports nothing"


def test_plan_says_whose_code_it_is_and_the_merge_is_checked(here: Path, models: Path) -> None:
    path = config_file(here, models, fusion={"method": "my_methods:Half"})
    said = CliRunner().invoke(app, ["plan", str(path)])
    assert said.exit_code == 0, said.output
    words = said.output.replace("\n", "")
    assert f"Runs code of {here}/my_methods.py: merge method my_methods:Half" in words
    assert "my_methods:Half of 2 models" in words
    result = cpift.merge("base", {"one": "one", "two": "two"}, "merged", method="my_methods:Half")
    names = [check["name"] for check in result.checks if check["passed"]]
    assert "sampled elements equal the definition of my_methods:Half in fp64 within rounding" in names
    assert "my_methods:Half" in (result.path / "README.md").read_text(encoding="utf-8")
    assert str(here) not in (result.path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (UPDATE, "return updates[0].double()", "gives float64 [96] → give float32 [96], an element each"),
        (UPDATE, "return updates[0][:3]", "gives float32 [3] → give float32 [96]"),
        (UPDATE, "return 0.5", "gives a float → give a tensor"),
        (UPDATE, "return updates[0] / 0 * 0", "gives NaN or Inf of finite models → mend its formula"),
        (UPDATE, "return updates[9]", "IndexError: list index out of range → mend its code"),
        (UPDATE, "raise SystemExit(3)", "SystemExit: 3 → mend its code"),
        (UPDATE, "return updates[0] * self.config.density", "reads fusion.density → name it in `fields`"),
        (UPDATE, "return updates[0] * self.seed", "reads the seed → say `seeded = True`"),
        (UPDATE, "return updates[0].to('meta')", "RuntimeError: "),
        (DEFINED, "return updates[9]", "the definition of tensor"),
        (FORMULA, f"prepare = lambda self: 1 / 0\n    {FORMULA}", "prepare: ZeroDivisionError: "),
        (FORMULA, f"__init__ = lambda *_: {{}}[1]\n    {FORMULA}", "__init__: KeyError: 1"),
        (FORMULA, f"problems = lambda *_: 'few'\n    {FORMULA}", "problems: TypeError: gives ['f', 'e', "),
    ],
)
def test_what_a_method_must_not_give_is_refused_by_name(here: Path, old: str, new: str, said: str) -> None:
    (here / "my_methods.py").write_text(METHOD.replace(old, new))
    with pytest.raises(CpiftError) as caught:
        merged(method="my_methods:Half")
    words = str(caught.value)
    assert "merge method my_methods:Half: " in words
    assert said.split(" [96]")[0] in words
    assert not (here / "merged").exists()


@pytest.mark.parametrize("wrong", ["return updates.mean(0) / 3", "return updates.mean(0) * float('nan')"])
def test_a_result_that_is_not_its_definitions_fails_its_check(here: Path, wrong: str) -> None:
    (here / "my_methods.py").write_text(METHOD.replace(DEFINED, wrong))
    with pytest.raises(StageError, match="equal the definition of my_methods:Half in fp64"):
        merged(method="my_methods:Half")


@pytest.mark.parametrize(
    ("source", "word", "said"),
    [
        (METHOD.replace("defined_update", "defined"), "Half", "Half in .* lacks defined_update"),
        (METHOD.replace('("weight",)', '("weight", "omega")'), "Half", "`fields` has 'omega' → one of weight, "),
        (METHOD.replace("formula, source, fields", "a, source, b"), "Half", "Half has no `formula` → give a text"),
        (METHOD, "Hlaf", "has no Hlaf → did you mean 'Half'"),
        (METHOD, "UpdateMerge", "lacks "),
        ("def Half(): ...", "Half", "Half is no MergeMethod in "),
    ],
)
def test_a_class_that_cannot_merge_is_refused_before_anything_is_read(
    here: Path, models: Path, source: str, word: str, said: str
) -> None:
    (here / "my_methods.py").write_text(source)
    with pytest.raises(ConfigError, match=said):
        cpift.plan(config_file(here, models, fusion={"method": f"my_methods:{word}"}))


def test_what_a_method_says_of_a_config_is_a_problem_of_the_plan(here: Path, models: Path) -> None:
    problem = "\n    @classmethod\n    def problems(cls, config, tasks):\n"
    problem += '        return [Problem("tasks", "too many", "x")]\n'
    (here / "my_methods.py").write_text("from cpift.errors import Problem\n" + METHOD + problem)
    with pytest.raises(ProblemsError, match="tasks: too many"):
        cpift.plan(config_file(here, models, fusion={"method": "my_methods:Half"}))


def test_a_conflict_rule_of_ones_own_decides_shared_elements(here: Path) -> None:
    (here / "my_rules.py").write_text(RULE)
    first = merged("first", conflict="my_rules:First", p=0.5)  # type: ignore[arg-type]
    largest = merged("largest", p=0.5)  # type: ignore[arg-type]
    weights = [path / "model.safetensors" for path in (first, largest)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert "my_rules:First" in (first / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("return found[:1]", "gives 1 masks → give one for each of 2 tasks"),
        ("return [core.bool() for core in found]", "give a packed mask, int32"),
        ("return [found[0] | found[1], found[1]]", "task one donates what its core does not hold"),
        ("return [found[0], found[1] & 0]", "an element of a core has no owner"),
        ("return [core.to('meta') for core in found]", "give a packed mask, int32"),
        ("return None", "elements 0 to .*: TypeError: .* → mend its code"),
        ("return found\n\n    def excluded(self, claims): return 1 / 0", "excluded: ZeroDivisionError: "),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(here: Path, new: str, said: str) -> None:
    (here / "my_rules.py").write_text(RULE.replace(OWNERS, new))
    with pytest.raises(CpiftError, match=said) as caught:
        merged(conflict="my_rules:First")
    assert "conflict rule my_rules:First: tensor " in str(caught.value)


def test_ours_and_theirs_are_found_by_one_name(here: Path) -> None:
    assert method_named("ties") is METHODS["ties"]
    assert method_named(f"{here / 'my_methods.py'}:Half").__name__ == "Half"
    assert conflict_named(f"{here / 'my_rules.py'}:First").__name__ == "First"
    with pytest.raises(ConfigError, match=r"no installed package declares it in cpift\.methods"):
        method_named("nobodys")

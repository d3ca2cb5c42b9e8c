from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cpift.compare.config import load_comparison
from cpift.config.loading import dump_config, load_config, one_line_yaml
from cpift.config.paths import is_path
from cpift.config.run import RunConfig
from cpift.errors import ConfigError
from cpift.sweep.config import load_sweep


def minimal() -> dict[str, Any]:
    source = {"procedural": "addition", "size": 8}
    return {
        "name": "t",
        "model": {"scratch": {}},
        "tasks": [{"name": "a", "train": dict(source), "test": dict(source)}],
        "probe": {"steps": 2},
        "integration": {"steps": 1},
    }


def load(tmp_path: Path, raw: dict[str, Any], *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(path, overrides)


def problems(tmp_path: Path, raw: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw, *overrides)
    return str(caught.value)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = load(tmp_path, minimal())
    assert (config.regions.p, config.groups.tau, config.backbone.source) == (0.01, 0.1, "staged")
    assert (config.fusion.omega, config.fusion.granularity, config.fusion.space) == ("uniform", "tensor", "weights")
    assert config.integration.freeze == "earlier"


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = load(tmp_path, minimal())
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probee": {}}, ["probee: is not a field", "did you mean 'probe'?"]),
        ({"probe": {"steps": 2, "learning_rat": 1}}, ["probe.learning_rat: is not a field", "'learning_rate'"]),
        ({"probe": {"steps": "many"}}, ["probe.steps: 'many'", "whole number"]),
        ({"regions": {"p": 0}}, ["regions.p: 0", "must be above 0"]),
        ({"regions": {"p": 1.5}}, ["regions.p: 1.5", "at most 1"]),
        ({"groups": {"tau": 0.1, "tau_chance": 2}}, ["groups", "exactly one of tau, tau_chance"]),
        ({"probe": {}}, ["probe", "exactly one of steps, epochs; none"]),
        ({"fusion": {"omega": 2}}, ["fusion.omega: 2"]),
        ({"name": "../x"}, ["name: '../x'", "letters, digits"]),
        ({"tasks": []}, ["tasks", "at least 1"]),
        ({"model": "base"}, ["model: 'base': is a text where fields belong", "path"]),
        ({"model": None, "probe": 3}, ["model: is empty", "probe: 3: is a number where fields belong"]),
        ({"tasks": {"a": {}}}, ["tasks: is fields where a list belongs"]),
        ({"tasks": ["a.json"]}, ["1 problem", "tasks.0: 'a.json': is a text where fields belong"]),
        ({"regions": {"p": "5%", "scope": "globl"}}, ["5 % is 0.05", "'globl': is none of", "did you mean 'global'?"]),
        ({"learning_rate": 1}, ["learning_rate: is not a field", "belongs under probe, integration"]),
        ({"model": {"path": "nowhere"}}, ["model.path", "no such", "nowhere"]),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, change: dict[str, Any], said: list[str]) -> None:
    message = problems(tmp_path, minimal() | change)
    for part in said:
        assert part in message


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    raw = minimal() | {"regions": {"p": -1}, "unknown": 1}
    raw["tasks"][0]["train"] = {"file": "missing.jsonl"}
    message = problems(tmp_path, raw)
    assert "3 problems" in message
    assert "regions.p" in message
    assert "unknown" in message
    assert "missing.jsonl" in message


def test_a_message_names_the_task_and_says_what_a_percentage_is_as_a_fraction(tmp_path: Path) -> None:
    message = problems(tmp_path, minimal(), "regions.p=5", "tasks.0.metric=rogue")
    assert "regions.p: 5: " in message
    assert "5 % is 0.05" in message
    assert "tasks.0 (a).metric: 'rogue': " in message
    assert "%" not in problems(tmp_path, minimal(), "regions.p=500")


def test_a_task_named_twice(tmp_path: Path) -> None:
    raw = minimal()
    raw["tasks"].append(dict(raw["tasks"][0], name="A"))
    assert "'a' is named twice" in problems(tmp_path, raw)


def test_overrides_replace_and_create_fields(tmp_path: Path) -> None:
    config = load(tmp_path, minimal(), "regions.p=0.25", "tasks.0.name=b", "fusion.space=delta")
    assert (config.regions.p, config.tasks[0].name, config.fusion.space) == (0.25, "b", "delta")


def test_overrides_that_cannot_be_applied(tmp_path: Path) -> None:
    message = problems(tmp_path, minimal(), "regions.p", "tasks.7.name=x")
    assert "has no '='" in message
    assert "tasks.7.name=x" in message
    assert "2000 levels deep" in problems(tmp_path, minimal(), f"{'a.' * 1999}b=1")


def test_input_paths_are_relative_to_the_file_and_may_use_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    raw = minimal()
    raw["tasks"][0]["train"] = {"file": "rows.jsonl"}
    raw["tasks"][0]["test"] = {"file": "${ROWS_FOLDER}/rows.jsonl"}
    assert "ROWS_FOLDER" in problems(tmp_path, raw)
    monkeypatch.setenv("ROWS_FOLDER", str(tmp_path))
    task = load(tmp_path, raw).tasks[0]
    assert task.train.file == task.test.file == tmp_path / "rows.jsonl"


def test_every_path_of_the_config_is_known_as_one() -> None:
    def paths(model: type[BaseModel], where: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            parts = get_args(field.annotation) or (field.annotation,)
            yield from [f"{where}{name}"] * (Path in parts)
            sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
            for section in sections:
                yield from paths(section, f"{where}{name}." + "0." * (tuple in (get_origin(field.annotation), section)))

    found = [*paths(RunConfig, "")]
    assert {"output", "model.path", "tasks.0.train.file"} <= set(found)
    assert [name for name in found if not is_path(name)] == []
    assert not any(map(is_path, ("tasks.0.train.columns.file", "fusion.weights.path", "name", "tasks.path")))


def test_variables_are_replaced_in_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "word")
    (tmp_path / "rows.jsonl").write_text("")
    raw = minimal() | {"output": "/x/${WORD}", "resources": {"storage": "/${WORD}"}}
    columns = {"prompt": "${WORD} ${NONE}", "completion": "~/y"}
    raw["tasks"][0]["train"] = {"file": "rows.jsonl", "columns": columns}
    config = load(tmp_path, raw)
    assert str(config.output) == "/x/word"
    assert config.resources.storage == "/word"
    assert config.tasks[0].train.columns == columns


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation": {"judge": {"url": "http://${WORD}/v1", "model": "m"}}},
        {"evaluation": {"judge": {"url": "http://h", "model": "${NONE}"}}},
        {"model": {"hub": "org/${WORD}"}},
        {"regions": {"include": ["*", "${WORD}*"]}},
        {"resources": {"address": "ray://${WORD}:10001"}},
    ],
)
def test_variables_elsewhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setenv("WORD", "word")
    assert "holds ${...}, which is replaced in a path alone" in problems(tmp_path, minimal() | change)


def test_variables_in_sweeps_and_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own two paths may hold some; fields of the run that they set may not."""
    monkeypatch.setenv("WORD", str(tmp_path))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(minimal() | {"integration": {"steps": 1}}))
    raw = {"run": "${WORD}/run.yaml", "output": "${WORD}/out"}
    file = tmp_path / "many.yaml"
    for load_many, more in ((load_sweep, {"space": {"regions.p": [0.1]}}), (load_comparison, {})):
        file.write_text(yaml.safe_dump(raw | more))
        if load_many is load_sweep:
            assert load_many(file).base.output_dir == tmp_path / "out"
        for change, field in (
            ({"fixed": {"resources.storage": "${WORD}"}}, "fixed.resources.storage: holds"),
            ({"output": ""}, "output: is empty"),
            ({"output": "${NONE}"}, "the environment has no variable NONE"),
        ):
            file.write_text(yaml.safe_dump(raw | more | change))
            with pytest.raises(ConfigError, match=re.escape(field)):
                load_many(file)


@pytest.mark.parametrize("field", ["output", "model.path", "tasks.0.train.file", "resources.storage"])
def test_an_empty_path_is_none(tmp_path: Path, field: str) -> None:
    """To Python it is the current folder."""
    with pytest.raises(ConfigError, match=f"{field}: is empty, which is no path"):
        load(tmp_path, minimal(), f"{field}=''")
    assert "--set tasks.-1.name=b: cannot be applied" in problems(tmp_path, minimal(), "tasks.-1.name=b")


@pytest.mark.parametrize("value", ["~nobody-of-that-name/x", "x" * 5000, "${WORD}" * 300])
def test_paths_that_cannot_be_are_named(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "x" * 99)
    raw = minimal()
    raw["tasks"][0]["train"] = {"file": value}
    assert "tasks.0.train.file: " in problems(tmp_path, raw)


@pytest.mark.parametrize("value", ["/x/x #1", "123", "yes", "a: b", "[a]", "{}", "1.5"])
def test_paths_in_overrides_are_what_they_look_like_or_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="put a path in quotes of its own"):
        load(tmp_path, minimal(), f"output={value}")
    assert str(load(tmp_path, minimal(), f"output='{value}'").output) == value
    assert load(tmp_path, minimal(), "output=null").output is None
    assert str(load(tmp_path, minimal(), "output=/x/a b").output) == "/x/a b"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just text"])
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_store_without_keys_is_taken(tmp_path: Path) -> None:
    assert load(tmp_path, minimal() | {"resources": {"storage": "s3://bucket/x?region=a"}}).resources.storage


VALUES = st.recursive(
    st.text() | st.integers() | st.booleans(), lambda part: st.lists(part) | st.dictionaries(st.text(), part)
)


@pytest.mark.slow
@given(VALUES)
@settings(max_examples=100)
def test_a_value_in_one_line_is_read_back(value: object) -> None:
    written = one_line_yaml(value)
    assert len(f"{written}.".splitlines()) == 1
    assert yaml.safe_load(f"- x: {written}  # why") == [{"x": value}]

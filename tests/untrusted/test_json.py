"""Files of others: what no reader takes, and that nothing but our errors comes out of any of them."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config
from cpift.errors import ConfigError
from cpift.formats.sizes import folder_problems, memory_problem
from cpift.models.scratch import make_scratch_model, make_scratch_tokenizer
from cpift.untrusted.json import ADAPTER, MODEL_CONFIG, RECORD, UnreadableError, json_lines, parse_json, read_json
from cpift.untrusted.patterns import Patterns
from cpift.untrusted.yaml import parse_yaml
from tests.helpers.checkpoints import save_checkpoint
from tests.hostile import READERS, RUN, broken, outcome, safetensors_seed

_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]\n" for n in range(1, 12))
_MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "'a' twice"),
        ("a: {b: 1, b: 2}", "'b' twice"),
        ("null: 3", "no text"),
        ("1: 3", "no text"),
        ("yes: 3", "no text"),
        ("? [a]\n: 1", "no text"),
        ("a: &a [*a]", "alias of what it stands in"),
        ("a: &a {<<: *a}", "alias of what it stands in"),
        (_BOMB, "more than 100,000 values"),
        (_MERGE_BOMB, "more than 100,000 values"),
        ("[" * 5000, "nest"),
        ("- " * 5000 + "x", "nested"),
        ("{a: " * 5000, "nest"),
        ("a: [" + "*b, " * 2000 + "]", "aliases"),
        ("a: 2024-01-01", "timestamp"),
        ("a: !!python/object/apply:os.system [ls]", "of the kind"),
        ("a: !!binary aGk=", "of the kind"),
        ("a: .inf", "no finite number"),
        ("a: 1.0e+999", "no finite number"),
        ("a: " + "9" * 30, "too many digits"),
        ("a: " + "9" * 9000, "no int"),
        ("a: 0x" + "f" * 40, "too many digits"),
        ("a: 1:30", "base 60"),
        ("a: 010", "base 60 or 8"),
        ('a: "\\0"', "null character"),
        ("a: \ud800", "surrogate"),
        ("a: [1", "no YAML"),
        ("a:\n\tb: 1", "has a tab in line 2"),
        ("--- 1\n--- 2", "several documents, the second from line 2"),
        ("x" * 300_000, "bytes"),
    ],
)
def test_yaml_that_surprises_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnreadableError, match=said):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a" :1,"b":{"x":1,\n"x":2}}', "'x' twice"),
        ("[NaN]", "NaN"),
        ("[1e999]", "no finite"),
        ("9" * 40, "40 digits"),
        ("9" * 5000, "5000 digits"),
        ("[" * 100_000, "nested"),
        ("[" * 40 + "]" * 40, "nested"),
        ('["\\ud800"]', "surrogate"),
        ("\ufeff\ufeff{}", "Expecting value"),
        (b"\xff\xfe{", "no UTF-8"),
        ("1 2", "Extra data"),
        ("[" + "1," * 600_000 + "1]", "values"),
        ("", "Expecting value"),
    ],
)
def test_json_that_surprises_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(UnreadableError, match=said):
        parse_json(text, ADAPTER)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(value=_JSON, ascii_only=st.booleans())
def test_what_is_plain_is_read_as_the_library_reads_it(value: Any, ascii_only: bool) -> None:
    try:
        text = json.dumps(value, ensure_ascii=ascii_only)
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text, RECORD) == json.loads(text)


def test_a_byte_order_mark_is_taken_where_no_library_reads_the_same_file(tmp_path: Path) -> None:
    for parse in (parse_yaml, partial(parse_json, limits=ADAPTER)):
        assert parse(b"\xef\xbb\xbf{}") == parse("\ufeff{}") == {}
    with pytest.raises(UnreadableError, match="byte order mark"):
        parse_json(b"\xef\xbb\xbf{}", MODEL_CONFIG)
    file = tmp_path / "x.jsonl"
    for text, rows in {"": [], "\ufeff": [], "\ufeff1\r\n2": [1, 2], "\ufeff\n1": [1]}.items():
        file.write_text(text, encoding="utf-8", newline="")
        assert list(json_lines(file)) == rows


def test_lines_are_read_one_by_one_and_bad_ones_in_their_place(tmp_path: Path) -> None:
    lines = ['\ufeff{"a": 1}', "", '{"a": 1, "a": 2}', "NaN", ' {"b": [1]} ', "[" * 3000, "\ufeff1", "1e999", "x"]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    found = list(json_lines(file))
    assert [one for one in found if not isinstance(one, UnreadableError)] == [{"a": 1}, {"b": [1]}]
    assert [isinstance(one, UnreadableError) for one in found] == [False, True, True, False, True, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("reader", sorted(READERS))
def test_only_our_errors_come_out(reader: str, tmp_path: Path) -> None:
    assert outcome(reader, READERS[reader][1], tmp_path) == "taken"
    for number in range(120):
        outcome(reader, broken(READERS[reader][1], number), tmp_path)
    for data in (b"", b"\0" * 50, b"[" * 5000, safetensors_seed()[:-1]):
        outcome(reader, data, tmp_path)


@pytest.mark.parametrize("field", ["seed: true", "regions: {p: true}", "tasks: [true]", "fusion: {weights: {a: true}}"])
def test_true_is_no_number(field: str, tmp_path: Path) -> None:
    name = field.partition(":")[0]
    file = tmp_path / "run.yaml"
    file.write_text(re.sub(rf"^{name}:[^\n]*(\n  [^\n]*)*\n?", "", RUN, flags=re.M) + field + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"true and false are no numbers|is true or false where fields belong"):
        load_config(file)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing"])
def test_what_is_no_file_is_told_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(FileNotFoundError if kind == "missing" else UnreadableError):
        read_json(path)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    pattern=st.recursive(
        st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a-c]", r"\w", r"\D", "^", "$"]),
        lambda inner: (
            st.builds("{}{}".format, inner, inner)
            | st.builds("({}|{})".format, inner, inner)
            | st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{2,}"]))
        ),
        max_leaves=8,
    ),
    text=st.text("ab.0\n", max_size=9),
)
def test_patterns_match_as_re_does(pattern: str, text: str) -> None:
    form = r"(.*\.)?({})$"
    assert Patterns([pattern], form).match(pattern, text) == bool(re.match(form.replace("{}", pattern), text))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a+)+b", None),
        ("(.*)*x", None),
        (".*" * 20 + "x", None),
        ("(){1000000000}", None),
        ("(a{1000}){1000}", "repeats too much"),
        (r"(.+)+\1z", "groupref"),
        ("(?=(a+)+b)a", "assert"),
        ("a)(b", "no regular expression"),
        ("[", "no regular expression"),
        ("(?i:a)", "not matched here"),
        ("a" * 3000, "letters"),
    ],
)
def test_patterns_take_no_longer_than_they_may(pattern: str, said: str | None) -> None:
    if said is None:
        assert not Patterns([pattern], "({})$x").match(pattern, "a" * 200)
    else:
        with pytest.raises(UnreadableError, match=said):
            Patterns([pattern])


def test_sizes_beyond_the_tensors_and_the_memory_are_told_by_name(tmp_path: Path) -> None:
    import torch

    folder = save_checkpoint(tmp_path / "m", {"embed.weight": torch.zeros(40, 16), "norm.weight": torch.zeros(16)})
    config = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "time_step_limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert folder_problems(folder, "model") == []
    wrong = {"hidden_size": 2**40, "num_hidden_layers": 10**9, "vocab_size": True, "num_attention_heads": 0.5}
    (folder / "config.json").write_text(json.dumps(config | wrong | {"text_config": {"intermediate_size": -1}}))
    told = [problem.where.rpartition(", ")[2] for problem in folder_problems(folder, "model")]
    assert sorted(told) == sorted([*wrong, "intermediate_size"])
    (folder / "config.json").write_text("[]")
    assert [problem.what for problem in folder_problems(folder, "model")] == ["holds a list, not an object of fields"]
    (folder / "config.json").write_text("{}")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # it takes no room
    assert [problem.where for problem in folder_problems(folder, "model")] == ["model, tokenizer.json"]
    scratch = ScratchModel(hidden_size=24, layers=3, heads=3)
    network = make_scratch_model(scratch, make_scratch_tokenizer(scratch))
    assert scratch.parameters == sum(parameter.numel() for parameter in network.parameters())
    huge = memory_problem(ScratchModel.model_construct(hidden_size=2**40).parameters, 4, "model.scratch")
    assert huge is not None
    assert "this machine has" in huge.what
    assert MODEL_CONFIG.constants  # Mamba's Infinity above

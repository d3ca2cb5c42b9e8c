"""Facts kept on the disk: the same as found anew, never stale, and no trouble where they cannot be kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpift.config.loading import load_config
from cpift.disk import facts as fact_cache
from cpift.disk.facts import remembered
from cpift.errors import CheckpointError
from cpift.pipeline import row_checks
from cpift.pretrained import architecture


class Finder:
    def __init__(self, value: Any):
        self.value, self.asked = value, 0

    def __call__(self) -> Any:
        self.asked += 1
        return self.value


def entries() -> list[Path]:
    where = fact_cache.folder()
    assert where is not None
    return sorted(where.iterdir()) if where.is_dir() else []


@pytest.mark.parametrize("value", [None, [], {"a": [1, 2.5, "θ \ud800"]}, {"1": {"x": None}}, 1e400, (1, (2,))])
def test_what_is_kept_is_what_was_found(value: Any) -> None:
    find = Finder(value)
    first, second = (remembered("what", ["\ud800", 1], find) for _ in range(2))
    assert first == second == json.loads(json.dumps(value))
    assert find.asked == 1


@pytest.mark.parametrize(
    ("name", "other"), [("releases", lambda: ("transformers 99",)), ("code", lambda: "0"), ("releases", lambda: None)]
)
def test_other_code_or_libraries_are_asked_anew(
    name: str, other: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Finder(1)
    remembered("what", 1, find)
    monkeypatch.setattr(fact_cache, name, other)
    remembered("what", 1, find)
    assert find.asked == 2


def test_other_inputs_are_another_fact() -> None:
    find = Finder(1)
    for what, of in (("a", 1), ("b", 1), ("a", "1"), ("a", [1])):
        remembered(what, of, find)
    assert find.asked == 4


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"value": 2}', b'{"value": 2, "sha256": "0"}', b"\xff" * 9])
def test_a_damaged_entry_is_found_anew_and_mended(damage: bytes) -> None:
    find = Finder(1)
    remembered("what", 1, find)
    (file,) = entries()
    whole = file.read_bytes()
    for broken in (damage, whole[:-3], whole.replace(b'"value": 1', b'"value": 2'), b"[" * 100_000):
        file.write_bytes(broken)
        assert remembered("what", 1, find) == 1
        assert file.read_bytes() == whole
    assert find.asked == 5
    file.with_name("0" * 64 + ".json").write_bytes(whole)  # nor is an entry taken under another's name
    assert fact_cache._read(file.with_name("0" * 64 + ".json")) == (1, False)


def test_without_a_folder_to_write_facts_are_found_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    find = Finder(1)
    for home in (tmp_path / "file", Path("/proc/1/nowhere")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert remembered("what", 1, find) == 1
    monkeypatch.setattr(fact_cache, "folder", lambda: None)
    assert remembered("what", 1, find) == 1
    assert find.asked == 3


def test_facts_lie_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered("what", 1, Finder(1))
    (entry,) = entries()
    assert entry.parent == tmp_path / "cpift" / "facts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fact_cache.folder() == Path.home() / ".cache" / "cpift" / "facts"


def test_errors_and_what_does_not_hold_are_not_kept() -> None:
    def failing() -> Any:
        raise CheckpointError("model", [])

    with pytest.raises(CheckpointError):
        remembered("what", 1, failing)
    find = Finder(["problem"])
    for _ in range(2):
        assert remembered("what", 1, find, holds=lambda found: not found) == ["problem"]
    assert find.asked == 2
    assert entries() == []


def test_the_oldest_go_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fact_cache, "ENTRIES", 4)
    for number in range(9):
        remembered("what", number, Finder(number))
    assert len(entries()) <= 4
    find = Finder(8)
    remembered("what", 8, find)
    assert find.asked == 0


def test_a_library_that_is_worked_on_says_nothing_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fact_cache.releases.__wrapped__() is not None
    (tmp_path / "sentencepiece").mkdir()
    (tmp_path / "sentencepiece" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "sentencepiece", raising=False)
    assert fact_cache.releases.__wrapped__() is None


CONFIGS = {
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    "gemma2": {"model_type": "gemma2", "head_dim": 8},
    "no model": {"model_type": "llama", "hidden_size": "wide"},
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}


def facts_of(folder: Path) -> list[Any]:
    def asked(find: Callable[[], Any]) -> Any:
        try:
            return find()
        except CheckpointError as error:
            return str(error)

    modules = ("lm_head", "model.embed_tokens", "transformer.h.0.attn.c_attn", "model", "none")
    return [
        asked(lambda: architecture.tied_names(folder)),
        asked(lambda: architecture.embedding_names(folder)),
        asked(lambda: architecture.effective_config(folder)),
        asked(lambda: architecture.untrainable(folder, "model")),
        *(asked(lambda module=module: architecture.stored_transposed(folder, module)) for module in modules),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_architecture_is_the_same_from_the_cache(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | config))
    for cache in (architecture._config, architecture._class, architecture._skeleton, architecture._products):
        cache.cache_clear()
    found = facts_of(tmp_path)
    architecture._products.cache_clear()
    if "wide" not in config.values():
        monkeypatch.setattr(architecture, "_config", None)  # nobody asks transformers
        monkeypatch.setattr(architecture, "_skeleton", None)
    assert facts_of(tmp_path) == found
    architecture._products.cache_clear()


def test_rows_are_looked_at_again_only_where_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "spell bafo", "completion": "b a f o"}\n' * 3)
    smoke = Path(__file__).parents[2] / "configs" / "smoke.yaml"
    changes = {
        "output": str(tmp_path / "run"),
        "tasks": [{"name": "a", "metric": "loss", "train": {"file": str(rows)}}],
    }
    config = load_config(smoke, [], changes | {"integration": None})
    looks: list[int] = []
    look = row_checks._look
    monkeypatch.setattr(row_checks, "_look", lambda *arguments: looks.append(1) or look(*arguments))
    first = row_checks.check_written(config, "probe")
    assert row_checks.check_written(config, "probe") == first
    assert (len(looks), first.problems, first.longest > 0) == (1, [], True)
    longer = config.model_copy(update={"probe": config.probe.model_copy(update={"max_length": 9})})
    row_checks.check_written(longer, "probe")
    rows.write_text('{"prompt": "spell ba", "completion": "b a"}\n' * 3)
    row_checks.check_written(config, "probe")
    assert len(looks) == 3


@pytest.mark.parametrize(("day", "taken"), [("", True), ("2001-01-01", False)])
def test_what_a_template_wrote_with_the_date_holds_for_a_day(day: str, taken: bool) -> None:
    assert row_checks._holds({"problems": [], "day": day}) is taken
    assert not row_checks._holds({"problems": ["one"], "day": day})

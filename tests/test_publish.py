"""`cpift push` against a stand-in for the hub: what is sent, what the card says, what is never replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cpift.disk.artifacts import Artifact
from cpift.disk.files import write_json
from cpift.errors import ConfigError, CpiftError, StageError
from cpift.publish import publication
from tests.helpers.hub_server import TOKEN, Hub, Repository, hub

WEIGHTS = b"\x60" + bytes(7) + b"{}".ljust(96)  # a file of no tensors


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as a user has it: a model, its card, and what is not for others."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "inputs.json", "fusion.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for name in ("notes.py", "notes.txt", "trainer_state.json", "optimizer.safetensors"):
        (folder / name).write_text("secret = 1")
    (folder / ".hidden.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [cpift]\n---\n\n# My model\n")
    return folder


def push(server: Hub, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "cpift.cli", "push", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **online}
    )


@pytest.mark.slow
def test_a_folder_becomes_a_private_repository_and_again_the_same(server: Hub, model: Path) -> None:
    done = push(server, str(model), "--to", "me/first")
    assert done.returncode == 0, done.stderr
    assert f"Sent: {server.address}/me/first/commit/1" in done.stdout
    found = server.repositories["me/first"]
    assert found.private
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "README.md", "cpift.json"}
    assert set(found.files) == wanted
    assert found.files["model.safetensors"] == WEIGHTS
    card = found.files["README.md"].decode()
    assert "license: mit" in card
    assert "# My model" in card
    assert set(json.loads(found.files["cpift.json"])["sha256"]) == wanted - {"README.md", "cpift.json"}

    (model / "tokenizer.json").unlink()
    found.files["plot.png"] = b"theirs"
    again = push(server, str(model), "--to", "me/first")
    assert again.returncode == 0, again.stderr
    assert set(found.files) == wanted - {"tokenizer.json"} | {"plot.png"}
    found.files["generation_config.json"] = b"theirs"
    (model / "generation_config.json").write_text("{}")
    refused = push(server, str(model), "--to", "me/first")
    assert refused.returncode == 2
    assert "holds generation_config.json, which cpift did not put there" in refused.stderr
    assert found.files["generation_config.json"] == b"theirs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("held", "private", "token", "told"),
    [
        ({"pytorch_model.bin": b"theirs"}, True, TOKEN, "holds files that cpift did not put there"),
        ({}, False, TOKEN, "is public"),
        ({}, True, "wrong", "401"),
    ],
)
def test_what_is_not_ours_to_replace_stays(
    held: dict[str, bytes], private: bool, token: str, told: str, server: Hub, model: Path
) -> None:
    server.repositories["me/taken"] = Repository(private, dict(held))
    done = push(server, str(model), "--to", "me/taken", token=token)
    assert done.returncode == 2
    assert told in done.stderr
    assert server.repositories["me/taken"].files == held


@pytest.mark.slow
def test_a_dry_run_asks_nobody(server: Hub, model: Path) -> None:
    done = push(Hub("http://127.0.0.1:9"), str(model), "--to", "me/dry", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Would be sent to me/dry (private)" in done.stdout
    assert "# My model" in done.stdout


def test_of_a_run_the_last_model_goes_with_scores_and_without_paths(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = artifact(run, "integrate", model)
    rows = [{"score": 1.0}, {"score": 0.0}, {"score": 1.0}, {"score": 1.0}]
    maths = {"metric": "number", "score": 0.75, "loss": 1.0, "rows": 4, "examples": rows}
    scores = {"maths": maths, "prose": maths | {"score": None, "loss": 2.5, "examples": []}}
    with Artifact(run, "evaluate", "final", {"model": made.fingerprint}, {}, 1).build() as out:
        write_json(out / "scores.json", scores)
    write_json(run / "summary.json", {"model": str(made.path.relative_to(run))})
    config = {
        "name": "x",
        "output": "/home/somebody/out",
        "resources": {"address": "10.0.0.1:6379", "storage": "s3://bucket/somebody", "workers": 2},
        "evaluation": {"judge": {"url": "http://somebody:8000/v1", "model": "m"}},
        "model": {"hub": "org/base"},
        "tasks": [
            {"name": "maths", "train": {"hub": "org/rows"}, "test": {"file": "/home/somebody/data/t.jsonl"}},
            {"name": "prose", "checkpoint": {"hub": "org/prose-tune"}, "test": {"hub": "org/prose", "split": "test"}},
        ],
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    found = publication(run, "me/model")
    data = yaml.safe_load(found.card.split("---\n")[1])
    assert data["base_model"] == ["org/base", "org/prose-tune"]
    assert data["datasets"] == ["org/rows"]
    assert data["license"] == "mit"
    results = data["model-index"][0]["results"]
    assert [(one["dataset"]["name"], one["metrics"][0]["value"]) for one in results] == [
        ("maths", 75.0),
        ("prose", 2.5),
    ]
    assert results[0]["metrics"][0]["name"] == "number, 4 rows, ±79.6 (95%)"  # t(3) · 50 ÷ √4
    assert "somebody" not in str(found.files["cpift.yaml"])
    sent = yaml.safe_load(str(found.files["cpift.yaml"]))
    assert sent["resources"] == {"workers": 2}
    assert sent["evaluation"] == {"judge": {"model": "m"}}
    assert sent["tasks"][0]["test"] == {"file": "t.jsonl"}
    assert json.loads(str(found.files["cpift.json"]))["fingerprint"] == made.fingerprint
    assert "manifest.json" not in found.files
    damaged: list[dict[str, object]] = [{"model": "org/base"}, {"tasks": "maths"}, {"tasks": [{}]}]
    for changed in damaged:
        (run / "config.yaml").write_text(yaml.safe_dump(config | changed))
        with pytest.raises(CpiftError, match="not as a run writes them"):
            publication(run, "me/model")


def artifact(root: Path, stage: str, model: Path) -> Artifact:
    """The model's folder as a run makes it."""
    made = Artifact(root, stage, "", {}, {}, 1)
    with made.build() as out:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(model / name, out / name)
    shutil.copy(model / "README.md", made.path / "README.md")
    return made


def test_what_was_changed_since_it_was_made_is_not_sent(model: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    artifact(tmp_path / "work", "fuse", model).path.rename(merged)
    assert "model.safetensors" in publication(merged, "me/model").files
    (merged / "model.safetensors").write_bytes(bytes(99) + b"x")
    with pytest.raises(StageError, match=r"model\.safetensors"):
        publication(merged, "me/model")


def test_places_of_this_machine_are_not_sent(model: Path) -> None:
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        (model / name).write_text(json.dumps({key: "/home/somebody/base", "kept": "/not/a/place", "n": 1}))
    found = publication(model, "me/model")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        assert json.loads(str(found.files[name])) == {key: "base", "kept": "/not/a/place", "n": 1}
    hashes = json.loads(str(found.files["cpift.json"]))["sha256"]
    assert hashes["config.json"] == hashlib.sha256(str(found.files["config.json"]).encode()).hexdigest()

    adapter = model.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/somebody/base"}')
    assert not any("somebody" in str(content) for content in publication(adapter, "me/model").files.values())


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_what_is_no_whole_model_is_not_sent(missing: str, model: Path) -> None:
    (model / missing).unlink()
    with pytest.raises(ConfigError, match="holds no model"):
        publication(model, "me/model")


def test_weights_that_are_no_whole_file_are_not_sent(model: Path) -> None:
    """A download that broke off, or Git LFS's pointer in its place."""
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CpiftError, match=r"model\.safetensors"):
        publication(model, "me/model")


def test_a_run_says_which_model_it_lacks(tmp_path: Path) -> None:
    for name, said in (("fuse/a", "lacks its model, .*fuse/a → `cpift run`"), ("../fuse/a", "holds no model")):
        write_json(tmp_path / "summary.json", {"model": name})
        with pytest.raises(ConfigError, match=said):
            publication(tmp_path, "me/model")


def test_a_file_that_is_no_json_is_named(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(CpiftError, match=r"config\.json: is no JSON"):
        publication(model, "me/model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", b"---\nlicense: [mit\n---\n", r"README\.md: its metadata is no YAML"),
        ("README.md", b"---\n- mit\n---\n", r"README\.md: its metadata is no mapping"),
        ("README.md", b"\xff\xfe\x00", r"README\.md: is no UTF-8"),
        ("summary.json", b"[]", r"summary\.json: holds a list"),
        ("extraction.json", b"{}", r"extraction\.json: is no record of extract-lora"),
        ("manifest.json", b"{}", "manifest"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, message: str, model: Path) -> None:
    if name == "extraction.json":
        (model / "README.md").unlink()
    (model / name).write_bytes(content)
    with pytest.raises(CpiftError, match=message):
        publication(model, "me/model")


def test_a_cards_metadata_names_models_of_the_hub_alone(model: Path) -> None:
    own = "---\nbase_model: [org/base, /home/somebody/base, 7]\nmerged_from: {a: /home/somebody/a}\n---\n# Mine\n"
    (model / "README.md").write_text(own)
    card = publication(model, "me/model").card
    assert yaml.safe_load(card.split("---\n")[1]) == {"base_model": ["org/base"], "merged_from": {"a": "a"}}
    assert card.endswith("---\n# Mine\n")
    (model / "README.md").write_text("# Only words\n")
    assert publication(model, "me/model").card == "# Only words\n"


def test_wrong_arguments_come_back_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        publication(tmp_path, "no-org")
    assert "'no-org' is no name of a repository" in str(caught.value)
    assert "holds no model" in str(caught.value)

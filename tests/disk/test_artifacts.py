from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from cpift.config.loading import load_config
from cpift.disk.artifacts import Artifact
from cpift.disk.files import digest, file_sha256, folder_hashes, folder_made, link_or_copy, write_json
from cpift.disk.locks import exclusive
from cpift.errors import CpiftError
from cpift.pipeline.identity import StageArtifacts


def artifact(root: Path, **fields: object) -> Artifact:
    return Artifact(root, "probe", "a", {"model": "x"}, fields, version=1)


def test_the_fingerprint_follows_inputs_fields_and_version(tmp_path: Path) -> None:
    first = artifact(tmp_path, steps=3)
    assert first.fingerprint == artifact(tmp_path, steps=3).fingerprint
    others = [
        artifact(tmp_path, steps=4),
        Artifact(tmp_path, "probe", "a", {"model": "y"}, {"steps": 3}, 1),
        Artifact(tmp_path, "probe", "a", {"model": "x"}, {"steps": 3}, 2),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})


def test_an_artifact_is_complete_only_when_its_block_ends(tmp_path: Path) -> None:
    made = artifact(tmp_path)

    def fail_half_way() -> None:
        with made.build() as out:
            (out / "half").write_text("x")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not made.complete
    assert not made.path.exists()
    made.work_dir.mkdir(parents=True)
    with made.build("some device") as out:
        assert not (out / "half").exists()
        (out / "whole").write_text("y")
    assert made.complete
    assert not made.work_dir.exists()
    manifest = made.manifest()
    assert manifest["outputs"] == {"whole": file_sha256(made.path / "whole")} == folder_hashes(made.path)
    assert manifest["fingerprint"] == made.fingerprint
    assert manifest["device"] == "some device"
    assert manifest["versions"]["torch"]


def _hold(root: Path, held: object, release: object) -> None:
    with exclusive(root):
        held.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_commands_never_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(30)
    with pytest.raises(CpiftError, match=f"in use by process {other.pid}"), exclusive(tmp_path):
        pass
    release.set()
    other.join()
    with exclusive(tmp_path):
        pass


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 2\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_linked_file_outlives_its_first_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").unlink()
    assert (tmp_path / "b").read_text() == "kept"


# ---- dropped weights -----------------------------------------------------------------------------------------------


def model(root: Path, weights: str = "weights") -> Artifact:
    made = artifact(root)
    with made.build() as out:
        (out / "model.safetensors").write_text(weights)
        (out / "config.json").write_text("{}")
    return made


def test_dropped_weights_leave_a_complete_artifact_that_says_how_to_make_them_again(tmp_path: Path) -> None:
    made = model(tmp_path)
    assert made.has_weights
    assert made.drop_weights("cpift run x.yaml") == len("weights")
    assert (made.complete, made.has_weights) == (True, False)
    assert sorted(path.name for path in made.path.iterdir()) == ["config.json", "manifest.json"]
    kept = made.manifest()
    assert kept["dropped"] == {"files": {"model.safetensors": 7}, "remake": "cpift run x.yaml"}
    assert set(kept["outputs"]) == {"model.safetensors", "config.json"}, "their hashes stay known"
    assert made.drop_weights("again") == 0
    assert made.manifest() == kept


def test_a_crash_while_weights_are_dropped_leaves_no_half_model_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError):
            made.drop_weights("x")
    assert (made.path / "model.safetensors").is_file()
    assert (made.complete, made.has_weights) == (True, False)
    assert made.drop_weights("x") == 7
    assert not (made.path / "model.safetensors").exists()


@pytest.mark.parametrize(("weights", "warned"), [("weights", False), ("others", True)])
def test_weights_made_again_are_compared_with_those_that_were_dropped(
    tmp_path: Path, weights: str, warned: bool
) -> None:
    made, said = model(tmp_path), list[str]()
    made.drop_weights("x")
    with made.compared(said.append):
        model(tmp_path, weights)
    assert made.has_weights
    assert "dropped" not in made.manifest()
    assert (made.path / "model.safetensors").read_text() == weights
    assert [one.name for one in made.path.parent.iterdir()] == [made.name], "nothing is left beside it"
    assert bool(said) is warned
    assert not warned or "model.safetensors made again, and not the same bytes" in said[0]


def test_a_crash_while_weights_are_made_again_costs_only_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the renames nothing bears the artifact's name: it is made once more."""
    import cpift.disk.artifacts as module

    made = model(tmp_path)
    made.drop_weights("x")
    rename = module.os.rename

    def fails_at_last(source: Path, target: Path) -> None:
        if target == made.path:
            raise RuntimeError("power cut")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", fails_at_last)
        with pytest.raises(RuntimeError):
            model(tmp_path)
    assert not made.complete
    model(tmp_path)
    assert made.has_weights
    assert [one.name for one in made.path.parent.iterdir()] == [made.name]


@pytest.mark.parametrize("stage", ["probes", "evaluate"])
def test_a_field_newer_than_artifacts_names_new_ones_only_where_it_is_set(smoke_config: Path, stage: str) -> None:
    def fields(precision: str) -> dict[str, object]:
        values = [f"{section}.precision={precision}" for section in ("probe", "evaluation")]
        made = StageArtifacts(load_config(smoke_config, values))
        artifact = made.evaluate(made.base) if stage == "evaluate" else made.probes["addition"]
        return dict(artifact.fields)

    assert "precision" not in str(fields("auto"))
    assert "precision" in str(fields("float32"))


def test_a_folder_appears_whole_and_nothing_of_others_goes(tmp_path: Path) -> None:
    theirs = tmp_path / ".made.partial"
    theirs.mkdir()
    with folder_made(tmp_path / "made") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "made").exists()
    with pytest.raises(KeyError), folder_made(tmp_path / "other"):
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {".made.partial", "made"}
    assert (tmp_path / "made" / "a").read_text() == "1"
    with pytest.raises(CpiftError, match="no folder can be made there"), folder_made(tmp_path / "made" / "a" / "b"):
        pass

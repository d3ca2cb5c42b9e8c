"""A fused model scored from memory beside the same one through the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpift.config.loading import load_config
from cpift.console.view import View, quiet
from cpift.disk.artifacts import Artifact
from cpift.disk.files import file_sha256, read_json
from cpift.errors import CpiftError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.methods.cpift import Fusion
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.outcomes import own_models, scored_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import handover
from cpift.pipeline.stages.names import ModelRef
from tests.helpers.sweeps import Copies, run_fields


class Scores(InProcessEngine):
    """A fine-tune is θ0 with noise; models are scored."""

    fit = Copies.fit

    def __init__(self) -> None:
        super().__init__()
        self.fits = Copies().fits

    def expect(self, specs: Any) -> None:
        pass


def run_in(folder: Path, view: View | None = None, **changes: Any) -> Pipeline:
    path = folder.with_suffix(".yaml")
    fields = run_fields() | {"regions": {"p": 0.1}, "backbone": {"source": "pretrained"}, "output": str(folder)}
    path.write_text(yaml.safe_dump(fields | changes))
    return Pipeline(load_config(path), Scores(), view or quiet())


def outputs(run: Pipeline) -> tuple[Artifact, Artifact]:
    """The fused model and its scores."""
    fused = own_models(run, "fused")["fused"]
    return fused, run.artifacts.evaluate(ModelRef.of("fused", fused))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with everything before fusion."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_in(folder).group()
    return folder


@pytest.fixture
def again(prepared: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(prepared, tmp_path / name))

    return copied


@pytest.mark.slow
def test_scores_are_those_through_the_disk_bit_for_bit(again: Callable[[str], Path]) -> None:
    through, held = run_in(again("through")), run_in(again("held"))
    through.fuse()
    through.evaluate(scored_models(through, "fused"))
    handover.score_fused(held, "cpift evaluate best.yaml")
    (written, there), (fused, scored) = outputs(through), outputs(held)
    assert (scored.path / "scores.json").read_bytes() == (there.path / "scores.json").read_bytes()
    assert fused.state(thorough=True).kind == "dropped"
    assert not list(fused.path.glob("*.safetensors"))
    manifest, beside = fused.manifest(), written.manifest()
    differing = {name for name in beside["outputs"] if manifest["outputs"].get(name) != beside["outputs"][name]}
    assert differing == {"fusion.json"}, "the weights have the hash of the file"
    nbytes = (written.path / "model.safetensors").stat().st_size
    assert manifest["dropped"] == {"files": {"model.safetensors": nbytes}, "remake": "cpift evaluate best.yaml"}
    tensors, checks = (read_json(fused.path / "fusion.json")[name] for name in ("tensors", "checks"))
    assert tensors == read_json(written.path / "fusion.json")["tensors"]
    said = " ".join(check["name"] for check in checks)
    assert "finite" in said
    assert "core element" not in said, "what was not looked at is not said"

    held.fuse()  # written after all
    assert file_sha256(fused.path / "model.safetensors") == manifest["outputs"]["model.safetensors"]
    assert (fused.path / "fusion.json").read_bytes() == (written.path / "fusion.json").read_bytes()


def test_after_a_kill_nothing_is_complete_and_the_same_call_goes_on(
    again: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = again("killed")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(InProcessEngine, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            handover.score_fused(run_in(folder), "remake")
    fused, scored = outputs(run_in(folder))
    assert (fused.state().kind, scored.state().kind) == ("absent", "absent")
    with monkeypatch.context() as patched:  # between the two outputs
        patched.setattr(handover, "keep_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            handover.score_fused(run_in(folder), "remake")
    assert (fused.state().kind, scored.state().kind) == ("dropped", "absent")
    before = fused.manifest()["outputs"]
    handover.score_fused(run_in(folder), "remake")
    assert scored.complete
    assert fused.manifest()["outputs"] == before
    again_run = run_in(folder)
    handover.score_fused(again_run, "remake")
    assert not again_run.worked


@pytest.mark.slow
def test_points_that_differ_in_omega_read_the_models_for_angles_once(
    again: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = again("omega"), Fusion._read_gram
    looked_at: list[str] = []

    def counted(self: Fusion, info: TensorInfo) -> Any:
        looked_at.append(info.name)
        return read(self, info)

    monkeypatch.setattr(Fusion, "_read_gram", counted)
    monkeypatch.setattr(handover, "_KNOWN", {})
    hashes = []
    for omega, share in ((0.5, 1), (0.25, 1), (0.25, 2)):
        run = run_in(folder, fusion={"omega": omega}, regions={"p": 0.1 * share})
        handover.score_fused(run, "remake")
        hashes.append(outputs(run)[0].manifest()["outputs"]["model.safetensors"])
        assert len(looked_at) == share * len(set(looked_at))
    run.fuse()
    assert file_sha256(outputs(run)[0].path / "model.safetensors") == hashes[2]
    second = run_in(folder, fusion={"omega": 0.25})
    second.fuse()
    assert file_sha256(outputs(second)[0].path / "model.safetensors") == hashes[1]


def test_what_was_read_of_a_file_that_changed_meanwhile_is_forgotten(
    again: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(again("changed"))

    def changing(*arguments: Any) -> None:
        for file in run.artifacts.probes["a"].path.glob("*.safetensors"):
            with file.open("ab") as opened:
                opened.write(b" ")

    monkeypatch.setattr(InProcessEngine, "evaluate", changing)
    monkeypatch.setattr(handover, "_KNOWN", {"other": {}})
    with pytest.raises(CpiftError, match="safetensors"):
        handover.score_fused(run, "remake")
    assert not handover._KNOWN


def test_a_model_that_memory_has_no_room_for_is_written(
    again: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "available_memory", lambda: 100)
    run = run_in(again("large"))
    handover.score_fused(run, "remake")
    fused, scored = outputs(run)
    assert (fused.state().kind, scored.state().kind) == ("whole", "absent")


def test_weights_that_come_out_other_than_those_scored_are_told(
    again: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = again("other")
    handover.score_fused(run_in(folder), "remake")
    monkeypatch.setattr("cpift.merging.methods.cpift.fused_apply", lambda out, *rest: out.fill_(0.25))
    said: list[str] = []
    view = quiet()
    monkeypatch.setattr(view, "warn", said.append)
    run_in(folder, view=view, resources={"verify": False}).fuse()
    assert "model.safetensors made again, and not the same bytes as before" in said[-1]

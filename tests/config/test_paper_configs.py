"""The paper's configs load, and `cpift plan` knows their models from their headers alone."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config
from cpift.method.regions import core_size
from cpift.models.scratch import make_scratch_tokenizer
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.plan import plan
from cpift.pipeline.preflight import preflight

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
# Names and shapes of the published models: transformers' own classes at the published sizes, without weights.
HEADERS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "paper_headers.json").read_text())


def checkpoint(folder: Path, recorded: dict[str, Any]) -> Path:
    """A safetensors file of the model's full size whose data is a hole: it takes no disk."""
    header, offset = {}, 0
    for pattern, shape in recorded["tensors"].items():
        layers = range(recorded["config"]["num_hidden_layers"]) if "*" in pattern else range(1)
        for layer in layers:
            size = 2
            for extent in shape:
                size *= extent
            name = pattern.replace("*", str(layer))
            header[name] = {"dtype": recorded["dtype"], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    (folder / "config.json").write_text(json.dumps({"model_type": recorded["model_type"]} | recorded["config"]))
    make_scratch_tokenizer(ScratchModel()).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADERS)
def test_a_plan_from_the_recorded_headers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = HEADERS[name]
    # Neither the hub nor gigabytes of a hole are asked for what they hold.
    monkeypatch.setattr("cpift.data.sources.resolve_revision", lambda kind, name, revision: f"{name}@{revision}")
    monkeypatch.setattr("cpift.models.sources.file_sha256", lambda path: hashlib.sha256(path.name.encode()).hexdigest())
    folder = checkpoint(tmp_path, recorded)
    loaded = load_config(FOLDER / f"{name}.yaml", [f"output={tmp_path / 'out'}"])
    config = loaded.model_copy(update={"model": loaded.model.model_copy(update={"hub": None, "path": folder})})
    preflight(config, download=False)
    made = plan(StageArtifacts(config))
    assert made.parameters == recorded["parameters"]
    assert made.core_size == core_size(0.01, recorded["parameters"])
    assert made.memory_per_worker == 16 * recorded["parameters"] // config.resources.workers
    assert [step.label for step in made.steps if step.stage == "probe"] == [task.name for task in config.tasks]
    assert any("`revision` is no commit hash for lucasmccabe/logiqa:" in note for note in made.notes)
    assert [task.name for task in config.tasks] == ["gsm8k", "codealpaca", "logiqa", "alpaca", "ultrachat"]


def test_every_paper_config_has_recorded_headers() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(HEADERS)

"""Every way to merge, of adapters as of what they merge to, and as workers beside an object store get it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.cluster.stored_merge import with_stored_masks
from cpift.config.run import FusionConfig
from cpift.disk.object_store import ObjectStore
from cpift.merging.base import FusionInputs, Materials, MergeMethod
from cpift.merging.engine import merge
from cpift.merging.registry import METHODS, method_named
from tests.helpers.checkpoints import shards_of
from tests.helpers.toys import INNER, WIDTH, make_toy
from tests.helpers.ways_to_merge import CASES, masks_of, moments_for

MODULES = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, INNER)}


def make_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name.split(".")[1] for name in MODULES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    draws, parts = torch.Generator().manual_seed(seed), {}
    for module, (rows, columns) in MODULES.items():
        before = f"base_model.model.model.layers.0.{module}"
        parts[f"{before}.lora_A.weight"] = torch.randn(2, columns, generator=draws) / 4
        parts[f"{before}.lora_B.weight"] = torch.randn(rows, 2, generator=draws) / 4
    save_file(parts, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """θ0, whose output layer is its embedding, two adapters of it, and each as the model that it merges to."""
    root = tmp_path_factory.mktemp("adapters")
    base = make_toy(root / "base", 0, layers=1, tied=True)
    _, adapters = open_models(base, {name: make_adapter(root / name, seed) for seed, name in enumerate("ab")})
    for name, model in adapters.items():
        shutil.copytree(base, root / f"{name}-merged")
        tensors = {tensor: model.tensor(tensor) for tensor in model.names}
        save_file(tensors, root / f"{name}-merged" / "model.safetensors", metadata={"format": "pt"})
    return root


def inputs_of(root: Path, name: str, kind: str) -> FusionInputs:
    tasks = "ab"[: CASES[name][0]] if name in CASES else "a" if name == "passthrough" else "ab"
    base, tuned = open_models(root / "base", {task: root / f"{task}{kind}" for task in tasks})
    return FusionInputs(base, base, tuned, Path(), (), moments=moments_for(base, tasks, root))


def made(name: str, fields: Mapping[str, Any], inputs: FusionInputs, folder: Path) -> MergeMethod:
    config = FusionConfig(method=name, **fields)
    return method_named(name).make(Materials(inputs, config, 3, partial(masks_of, config, folder)))


def bytes_of(method: MergeMethod, like: Checkpoint, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    merge(method, like, folder, "inputs", shard_size=500)
    return shards_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cpift"])
def test_adapters_and_workers_give_the_same_bytes(name: str, tied: Path, tmp_path: Path) -> None:
    fields = CASES[name][1] if name in CASES else {"density": 0.3} if "density" in METHODS[name].fields else {}
    fields = {field: value for field, value in fields.items() if field not in ("weights", "densities")}
    adapters, models = (inputs_of(tied, name, kind) for kind in ("", "-merged"))
    wanted = bytes_of(made(name, fields, models, tmp_path / "masks"), models.pretrained, tmp_path / "models")
    assert len(wanted) > 2
    of_adapters = made(name, fields, adapters, tmp_path / "others")
    sent = pickle.loads(pickle.dumps(with_stored_masks(of_adapters, ObjectStore(f"file://{tmp_path}/store"))))
    shutil.rmtree(tmp_path / "others", ignore_errors=True)  # no worker sees the driver's own disk
    assert bytes_of(sent, adapters.pretrained, tmp_path / "sent") == wanted

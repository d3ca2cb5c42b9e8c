from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint, require_same_layout
from cpift.checkpoints.finite import require_finite
from cpift.checkpoints.writing import write_plain
from cpift.errors import CheckpointError
from tests.helpers.checkpoints import random_tensors, save_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_reads_back_bit_for_bit(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    tensors = random_tensors(1, dtype) | {"empty": torch.empty(0, 3, dtype=dtype)}
    source = Checkpoint(save_checkpoint(tmp_path / "a", tensors, shards))
    out = tmp_path / "b"
    out.mkdir()
    write_plain(source, source, out, shard_size=max(source.nbytes // shards, 1) + 1)
    copy = Checkpoint(out)
    assert copy.names == source.names == tuple(sorted(tensors))
    assert (len(copy.files) > 1) == (shards > 1)
    for name, tensor in tensors.items():
        assert copy.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(copy.tensor(name), tensor)
        assert copy.tensor(name).dtype == tensor.dtype
    for companion in ("config.json", "tokenizer.json"):
        assert (out / companion).read_bytes() == (source.folder / companion).read_bytes()


def damage(folder: Path, how: str) -> None:
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00002-of-00003.safetensors"
    content = json.loads(index.read_text())
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif how == "missing index entry":
        content["weight_map"]["ghost"] = shard.name
    elif how == "path escape":
        content["weight_map"]["bias"] = "../elsewhere.safetensors"
    elif how == "duplicate tensor":
        shutil.copy(shard, folder / "model-00004-of-00003.safetensors")
        content["weight_map"]["other"] = "model-00004-of-00003.safetensors"
    elif how == "pickle":
        for file in [*folder.glob("*.safetensors"), index]:
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80")
        return
    elif how == "nothing":
        shutil.rmtree(folder)
        return
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing shard", "model-00002-of-00003.safetensors: is named in the index but not there"),
        ("truncated shard", "model-00002-of-00003.safetensors: cannot be read"),
        ("missing index entry", "ghost: is not in model-00002-of-00003.safetensors"),
        ("path escape", "no file of its folder"),
        ("duplicate tensor", "and in model-00004-of-00003.safetensors"),
        ("pickle", "holds pickled weights only"),
        ("nothing", "is no folder"),
    ],
)
def test_damaged_folders_get_one_clear_message(tmp_path: Path, how: str, said: str) -> None:
    folder = save_checkpoint(tmp_path / "m", random_tensors(1), shards=3)
    damage(folder, how)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        (
            "layers.0.q.weight",
            torch.float64,
            "is float64, and fp32, fp16 and bf16 are computed with",
        ),
        ("layers.0.q.weight", torch.int8, "layers.0.q.weight: has whole numbers where weights are floats"),
        ("layers.0.q.weight", torch.uint8, "it is quantised"),
        ("layers.0.q.weight", torch.float8_e4m3fn, "dequantize=True"),
        ("bias", torch.float64, "bias: is float64"),
        ("position_ids", torch.int64, None),
        ("bias", torch.bool, None),
    ],
)
def test_dtypes_that_no_stage_computes_with(tmp_path: Path, name: str, dtype: torch.dtype, said: str | None) -> None:
    tensors = random_tensors(1)
    values = tensors.get(name, torch.zeros(4))
    folder = save_checkpoint(tmp_path / "m", tensors | {name: values.to(dtype)})
    if said is None:
        assert Checkpoint(folder).tensors[name].dtype is dtype
    else:
        with pytest.raises(CheckpointError, match=re.escape(said)):
            Checkpoint(folder)


def test_models_of_another_layout_are_named_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    base = Checkpoint(save_checkpoint(tmp_path / "base", tensors))
    changed = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    changed |= {"layers.0.q.weight": torch.zeros(13, 12), "more": torch.zeros(2)}
    other = Checkpoint(save_checkpoint(tmp_path / "other", changed))
    with pytest.raises(CheckpointError) as caught:
        require_same_layout(base, {"probe a": other})
    message = str(caught.value)
    assert "probe a: its tensors: θ0 has 1 that it lacks (bias); it has 1 that θ0 lacks (more)" in message
    assert "probe a: layers.0.q.weight: has shape [13, 12], in θ0 [13, 13]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_tensor(tmp_path: Path, value: float) -> None:
    tensors = random_tensors(1)
    tensors["cube"][1, 2, 3] = value
    model = Checkpoint(save_checkpoint(tmp_path / "m", tensors))
    with pytest.raises(CheckpointError, match="cube: holds NaN or Inf"):
        require_finite("probe a", model)

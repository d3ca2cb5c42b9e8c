"""Model folders of a few tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cpift.checkpoints.checkpoint import Checkpoint


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """A model folder with these tensors, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), dict[str, str]()
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_tensors(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Parameters of odd shapes, an integer buffer and a scalar among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (31, 7),
        "layers.0.q.weight": (13, 13),
        "layers.0.norm": (13,),
        "bias": (1,),
        "cube": (2, 3, 5),
    }
    tensors = {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}
    return tensors | {"buffer": torch.arange(4)}


SHAPES = {"a.weight": (601, 900), "b.norm": (33,), "c.weight": (77, 1000), "empty": (0, 4)}


def large(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


Models = tuple[Checkpoint, dict[str, Checkpoint]]  # θ0, and fine-tunes by task


SMALL = {"a": (30, 70), "b": (33,), "c": (3, 501), "empty": (0, 4)}


def make_moved(root: Path, steps: bool = False) -> Models:
    """θ0 of `SMALL` and two fine-tunes, x and y, in fp32; steps: an integer buffer that differs beside them."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SMALL.items()}
    tuned = {}
    for task in ("x", "y"):
        moved = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        tuned[task] = Checkpoint(save_checkpoint(root / task, moved | ({"step": torch.arange(3)} if steps else {})))
    beside = {"step": torch.zeros(3, dtype=torch.int64)} if steps else {}
    return Checkpoint(save_checkpoint(root / "base", base | beside)), tuned


def make_sharded(root: Path) -> Models:
    """θ0 and three fine-tunes, one in another dtype; bf16 steps make ties at every threshold."""
    base = large(0)
    tuned = {}
    for task, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        moved = large(task + 1, torch.float32)
        changed = {name: (tensor.float() + 0.02 * moved[name]).to(dtype) for name, tensor in base.items()}
        tuned[f"t{task}"] = Checkpoint(save_checkpoint(root / f"t{task}", changed, shards=1 + task))
    return Checkpoint(save_checkpoint(root / "base", base)), tuned

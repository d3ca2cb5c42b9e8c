"""Fine-tunes that exist already, and the file of a run that merges them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig, RegionsConfig
from cpift.method.regions import write_regions
from cpift.models.sources import materialise
from tests.helpers.checkpoints import Models, save_checkpoint


def make_models(root: Path) -> Path:
    """Make below `root` a tiny Llama, `base`, and two fine-tunes of it, `one` and `two` (in two shards)."""
    materialise(ModelConfig(scratch=ScratchModel(), dtype="bfloat16"), root / "base")
    tensors = load_file(root / "base" / "model.safetensors")
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            n: (x.float() + 0.02 * torch.randn(x.shape, generator=generator)).bfloat16() for n, x in tensors.items()
        }
        shutil.copytree(root / "base", root / name)
        if name == "one":
            save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
        else:
            (root / name / "model.safetensors").unlink()
            config = (root / name / "config.json").read_bytes()
            save_checkpoint(root / name, moved, shards=2)
            (root / name / "config.json").write_bytes(config)
            shutil.copy(root / "base" / "tokenizer.json", root / name)
    return root


def config_file(tmp_path: Path, models: Path, **changes: object) -> Path:
    raw = {
        "name": "merge",
        "output": str(tmp_path / "run"),
        "model": {"path": str(models / "base")},
        "tasks": [{"name": name, "checkpoint": {"path": str(models / name)}} for name in ("one", "two")],
        "regions": {"p": 0.1},
        "backbone": {"source": "pretrained"},
        "fusion": {"shard_size": "100kB"},
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def regions_of(models: Models, p: float, out: Path) -> Path:
    """`out`, with the regions of the fine-tunes for one p."""
    write_regions(*models, RegionsConfig(p=p), {p: out})
    return out

"""Shared by all tests: tiny checkpoints, and a stop to anything that would reach for a network."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One mode for a whole process: Ray takes it once, and a test must not depend on which tests came before it.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Compiled kernels are shared with the user's runs; nothing else of the user's cache is read or written.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()))
_CACHE = tempfile.TemporaryDirectory(prefix="cpift-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# What takes minutes comes first, so that of two workers (`make test`) none ends long before the other.
LONGEST = ("test_operations", "test_end_to_end", "test_sweep_tune", "test_gates", "test_compare", "test_interpreted")
gc.set_threshold(50_000)  # as `cpift.cli` has it: imports make objects that live to the end


def _settle() -> None:
    """Leave what is there to the end of the process. accelerate collects garbage before each stage of a fine-tune, and
    looking through all that was imported took half of a small one's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    _settle()


@pytest.hookimpl(trylast=True)  # after the file's own fixtures have ended
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _settle()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries look for leaks at the end


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """A model folder with these tensors, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that a test has cpift keep are its own: others replace what they follow from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def smoke_config() -> Path:
    return Path(__file__).parents[1] / "configs" / "smoke.yaml"

"""`fusion.slices` in a run's own fields: merged, checked, cut off and gone on with, and refused by name."""

from __future__ import annotations

import inspect
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.cluster.stored_merge import with_stored_masks
from cpift.config.fusion import FusionConfig, SliceConfig, SourceConfig
from cpift.config.loading import parse_config
from cpift.disk.object_store import ObjectStore
from cpift.errors import ConfigError, CpiftError
from cpift.merging.base import MergeMethod
from cpift.merging.engine import merge
from cpift.merging.settings import Largest
from cpift.merging.stacks.inputs import Part, stack_inputs
from cpift.merging.stacks.method import StackMerge
from tests.helpers.checkpoints import shards_of
from tests.helpers.toys import make_toy
from tests.helpers.ways_to_merge import masks_of


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    make_toy(root / "base", 0)
    make_toy(root / "one", 1)
    make_toy(root / "two", 2, layers=4)
    make_toy(root / "tied", 3, tied=True)
    return root


def source(model: str, first: int, end: int, **settings: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], **settings}


def merged(toys: Path, out: Path, slices: Any, tasks: str = "one two", **fields: Any) -> cpift.MergeResult:
    models = {name: toys / name for name in tasks.split()}
    return cpift.merge(toys / "base", models, out, slices=slices, **fields)


def test_slices_of_several_sources_are_merged_each_by_itself(toys: Path, tmp_path: Path) -> None:
    """Models of other depths; TIES in one slice of two and in one of one, with its own gradient; all of it verified."""
    slices = [
        {"sources": [source("pretrained", 0, 2), source("one", 1, 3, weight=0.5), source("two", 0, 2)]},
        {"sources": [source("pretrained", 1, 3), source("two", 2, 4)], "weight": [0.25, 1.0], "scale": 0.5},
    ]
    result = merged(toys, tmp_path / "out", slices, method="ties", density=1.0, normalize=False, memory_budget="1MiB")
    assert all(check["passed"] for check in result.checks)
    out, base, two = Checkpoint(tmp_path / "out"), Checkpoint(toys / "base"), Checkpoint(toys / "two")
    assert out.config["num_hidden_layers"] == 4
    for name, factor in (
        ("model.layers.{}.mlp.up_proj.weight", 0.25),
        ("model.layers.{}.input_layernorm.weight", 0.25),
    ):
        origin, tuned = base.tensor(name.format(1)).float(), two.tensor(name.format(2)).float()
        wanted = (origin + 0.5 * factor * (tuned - origin)).bfloat16()
        assert torch.equal(out.tensor(name.format(2)), wanted)
    head = base.tensor("lm_head.weight").float()
    assert torch.equal(
        out.tensor("lm_head.weight"), (head + 0.5 * (two.tensor("lm_head.weight").float() - head)).bfloat16()
    )


def test_whatever_is_asked_about_a_tensor_is_asked_of_its_slice() -> None:
    """A question that `MergeMethod` learns later has to be handed on here too."""
    about = {
        name
        for name, made in inspect.getmembers(MergeMethod, inspect.isfunction)
        if "info" in inspect.signature(made).parameters
    }
    assert about <= set(vars(StackMerge))
    assert {"at", "prepare", "models", "named", "with_masks"} <= set(vars(StackMerge))


def test_a_slice_whose_matrices_do_not_fit_is_named(toys: Path, tmp_path: Path) -> None:
    """Of one task a slice the sizes of one count, though there are two; as planned, and as merged."""
    names = ("one", "two")
    apart: list[Any] = [{"sources": [source("pretrained", 0, 3), source(name, 0, 3)]} for name in names]
    fields: dict[str, Any] = {"method": "tsv_m", "memory_budget": 20_000}
    assert merged(toys, tmp_path / "apart", apart, **fields).checks
    both: list[Any] = [{"sources": [source(name, 0, 3) for name in ("pretrained", *names)]}]
    said = r"by whole tensors, of which model\.layers\.0\.mlp\.down_proj\.weight takes 0 MiB → give at least 1 MiB"
    with pytest.raises(ConfigError, match=said):
        merged(toys, tmp_path / "both", both, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpift.merging.planning.check_budget", lambda config: [])
        with pytest.raises(CpiftError, match=said):
            merged(toys, tmp_path / "both", both, **fields)


def test_workers_beside_an_object_store_have_the_masks_of_each_slice(toys: Path, tmp_path: Path) -> None:
    pair = (SourceConfig(model="pretrained", layer_range=(0, 2)), SourceConfig(model="one", layer_range=(1, 3)))
    slices = (SliceConfig(sources=pair), SliceConfig(sources=pair, density=0.7))
    config = FusionConfig(method="ties", density=0.3, slices=slices)
    inputs = stack_inputs(config, *open_models(toys / "base", {"one": toys / "one"}, whole=False))

    def trimmed(part: Part, wanted: Largest) -> list[Path]:
        return masks_of(part.config, tmp_path / part.folder, wanted)

    method = StackMerge.of(inputs, 0, trimmed)
    sent = pickle.loads(pickle.dumps(with_stored_masks(method, ObjectStore(f"file://{tmp_path}/store"))))
    for folder in ("here", "sent"):
        (tmp_path / folder).mkdir()
    merge(method, inputs.backbone, tmp_path / "here", "inputs", shard_size=1000)
    for folder in ("trimmed-0", "trimmed-1"):
        shutil.rmtree(tmp_path / folder)
    merge(sent, inputs.backbone, tmp_path / "sent", "inputs", shard_size=1000)
    assert shards_of(tmp_path / "here") == shards_of(tmp_path / "sent")


def test_workers_get_the_method_of_each_slice(toys: Path) -> None:
    sources = [SourceConfig(model=name, layer_range=(0, 3)) for name in ("one", "two")]
    config = FusionConfig(method="passthrough", slices=tuple(SliceConfig(sources=(one,)) for one in sources))
    inputs = stack_inputs(config, *open_models(toys / "base", {n: toys / n for n in ("one", "two")}, whole=False))
    inputs.check()
    method = pickle.loads(pickle.dumps(StackMerge.of(inputs, 0, lambda part, wanted: [])))
    assert method.models[0].names == inputs.backbone.names
    info = inputs.backbone.tensors["model.layers.3.mlp.up_proj.weight"]
    out = torch.empty(info.numel, dtype=info.dtype)
    method.tensor(info)[1](0, info.numel, out)
    assert torch.equal(out, Checkpoint(toys / "two").tensor("model.layers.0.mlp.up_proj.weight").flatten())


def test_a_stack_that_was_cut_off_goes_on_from_its_files(toys: Path, tmp_path: Path) -> None:
    slices = [{"sources": [source("one", 0, 3)]}, {"sources": [source("two", 1, 4)]}]
    fields: dict[str, Any] = {"method": "passthrough", "shard_size": 2000}
    whole = merged(toys, tmp_path / "whole", slices, **fields).path
    work = tmp_path / ".again.merge"
    with pytest.raises(ConfigError, match="holds another merge"):
        merged(toys, tmp_path / "whole", slices[::-1], **fields)
    original = cpift.checkpoints.writing.write_shard  # type: ignore[attr-defined]  # looked up where it is used
    written: list[str] = []

    def stops(shard: Any, *rest: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        return original(shard, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpift.merging.engine.write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            merged(toys, tmp_path / "again", slices, **fields)
    kept = {path.name: path.stat().st_mtime_ns for path in work.rglob("model-*.safetensors")}
    assert set(kept) == set(written)
    again = merged(toys, tmp_path / "again", slices, **fields).path
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert file.name not in kept or (again / file.name).stat().st_mtime_ns == kept[file.name]


def test_tied_models_stay_tied_and_others_apart(toys: Path, tmp_path: Path) -> None:
    first, last = [{"sources": [source("tied", 0, 2)]}], [{"sources": [source("one", 1, 3)]}]
    tied = cpift.merge(toys / "tied", {"tied": toys / "tied"}, tmp_path / "a", method="passthrough", slices=first * 2)
    assert Checkpoint(tied.path).config["tie_word_embeddings"]
    assert "lm_head.weight" not in Checkpoint(tied.path).tensors
    models = {"tied": toys / "tied", "one": toys / "one"}
    both = cpift.merge(toys / "tied", models, tmp_path / "b", method="passthrough", slices=first + last)
    out = Checkpoint(both.path)
    assert out.config["tie_word_embeddings"] is False
    assert torch.equal(out.tensor("lm_head.weight"), Checkpoint(toys / "one").tensor("lm_head.weight"))
    assert torch.equal(
        out.tensor("model.embed_tokens.weight"), Checkpoint(toys / "tied").tensor("model.embed_tokens.weight")
    )


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "outside": ([{"sources": [source("one", 1, 5)]}], {}, "layer_range: is [1, 5], and one has 3 layers → end at 3"),
    "nothing": ([{"sources": [source("one", 2, 2)]}], {}, "[2, 2] has no layer"),
    "below": ([{"sources": [source("one", -1, 2)]}], {}, "layer_range.0"),
    "unknown": ([{"sources": [source("three", 0, 2)]}], {}, "'three' is no model; there are pretrained, one"),
    "twice": ([{"sources": [source("one", 0, 1), source("one", 1, 2)]}], {}, "'one' stands twice in one slice"),
    "uneven": ([{"sources": [source("one", 0, 1), source("pretrained", 0, 2)]}], {}, "other numbers of layers"),
    "two by passthrough": (
        [{"sources": [source("one", 0, 1), source("pretrained", 0, 1)]}],
        {},
        "fusion.slices.0: fusion.method: passthrough is of one model, and there are 2",
    ),
    "no base": ([{"sources": [source("one", 0, 3)]}], {"method": "ties"}, "have no layers of pretrained, and ties"),
    "by cpift": ([{"sources": [source("one", 0, 3)]}], {"method": "cpift"}, "cpift's core regions are of θ0's layers"),
    "idle": ([{"sources": [source("pretrained", 0, 3)]}], {}, "have no layers of tasks.one; leave that task out"),
    "filter": (
        [{"sources": [source("one", 0, 3)]}],
        {"weight": [{"filter": "atn", "value": 0}, {"value": 1}]},
        "the filter 'atn' is in no tensor's name",
    ),
    "filter of a source": (
        [{"sources": [source("one", 0, 3, weight=[{"filter": "atn", "value": 0}, {"value": 1}])]}],
        {},
        "fusion.slices.0.sources.0.weight: the filter 'atn' is in no tensor's name",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_stacked_has_a_name(kind: str, toys: Path, tmp_path: Path) -> None:
    slices, fields, told = REFUSED[kind]
    with pytest.raises(ConfigError) as caught:
        merged(toys, tmp_path / "out", slices, "one", **{"method": "passthrough", **fields})
    assert told in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_a_model_that_is_made_first_has_no_layers_to_give(toys: Path) -> None:
    slices = [{"sources": [source("one", 0, 2)]}]
    raw = {"name": "x", "tasks": [{"name": "one", "checkpoint": {"path": str(toys / "one")}}]}
    raw |= {"model": {"gguf": {"file": "x.gguf"}}, "fusion": {"method": "passthrough", "slices": slices}}
    with pytest.raises(ConfigError, match=r"fusion\.slices: is of models as their files have them, and θ0 is made of"):
        parse_config(raw, toys, "x")


def other_width(folder: Path) -> None:
    shutil.rmtree(folder)
    make_toy(folder, 1, rows=16)


def other_norm(folder: Path) -> None:
    shutil.rmtree(folder)
    make_toy(folder, 1, rms_norm_eps=0.5)


@pytest.mark.parametrize(
    ("damage", "told"),
    [(other_width, "lm_head.weight: is not as the class"), (other_norm, "one: config.json, rms_norm_eps: is 0.5")],
)
def test_models_that_do_not_fit_are_refused(
    damage: Callable[[Path], None], told: str, toys: Path, tmp_path: Path
) -> None:
    for name in ("base", "one"):
        shutil.copytree(toys / name, tmp_path / name)
    damage(tmp_path / "one")
    slices = [{"sources": [source("pretrained", 0, 1)]}, {"sources": [source("one", 1, 3)]}]
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, tmp_path / "out", slices, "one", method="passthrough")
    assert told in str(caught.value)

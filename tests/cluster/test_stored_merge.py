"""Workers that share an object store instead of a folder give the same bytes; what was uploaded is not made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import kept_record, plan_shards
from cpift.cluster.merging import RayMerging
from cpift.cluster.stored_merge import fetch, merge_into, publish, with_stored_masks
from cpift.config.loading import load_config
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.disk.files import file_sha256, read_json
from cpift.disk.object_store import ObjectStore
from cpift.errors import StageError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import FusionInputs, Merged
from cpift.merging.engine import merge
from cpift.merging.methods.cpift import Fusion
from cpift.method.regions import write_regions
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from tests.helpers.checkpoints import Models, shards_of
from tests.helpers.s3_server import objects, s3_bucket

BUDGET = 1 << 30


@dataclass(frozen=True)
class Room:
    store: ObjectStore
    files: Path  # where the store's objects lie
    fusion: Fusion
    base: Checkpoint
    whole: Path  # what one process writes


@pytest.fixture(params=[True, False], ids=["cores", "no cores"])
def room(request: pytest.FixtureRequest, tmp_path: Path, sharded_models: Models) -> Room:
    base, tuned = sharded_models
    for name in ("regions", "whole"):
        (tmp_path / name).mkdir()
    write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: tmp_path / "regions"})
    inputs = FusionInputs(base, base, tuned, tmp_path / "regions", list(tuned))
    fusion = Fusion(inputs, FusionConfig(transplant=request.param))
    merge(fusion, base, tmp_path / "whole", "inputs", shard_size=10**6)
    return Room(ObjectStore(f"file://{tmp_path}/store"), tmp_path / "store", fusion, base, tmp_path / "whole")


class Refuses(Fusion):
    def tensor(self, info: TensorInfo) -> Merged:
        raise AssertionError(f"{info.name} was made again")


@pytest.mark.slow
def test_shards_through_a_store_are_those_of_a_folder(room: Room, tmp_path: Path) -> None:
    sent = with_stored_masks(room.fusion, room.store)
    out = tmp_path / "fetched"
    out.mkdir()
    for shard in plan_shards(room.base.tensors.values(), 10**6):
        note = merge_into(room.store, sent, shard, "inputs", BUDGET)[shard.name]
        assert fetch(room.store, shard, out, "inputs", note) == kept_record(shard, room.whole, "inputs")
        assert kept_record(shard, out, "inputs") is not None  # an interrupted driver goes on from here
        sent.__class__ = Refuses  # and a second worker takes what is there
        assert merge_into(room.store, sent, shard, "inputs", BUDGET)[shard.name] == note
        sent.__class__ = Fusion
    assert shards_of(out) == shards_of(room.whole)
    assert len(shards_of(out)) == 2


def test_masks_of_the_same_size_with_other_bits_are_uploaded_again(room: Room) -> None:
    with_stored_masks(room.fusion, room.store)
    files = sorted((room.files / "masks" / "0").glob("*.safetensors"))
    right = [file_sha256(file) for file in files]
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    files[0].with_name(f"{files[0].name}.json").unlink()  # as an upload that was cut short leaves it
    written = [file.stat().st_mtime_ns for file in files]
    with_stored_masks(room.fusion, room.store)
    assert [file_sha256(file) for file in files] == right
    assert [file.stat().st_mtime_ns for file in files][1:] == written[1:], "what is there is not sent again"


def test_a_shard_that_was_cut_short_or_is_of_other_inputs_is_made_again(room: Room) -> None:
    shard = plan_shards(room.base.tensors.values(), 10**6)[0]
    sent = with_stored_masks(room.fusion, room.store)
    merge_into(room.store, sent, shard, "inputs", BUDGET)
    file = room.files / shard.name
    file.write_bytes(file.read_bytes()[:-1])
    for made_from in ("inputs", "others"):
        note = merge_into(room.store, sent, shard, made_from, BUDGET)[shard.name]
        assert note["key"] == shard.key(made_from)
        assert file_sha256(file) == note["sha256"] == file_sha256(room.whole / shard.name)


def test_a_shard_that_was_changed_in_the_store_is_not_taken(room: Room, tmp_path: Path) -> None:
    shard = plan_shards(room.base.tensors.values(), 10**6)[0]
    note = merge_into(room.store, with_stored_masks(room.fusion, room.store), shard, "inputs", BUDGET)[shard.name]
    file = room.files / shard.name
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(StageError, match=r"store/model-00001-of-00002\.safetensors: its bytes are not those"):
        fetch(room.store, shard, tmp_path, "inputs", note)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob(".*.partial"))


def test_a_model_is_published_manifest_last(room: Room, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("manifest.json", "config.json", "model.safetensors.index.json", "model.safetensors"):
        (folder / name).write_text(name)
    put: list[str] = []
    with mock.patch.object(ObjectStore, "put", lambda self, file, name: put.append(name)):
        publish(room.store, folder)
    assert put == ["config.json", "model.safetensors.index.json", "manifest.json"]
    publish(room.store, folder)
    with mock.patch.object(ObjectStore, "put", side_effect=AssertionError):
        publish(room.store, folder)  # again: nothing to do


def test_failures_of_a_store_name_the_object(room: Room, tmp_path: Path) -> None:
    assert room.store.size("nowhere") is None
    assert room.store.read_json("nowhere") is None
    with pytest.raises(StageError, match=r"store/nowhere: .* → check the URI"):
        room.store.get("nowhere", tmp_path / "x", "")
    with pytest.raises(StageError, match=r"gopher://x/y/nowhere"):
        replace(room.store, place="gopher://x/y").size("nowhere")
    (tmp_path / "five").write_bytes(b"12345")
    room.store.put(tmp_path / "five", "five")
    assert room.store.read("five", 1, 3) == b"234"
    with pytest.raises(StageError, match=r"five: ends before byte 7"):
        room.store.read("five", 4, 3)


@pytest.fixture
def bucket() -> Iterator[str]:
    """Its server is there before Ray starts, so that all nodes know of it."""
    with s3_bucket() as uri:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, namespace="cpift", log_to_driver=False)
        yield uri
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_regions_and_fusion_of_two_nodes_through_s3(tmp_path: Path, sharded_models: Models, bucket: str) -> None:
    base, tuned = sharded_models
    made = {}
    for name, storage in (("here", None), ("spread", f"{bucket}/merges")):
        config = {
            "name": name,
            "output": str(tmp_path / name),
            "model": {"path": str(base.folder)},
            "tasks": [{"name": task, "checkpoint": {"path": str(model.folder)}} for task, model in tuned.items()],
            "backbone": {"source": "pretrained"},
            "regions": {"p": 0.05},
            "fusion": {"shard_size": "1MB"},
            "resources": {"storage": storage, "verify": False},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run = load_config(tmp_path / f"{name}.yaml", [])
        merging = RayMerging(ResourcesConfig(storage=storage)) if storage else None
        made[name] = Pipeline(run, NoEngine(merging)).fuse().path
    assert shards_of(made["spread"]) == shards_of(made["here"])
    assert len(shards_of(made["here"])) == 2
    uploaded = {
        key.partition("/merges/")[2].partition("/")[2]: size for key, size in objects(f"{bucket}/merges").items()
    }
    local = {file.name: file.stat().st_size for file in made["spread"].iterdir() if file.is_file()}
    assert {name: size for name, size in uploaded.items() if name in local} == local
    assert {"masks/0/t0.safetensors", "manifest.json"} <= uploaded.keys()
    manifest = read_json(made["spread"] / "manifest.json")
    assert all(manifest["outputs"][name] == file_sha256(made["here"] / name) for name in shards_of(made["here"]))

"""Regions and fusion as Ray tasks give the bytes of one process, and a killed worker costs only time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cpift.cluster import merging as distributed_fusion
from cpift.cluster.merging import RayMerging
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.errors import CheckpointError
from cpift.formats.safetensors import TensorInfo, read_header
from cpift.merging.base import FusionInputs, Merged
from cpift.merging.engine import merge
from cpift.merging.methods.cpift import Fusion
from cpift.merging.registry import method_named
from cpift.method.masks import read_summary
from cpift.method.regions import Streaming, write_regions
from tests.helpers.checkpoints import Models, save_checkpoint, shards_of

pytestmark = pytest.mark.slow


METHOD = """
from cpift import UpdateMerge

class Half(UpdateMerge):
    formula, source, fields = "half the mean", "a test", ()

    def update(self, name, start, stop, updates):
        return sum(updates) / (2 * len(updates))

    def defined_update(self, name, start, stop, updates):
        return updates.mean(0) / 2
"""


@pytest.fixture(scope="module")
def merging() -> Iterator[RayMerging]:
    """Two nodes of one processor each on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace="cpift", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield RayMerging(ResourcesConfig())
    ray.shutdown()
    cluster.shutdown()


class DiesOnce(Fusion):
    """Kills the first worker that comes to a tensor."""

    marker: Path

    def tensor(self, info: TensorInfo) -> Merged:
        if info.name == "c.weight" and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tensor(info)


def test_bytes_do_not_depend_on_who_works(tmp_path: Path, sharded_models: Models, merging: RayMerging) -> None:
    base, tuned = sharded_models
    folders = {name: tmp_path / name for name in ("here", "there", "whole", "shared", "killed")}
    for folder in folders.values():
        folder.mkdir()
    for name, mark in (("here", None), ("there", merging.mark)):
        write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: folders[name]}, Streaming(budget=1, mark=mark))
    assert shards_of(folders["here"]) == shards_of(folders["there"])
    assert read_summary(folders["here"]) == read_summary(folders["there"])

    inputs = FusionInputs(base, base, tuned, folders["there"], list(tuned))
    fusion = Fusion(inputs, FusionConfig(granularity="model"))  # whose statistics every worker has to get
    records = merge(fusion, base, folders["whole"], "inputs", shard_size=10**6)
    spread = merge(fusion, base, folders["shared"], "inputs", shard_size=10**6, shards_by=merging.merge_shards)
    assert spread == records
    assert len(shards_of(folders["whole"])) == 2
    assert shards_of(folders["whole"]) == shards_of(folders["shared"])

    dies = DiesOnce(inputs, FusionConfig(granularity="model"))
    dies.marker = tmp_path / "died"
    merge(dies, base, folders["killed"], "inputs", shard_size=10**6, shards_by=merging.merge_shards)
    assert dies.marker.exists()
    assert shards_of(folders["killed"]) == shards_of(folders["whole"])


class NotesItsNode(Fusion):
    """Leaves the id of the node that merges it in a file a tensor."""

    notes: Path

    def tensor(self, info: TensorInfo) -> Merged:
        (self.notes / info.name).write_text(ray.get_runtime_context().get_node_id())
        return super().tensor(info)


class NotesPlaces:
    """A Ray task that keeps where its calls were to run, in order."""

    def __init__(self, task: Any):
        self.task, self.places = task, list[str]()

    def options(self, **settings: Any) -> Any:
        self.places.append(settings["scheduling_strategy"].node_id)
        return self.task.options(**settings)


def test_both_passes_give_a_part_of_the_model_to_the_same_node(  # type: ignore[no-untyped-def]
    tmp_path: Path,
    sharded_models: Models,
    merging: RayMerging,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned = sharded_models
    for name in ("masks", "merged", "out"):
        (tmp_path / name).mkdir()
    places = sorted(node["NodeID"] for node in ray.nodes())
    marks = NotesPlaces(distributed_fusion._task)
    monkeypatch.setattr(distributed_fusion, "_task", marks)
    streaming = Streaming(budget=1, mark=merging.mark)
    write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: tmp_path / "masks"}, streaming)
    assert marks.places == [places[0], places[0], places[1]]  # three ranges, of about a segment each

    inputs = FusionInputs(base, base, tuned, tmp_path / "masks", list(tuned))
    fusion = NotesItsNode(inputs, FusionConfig())
    fusion.notes = tmp_path / "merged"
    merge(fusion, base, tmp_path / "out", "inputs", shard_size=10**6, shards_by=merging.merge_shards)
    merged = {file.name: file.read_text() for file in fusion.notes.iterdir()}
    first, second = (read_header(file) for file in sorted((tmp_path / "out").glob("*.safetensors")))
    assert {merged[info.name] for info in first} == {places[0]}
    assert {merged[info.name] for info in second} == {places[1]}


def test_an_error_of_a_worker_arrives_as_it_was(tmp_path: Path, sharded_models: Models, merging: RayMerging) -> None:
    import torch

    from cpift.checkpoints.checkpoint import Checkpoint

    base, tuned = sharded_models
    spoilt = {name: base.tensor(name) for name in base.names}
    spoilt["c.weight"][5, 5] = torch.nan
    bad = {**tuned, "bad": Checkpoint(save_checkpoint(tmp_path / "bad", spoilt))}
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"bad: c\.weight: holds NaN or Inf"):
        write_regions(base, bad, RegionsConfig(), {0.01: tmp_path / "out"}, Streaming(budget=1, mark=merging.mark))


def test_a_method_of_a_file_beside_the_run_goes_to_workers(
    tmp_path: Path, sharded_models: Models, merging: RayMerging
) -> None:
    """Its module is known to the process that loaded it alone."""
    base, tuned = sharded_models
    (tmp_path / "my_methods.py").write_text(METHOD)
    word = f"{tmp_path / 'my_methods.py'}:Half"
    config = FusionConfig(method=word)
    method = method_named(word)(FusionInputs(base, base, tuned, tmp_path, ()), config)
    folders = [tmp_path / name for name in ("whole", "shared")]
    for folder, shards_by in zip(folders, (None, merging.merge_shards), strict=True):
        folder.mkdir()
        merge(method, base, folder, "inputs", shard_size=10**6, shards_by=shards_by)
    assert shards_of(folders[0]) == shards_of(folders[1])

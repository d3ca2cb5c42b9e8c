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

from cpift.config import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.distributed_fusion import RayMerging
from cpift.errors import CheckpointError
from cpift.fusion import Fill, Fusion, FusionInputs
from cpift.merging import merge
from cpift.regions import Streaming, read_summary, write_regions
from cpift.safetensors_files import TensorInfo

from .test_streaming import models, shards_of  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def merging() -> Iterator[RayMerging]:
    """Two nodes of one processor each on this machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
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

    def tensor(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        if info.name == "c.weight" and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tensor(info)


def test_bytes_do_not_depend_on_who_works(tmp_path: Path, models, merging: RayMerging) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    base, tuned = models
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


def test_an_error_of_a_worker_arrives_as_it_was(tmp_path: Path, models, merging: RayMerging) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    import torch

    from cpift.checkpoints import Checkpoint

    from .conftest import save_checkpoint

    base, tuned = models
    spoilt = {name: base.tensor(name) for name in base.names}
    spoilt["c.weight"][5, 5] = torch.nan
    bad = {**tuned, "bad": Checkpoint(save_checkpoint(tmp_path / "bad", spoilt))}
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"bad: c\.weight: holds NaN or Inf"):
        write_regions(base, bad, RegionsConfig(), {0.01: tmp_path / "out"}, Streaming(budget=1, mark=merging.mark))

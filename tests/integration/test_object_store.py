"""A run on two nodes whose fine-tunes keep their checkpoints in an S3-compatible store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cpift.cluster.engine import RayEngine
from cpift.cluster.session import NAMESPACE
from cpift.config.loading import parse_config
from cpift.console.view import quiet
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from tests.helpers.s3_server import objects, s3_bucket
from tests.helpers.sweeps import run_fields

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def bucket() -> Iterator[str]:
    """Its server is there before Ray starts, so that all nodes know of it."""
    with s3_bucket() as uri:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield uri
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def watched(uri: str) -> Iterator[set[str]]:
    """Keys that were there at some time meanwhile."""
    seen, over = set[str](), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.update(objects(uri))
            time.sleep(0.2)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def fields(storage: str) -> dict[str, Any]:
    run = run_fields()
    return run | {
        "tasks": run["tasks"][:2],
        "probe": run["probe"] | {"checkpoint_every": 2},
        "integration": run["integration"] | {"steps": 4, "checkpoint_every": 2},
        "backbone": {"source": "pretrained"},
        "resources": {"cpus_per_worker": 1, "storage": storage},
    }


def hashes(root: Path) -> dict[str, str]:
    """Of every model's weights by artifact, as the manifests have them."""
    from cpift.disk.files import read_json

    found = {path.parent: read_json(path)["outputs"] for path in root.glob("*/*/manifest.json")}
    return {
        f"{folder.parent.name}/{folder.name}": outputs["model.safetensors"]
        for folder, outputs in found.items()
        if "model.safetensors" in outputs
    }


def test_a_run_keeps_its_checkpoints_in_an_object_store(tmp_path: Path, bucket: str) -> None:
    storage = f"{bucket}/fits"
    config = parse_config(fields(storage), tmp_path, "run.yaml", changes={"output": str(tmp_path / "out")})
    run = Pipeline(config, RayEngine(config), quiet())
    with run.engine.session(), watched(storage) as seen:
        run.fuse()
        probes = {key.split("/")[2] for key in seen if key.endswith("model.safetensors")}
        assert len(probes) == 2, f"each probe's checkpoints have a place of their own: {seen}"
        assert objects(storage) == {}, "a finished fine-tune leaves none"
        before = set(seen)
        run.integrate()
    assert any("checkpoint" in key for key in seen - before)
    assert objects(storage) == {}

    here = config.model_copy(
        update={
            "output": tmp_path / "here",
            "resources": config.resources.model_copy(update={"storage": None}),
        }
    )
    Pipeline(here, InProcessEngine(), quiet()).integrate()
    ours, theirs = hashes(tmp_path / "here"), hashes(tmp_path / "out")
    assert {name: theirs[name] for name in ours} == ours, "the same bytes as without the store"

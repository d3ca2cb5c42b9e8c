from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.cluster import cards, choice, merging
from cpift.cluster.choice import merging_for
from cpift.cluster.engine import RayEngine
from cpift.cluster.group import servable
from cpift.cluster.merging import RayMerging
from cpift.cluster.tasks import TaskEngine
from cpift.config.loading import load_config, with_fields
from cpift.config.run import ResourcesConfig
from cpift.errors import CpiftError
from cpift.merging import on_device
from cpift.merging.on_device import DeviceMerging, device_merging


def test_where_a_merge_runs_follows_the_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert merging_for(ResourcesConfig()) is None
    assert isinstance(merging_for(ResourcesConfig(distributed=True)), RayMerging)
    assert isinstance(merging_for(ResourcesConfig(address="127.0.0.1:6379")), RayMerging)
    monkeypatch.setattr(choice, "device_merging", lambda resources: resources.device)
    assert merging_for(ResourcesConfig(device="cuda")) == "cuda"


def test_all_gpus_of_a_machine_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray, for `cuda` alone, and not within a process that is to do without Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(on_device, "visible_gpus", lambda: 4)
    monkeypatch.setattr(on_device, "current_gpu", lambda: torch.device("cpu"))
    cuda = ResourcesConfig(device="cuda")
    assert isinstance(merging_for(cuda), RayMerging)
    assert isinstance(device_merging(cuda), DeviceMerging)
    assert merging_for(ResourcesConfig()) is None
    assert not isinstance(merging_for(ResourcesConfig(device="auto")), RayMerging)


@pytest.mark.parametrize(
    ("fields", "visible", "needed"),
    [
        ({"device": "cuda", "gpus_per_worker": 1}, 4, True),
        ({"device": "cuda", "gpus_per_worker": 1}, 1, False),
        ({"device": "cuda"}, 4, False),
        ({"gpus_per_worker": 1}, 4, False),
        ({"distributed": True}, 0, True),
    ],
)
def test_workers_of_fine_tunes_leave_what_merges_ask_ray_for(
    fields: dict[str, Any], visible: int, needed: bool, smoke_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(on_device, "visible_gpus", lambda: visible)
    monkeypatch.setattr(on_device, "current_gpu", lambda: torch.device("cpu"))
    resources = {f"resources.{name}": value for name, value in fields.items()}
    run = with_fields(load_config(smoke_config), resources, "test")
    kind = servable(run.resources, ())
    assert kind is not None
    assert RayEngine(run)._merges_need(kind) == needed


def test_a_process_that_uses_one_of_several_gpus_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "visible_gpus", lambda: 4)
    monkeypatch.setattr(on_device, "_SAID", set())
    said: list[str] = []
    for _ in range(2):
        DeviceMerging(torch.device("cpu")).telling(said.append)._say()
    assert said == ["resources.device cuda: on one of 4 GPUs, for it is all this process that computes"]


def test_gpus_are_counted_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [("b", {"CPU": 8.0, "GPU": 2.0}), ("a", {"CPU": 1.0, "GPU": 2.0}), ("c", {"CPU": 64.0})]
    there = [{"NodeID": name, "Resources": resources} for name, resources in nodes]
    monkeypatch.setattr(cards, "alive_nodes", lambda: there)
    assert cards.cards(16) == [cards.Card("a", 1), cards.Card("a", 1), cards.Card("b", 4), cards.Card("b", 4)]
    assert cards.cards(2)[2:] == [cards.Card("b", 2), cards.Card("b", 2)]


def test_a_cluster_without_gpus_is_refused_when_it_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained; and where Ray knows none of this machine's, one is used, and that is said."""
    monkeypatch.setattr(merging, "ray_session", lambda resources: nullcontext())
    monkeypatch.setattr(merging, "cards", lambda threads: [])
    named = ResourcesConfig(device="cuda", address="head:6379")
    told = "resources.device: is `cuda`, and Ray at head:6379 has no GPU"
    with pytest.raises(CpiftError, match=told), TaskEngine(named).session():
        pass
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    here = RayMerging(ResourcesConfig(device="cuda"), lambda: DeviceMerging(torch.device("cpu")), said.append)

    def fails() -> None:
        with here.session(), here._connected():
            assert isinstance(here._alone(), DeviceMerging)
            raise CpiftError("of a stage")

    with pytest.raises(CpiftError, match="of a stage"):
        fails()
    assert here._session is None, "what comes later connects anew, and ends it"
    assert said == ["resources.device cuda: on one GPU, for Ray sees none of this machine's"]

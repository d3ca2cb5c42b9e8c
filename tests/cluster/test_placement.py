from __future__ import annotations

from typing import Any

import pytest

from cpift.cluster.placement import KINDS, Nodes, demand, in_words, task_options, train_options, tune_options
from cpift.config.resources import TaskResources
from cpift.config.run import ResourcesConfig


def need(workers: int, cpus: float = 1, gpus: float = 0) -> ResourcesConfig:
    return ResourcesConfig(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


def started(nodes: Nodes, *needs: ResourcesConfig) -> list[bool]:
    """Take what fits, in order."""
    found = []
    for one in needs:
        placement = nodes.place(one)
        found.append(placement is not None)
        if placement is not None:
            nodes.take(placement)
    return found


def test_groups_of_different_sizes_share_a_node_and_small_ones_pass_a_large_one_that_waits() -> None:
    node = {"CPU": 16.0, "GPU": 8.0, "memory": 1e9}
    assert started(Nodes([node]), need(4, gpus=1), need(6, gpus=1), need(2, gpus=2)) == [True, False, True]


def test_a_worker_lies_on_one_node_and_a_group_on_several() -> None:
    three = {"CPU": 3.0}
    assert started(Nodes([three, three]), need(3, cpus=2)) == [False]  # six CPUs in all, but two workers of two
    assert started(Nodes([three, three]), need(2, cpus=2), need(2)) == [True, True]


def test_what_is_given_back_can_be_taken_again() -> None:
    nodes = Nodes([{"CPU": 0.3}])
    for _ in range(1000):
        placement = nodes.place(need(3, cpus=0.1))
        assert placement is not None
        nodes.take(placement)
        assert nodes.place(need(1, cpus=0.1)) is None
        nodes.give_back(placement)


@pytest.mark.parametrize(("cpus", "gpus"), [(3, 0), (1, 1)])
def test_what_no_node_has_is_never_placed(cpus: float, gpus: float) -> None:
    assert Nodes([{"CPU": 2.0}, {"CPU": 2.0}]).place(need(1, cpus, gpus)) is None


def test_room_is_what_one_node_has() -> None:
    nodes = Nodes([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 4.0}])
    assert [nodes.has_room(demand(need(1, *each))) for each in ((4, 0), (1, 1), (4, 1), (5, 0))] == [
        True,
        True,
        False,
        False,
    ]
    assert not Nodes([]).has_room({"CPU": 1})


def test_an_elastic_group_takes_what_there_is() -> None:
    nodes = Nodes([{"CPU": 2.0}, {"CPU": 1.0}])
    elastic = ResourcesConfig(workers=4, min_workers=2)
    placement = nodes.place(elastic)
    assert placement is not None
    assert len(placement) == 3
    nodes.take(nodes.place(need(2)) or [])
    assert nodes.place(elastic) is None


@pytest.mark.parametrize("fields", [{"min_workers": 3}, {"min_workers": 1, "strategy": "fsdp"}])
def test_impossible_elasticity_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"min_workers {fields['min_workers']}: give a number from"):
        ResourcesConfig(workers=2, **fields)


def test_a_task_overrides_only_what_it_names() -> None:
    own = TaskResources(workers=4, gpus_per_worker=2)
    merged = need(1, cpus=6).overridden(own)
    assert (merged.workers, merged.cpus_per_worker, merged.gpus_per_worker, merged.threads) == (4, 6, 2, 6)


def test_each_part_of_ray_is_asked_for_the_same() -> None:
    alone, gpu = demand(need(1, 2)), demand(need(1, 2, 0.5))
    assert (alone, gpu) == ({"CPU": 2.0}, {"CPU": 2.0, "GPU": 0.5})
    assert demand(need(1, 2, 0.5), cpus=3) == {"CPU": 3, "GPU": 0.5}
    assert task_options(alone) == {"num_cpus": 2.0, "num_gpus": None}
    assert train_options(gpu) == {"use_gpu": True, "resources_per_worker": gpu}
    assert tune_options(gpu) == {"cpu": 2.0, "gpu": 0.5}
    assert in_words(gpu) == "2 CPUs, 0.5 GPUs"


def test_another_kind_of_resource_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithDisk(ResourcesConfig):
        disks_per_worker: float = 2

    monkeypatch.setattr("cpift.cluster.placement.KINDS", {**KINDS, "disk": "disks_per_worker"})
    worker = demand(WithDisk())
    assert worker == {"CPU": 1, "disk": 2}
    assert task_options(worker) == {"num_cpus": 1, "num_gpus": None, "resources": {"disk": 2}}
    assert tune_options(worker) == {"cpu": 1, "disk": 2}
    assert started(Nodes([{"CPU": 9, "disk": 4}]), *[WithDisk()] * 3) == [True, True, False]
    assert "2 disks" in in_words(worker)

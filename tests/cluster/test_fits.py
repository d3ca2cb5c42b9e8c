"""Room on a cluster that others use; fine-tunes on real Ray are in tests/integration/test_fits_on_ray.py."""

from __future__ import annotations

from typing import Any

import pytest

from cpift.cluster import fits
from cpift.config.run import ResourcesConfig
from cpift.errors import CpiftError

NODE = {"CPU": 4.0, "GPU": 0.0}
FULL = {"CPU": 0.5}


def waited(monkeypatch: pytest.MonkeyPatch, free: list[dict[str, float]], **need: Any) -> tuple[int, list[str]]:
    """How many fit at last, and what was said, on a cluster that has this free at one look after the other."""
    looks, clock, said = iter(free), iter(range(0, 1000, 2)), []
    monkeypatch.setattr(fits, "alive_nodes", lambda: [{"Resources": NODE}])
    monkeypatch.setattr(fits, "free_resources", lambda: [next(looks)])
    monkeypatch.setattr(fits.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(fits.time, "sleep", lambda seconds: None)
    room = fits.wait_for_room(ResourcesConfig(**need), "probe a", lambda message: said.append(message["waiting"]))
    return room, said


def test_as_many_start_as_others_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started = ["waiting for the first worker to start"]
    assert waited(monkeypatch, [NODE]) == (4, started)
    assert waited(monkeypatch, [{"CPU": 2.5}]) == (2, started)
    assert waited(monkeypatch, [NODE], parallel=3) == (3, started)


def test_a_full_cluster_is_waited_for_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    room, said = waited(monkeypatch, [FULL, {}, FULL, FULL, {"CPU": 1.0}])
    assert room == 1
    assert said == [
        "waiting for room for a worker (1 CPUs, 0 GPUs): the work of others fills the cluster",
        "waiting for the first worker to start",
    ]
    room, said = waited(monkeypatch, [FULL, NODE])  # what was just given back is not the work of others
    assert (room, len(said)) == (4, 1)


def test_what_no_empty_cluster_has_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CpiftError, match="probe a: its workers do not fit the cluster even when nothing else runs"):
        waited(monkeypatch, [], cpus_per_worker=5)

"""Models in the memory of Ray actors: whether they stay there, and that what these make is what one process makes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from cpift.cluster.resident import choosing
from cpift.cluster.resident.actors import Actors
from cpift.cluster.resident.choosing import _choice
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.merging.base import FusionInputs
from cpift.merging.in_memory import MergeInMemory
from cpift.merging.methods.cpift import Fusion
from cpift.merging.resident.engine import asking
from cpift.merging.resident.residents import GPUS, MAPPED, OWN_COPIES, Residents, Room
from cpift.method.regions import Streaming, write_regions
from cpift.pipeline.stages.handover import Kept
from tests.helpers.as_gpu import as_gpu, without_gpu
from tests.helpers.checkpoints import Models, make_moved, make_sharded

ROOM = 1 << 30
KERNELS = ExitStack()  # of a process with a GPU


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_sharded(tmp_path_factory.mktemp("models"))


# ---- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, namespace="cpift", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


class Killing:
    """An actor that is killed right after it was asked for the n-th time."""

    def __init__(self, ask: Any, at: tuple[int, ...]):
        self._ask, self._at, self._calls, self.killed = ask, at, 0, set[int]()

    def __call__(self, *asked: Any) -> Callable[[], Any]:
        self._calls += 1
        if self._calls not in self._at:
            answer: Callable[[], Any] = self._ask(*asked)
            return answer
        process = ray.get(self._ask._actor.__ray_call__.remote(lambda actor: os.getpid()))
        answer = self._ask(*asked)
        os.kill(process, signal.SIGKILL)
        self.killed.add(process)
        return answer


def outcome(models: Models, out: Path, merging: Any = None) -> Any:
    """Bytes of the regions, and what a merge's files would be."""
    base, tuned = models
    out.mkdir()
    streaming = Streaming(1 << 24, select=merging.select, mark=_refused) if merging else Streaming(1 << 24)
    write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: out}, streaming)
    method = Fusion(FusionInputs(base, base, tuned, out, list(tuned)), FusionConfig(omega=0.3))
    place = merging.placing(method) if merging else None
    _, record = MergeInMemory(method, place, base, 1 << 20, checked=True).make()
    masks = {path.name: path.read_bytes() for path in out.iterdir()}
    return masks, dict(record.files), list(record.tensors)


def _refused(*arguments: Any) -> Any:
    raise AssertionError("marked elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 3])
def test_whoever_is_killed_bytes_are_those_of_one_process(
    width: int, two_gpus: None, models: Models, tmp_path: Path
) -> None:
    """One of them twice: in the middle of a selection, and of a merge."""
    there = Actors(width, OWN_COPIES, ROOM, {}, 1)
    assert there.there(60)
    killed = Killing(there.holders.asks[-1], (7, 24) if width == 3 else ())
    there.holders.asks[-1] = killed
    try:
        assert outcome(models, tmp_path / "there", asking(None, there.holders)) == outcome(models, tmp_path / "here")
        assert killed._calls > 24
        assert len(killed.killed) == (2 if width == 3 else 0)
        assert there.lost() == 0
    finally:
        there.close()


def stand_in(room: Room, limit: int, number: int, width: int) -> Residents:
    """What a process that Ray gave a GPU holds models in."""
    from cpift_kernels import placement_of

    assert len(ray.get_runtime_context().get_accelerator_ids()["GPU"]) == 1
    KERNELS.enter_context(as_gpu())
    return Residents([partial(placement_of, without_gpu())], limit, room, number, width)


@pytest.mark.slow
def test_on_a_gpu_that_ray_gives_and_after_it_is_lost_for_good(two_gpus: None, tmp_path: Path) -> None:
    small = make_moved(tmp_path)
    there = Actors(1, GPUS, ROOM, {"num_gpus": 1}, 1, stand_in)
    try:
        wanted = outcome(small, tmp_path / "here")
        assert outcome(small, tmp_path / "there", asking(None, there.holders)) == wanted
        ray.kill(there.holders.asks[0]._actor)  # type: ignore[attr-defined]  # it is asked through Ray
        with pytest.raises(AssertionError, match="marked elsewhere"):
            outcome(small, tmp_path / "lost", asking(None, there.holders))
        assert there.lost() == 1
    finally:
        there.close()


# ---- whether, and where ----------------------------------------------------------------------------------------------


def nodes(monkeypatch: pytest.MonkeyPatch, count: int, memory: int = 0, gpus: int = 0, each: int | None = None) -> None:
    """The cluster has so many nodes; each: what a GPU has room for."""
    there = [{"Resources": {"GPU": gpus}} for _ in range(count)]
    monkeypatch.setattr(choosing, "alive_nodes", lambda: there)
    monkeypatch.setattr(choosing, "free_resources", lambda: [{"memory": memory}] * count)
    monkeypatch.setattr(choosing, "gpu_room", lambda seconds: each)


def kept(models: Models, **fields: Any) -> Kept:
    return replace(Kept(models=[models[0], *models[1].values()], tasks=3), **fields)


def test_on_a_cluster_the_nodes_hold_what_fits_them(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    known = kept(models)
    need = OWN_COPIES.needs(known.models, 3)
    roomy = ResourcesConfig(address="auto", memory_budget=need)
    nodes(monkeypatch, 3, memory=need)
    choice = _choice(known, roomy, 8, True)
    assert choice is not None
    assert (choice.count, choice.room) == (3, OWN_COPIES), "one on each node"
    assert choice.memory * 3 >= need
    assert choice.limit >= need
    tight = ResourcesConfig(address="auto", memory_budget=need // 5)
    choice = _choice(known, tight, 8, True)
    assert choice is not None
    assert choice.count == 6
    for resources, workers, memory, why in (
        (tight, 5, need, "in each of 5 processes"),
        (roomy, 8, 1 << 10, "in 3 processes, and the nodes have free memory for 0"),
    ):
        nodes(monkeypatch, 3, memory=memory)
        choice = _choice(known, resources, workers, True)
        assert choice is not None
        assert choice.count == 0
        assert choice.said.startswith("Models are read anew for every point: they would take")
        assert choice.said.endswith(why) or why in choice.said


def test_gpus_that_trials_leave_hold_what_one_cannot(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    known = kept(models, held=1, why="on the trials'")
    cuda = ResourcesConfig(device="cuda", gpus_per_worker=1)
    need, alone = GPUS.needs(known.models, 3), replace(GPUS, scored=True).needs(known.models, 3)
    assert alone > need
    for each, found in ((alone, None), (alone - 1, 1), (need - 1, 2), (need // 3 + 1, 3), (need // 4, 0), (None, None)):
        nodes(monkeypatch, 1, gpus=4, each=each)
        choice = _choice(known, cuda, 4, False)
        assert (choice and choice.count) == found
        if found:
            assert choice is not None
            assert (choice.room, choice.gpus) == (GPUS, True)
            assert choice.limit >= need
        if found == 0:
            assert choice is not None
            assert "4 GPUs, of which trials need 1, have room for" in choice.said


def test_mapped_files_are_nothing_to_hold_elsewhere(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes(monkeypatch, 1)
    assert _choice(kept(models), ResourcesConfig(), 4, True) is None
    assert _choice(kept(models, held=1 << 30), ResourcesConfig(), 4, False) is None
    assert _choice(Kept(why="said"), ResourcesConfig(), 4, False) is None
    need = MAPPED.needs(kept(models).models, 3)
    monkeypatch.setattr(choosing, "room_here", lambda: need)
    assert _choice(kept(models), ResourcesConfig(memory_budget=need), 4, True) is None, "nothing was computed"
    choice = _choice(kept(models), ResourcesConfig(memory_budget=-(-need // 3)), 4, False)
    assert choice is not None
    assert choice.count == 3
    monkeypatch.setattr(choosing, "room_here", lambda: need - 1)
    assert _choice(kept(models), ResourcesConfig(memory_budget=need), 4, False) is None

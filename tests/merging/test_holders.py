"""Models that several processes hold: masks and merged bytes are those of one process, whoever is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.errors import ChangedInput, CheckpointError
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.engine import Selects
from cpift.merging.in_memory import MergeInMemory
from cpift.merging.registry import method_named
from cpift.merging.resident.holders import Holders
from cpift.merging.resident.residents import MAPPED, OWN_COPIES, runs
from cpift.method.masks import MasksInMemory
from cpift.method.measures import Update
from cpift.method.regions import Streaming, write_regions
from tests.helpers.checkpoints import Models, make_moved, make_sharded, save_checkpoint
from tests.helpers.holders import Asked, holders, merging

WIDTHS = [2, *(pytest.param(width, marks=pytest.mark.slow) for width in (1, 5))]
OMEGAS = (0.3, 0.6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of odd sizes, in bf16, fp32 and fp16, with ties at every threshold and a tensor that is empty."""
    return make_sharded(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def regions(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folders = {p: tmp_path_factory.mktemp(f"regions-{p}") for p in (0.0, 0.05)}
    write_regions(*models, RegionsConfig(p=0.05), folders)
    return folders


def recipe(models: Models, regions: Path, known_as: str | None = None, **fields: Any) -> MergeInMemory:
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, regions, list(tuned)), FusionConfig(**fields)
    method = method_named(config.method).make(Materials(inputs, config, 0, lambda wanted: []))
    method.known_as = known_as
    return MergeInMemory(method, None, base, 1 << 20, checked=True)


def files(made: MergeInMemory, of: Holders | None = None) -> Any:
    """What the merged files would be, with the records of their tensors."""
    _, record = replace(made, place=merging(of).placing(made.method) if of else None).make()
    assert all(check["passed"] for check in record.checks)
    return dict(record.files), list(record.tensors)


def asked(of: Holders) -> list[Asked]:
    return [ask for ask in of.asks if isinstance(ask, Asked)]


@pytest.mark.parametrize("every", [0, 3], ids=["alive", "every third call is another's"])
@pytest.mark.parametrize("width", WIDTHS)
def test_masks_and_bytes_are_those_of_one_process(
    width: int, every: int, models: Models, regions: dict[float, Path], tmp_path: Path
) -> None:
    of = holders(width, every=every)
    there = merging(of)
    assert isinstance(there, Selects)
    assert not there.in_passing
    folders = {p: tmp_path / str(p) for p in regions}
    for folder in folders.values():
        folder.mkdir()
    write_regions(*models, RegionsConfig(p=0.05), folders, Streaming(1 << 24, select=there.select, mark=refused))
    for p, folder in regions.items():
        for path in folder.iterdir():
            assert (folders[p] / path.name).read_bytes() == path.read_bytes(), (p, path.name)
    for p in regions:
        for omega in OMEGAS:
            wanted = files(recipe(models, regions[p], omega=omega))
            assert files(recipe(models, regions[p], str(p), omega=omega), of) == wanted
    assert all(bool(ask.lost) == bool(every) for ask in asked(of) if ask.calls.total() > 3)
    assert sum(ask.calls["piece"] for ask in asked(of)) > 0


def refused(*arguments: Any) -> Any:
    raise AssertionError("marked elsewhere")


def test_each_has_its_own_tensors_once(models: Models, regions: dict[float, Path]) -> None:
    """Whether regions or merged tensors were asked for."""
    of, base = holders(3), models[0]
    masks = MasksInMemory(3, 1, [base.tensors[name].numel for name in base.names])
    assert merging(of).select(Update([base, *models[1].values()], base.names), [5], masks, 1 << 24) is not None
    files(recipe(models, regions[0.05]), of)
    parts = runs(base.tensors, base.names, 3)
    for ask, (first, last) in zip(asked(of), parts, strict=True):
        (shard,) = ask.residents._shards
        held = {name for tensors in shard._held.values() for name in tensors}
        assert held == {name for name in base.names[first:last] if base.tensors[name].numel}
    one = base.names[parts[1][0]]
    assert [first < last for first, last in runs(base.tensors, [one], 3)] == [False, True, False]


@pytest.mark.parametrize("last", [1, 4, 9, 20])
def test_where_one_is_lost_for_good_it_is_done_without(
    last: int, models: Models, regions: dict[float, Path], tmp_path: Path
) -> None:
    of = holders(2, last=last)
    streaming = Streaming(1 << 24, select=merging(of).select)
    write_regions(*models, RegionsConfig(p=0.05), {0.05: tmp_path}, streaming)
    for path in tmp_path.iterdir():
        assert (regions[0.05] / path.name).read_bytes() == path.read_bytes()
    wanted = files(recipe(models, regions[0.05]))
    assert files(recipe(models, regions[0.05]), holders(2, last=last)) == wanted


def test_models_without_room_are_read_anew(models: Models, regions: dict[float, Path]) -> None:
    made = recipe(models, regions[0.05])
    need = OWN_COPIES.needs(made.method.models, len(made.method.tuned))
    assert MAPPED.needs(made.method.models, 3) < need
    small = holders(2, limit=need - 1)
    assert small.placed(made.method) is None
    assert files(made, small) == files(made)
    assert not any(ask.calls for ask in asked(small))
    fits = holders(2, limit=need)
    files(made, fits)
    assert sum(ask.calls["piece"] for ask in asked(fits)) > 0


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    base, tuned = make_moved(tmp_path)
    of, folder = holders(2), tmp_path / "regions"
    folder.mkdir()
    write_regions(base, tuned, RegionsConfig(p=0.1), {0.1: folder})
    before = files(recipe((base, tuned), folder, "a"), of)
    save_checkpoint(tmp_path / "x", {n: tuned["x"].tensor(n) * 2 for n in base.names})
    with pytest.raises(ChangedInput):
        files(recipe((base, tuned), folder, "a"), of)
    again = Checkpoint(tmp_path / "base"), {task: Checkpoint(tmp_path / task) for task in tuned}
    after = files(recipe(again, folder, "a"), of)
    assert after == files(recipe(again, folder)) != before


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    base, tuned = make_moved(tmp_path)
    values = {name: tuned["x"].tensor(name) for name in base.names}
    name = max(base.names, key=lambda name: base.tensors[name].numel)
    values[name].view(-1)[0] = torch.nan
    save_checkpoint(tmp_path / "x", values)
    again = {task: Checkpoint(tmp_path / task) for task in tuned}
    (tmp_path / "out").mkdir()
    streaming = Streaming(select=merging(holders(2)).select, mark=refused)
    with pytest.raises(CheckpointError, match=name):
        write_regions(base, again, RegionsConfig(p=0.1), {0.1: tmp_path / "out"}, streaming)


def test_what_was_ended_is_kept_no_longer(models: Models, regions: dict[float, Path]) -> None:
    """And a caller that was lost ends nothing, so the oldest of many goes."""
    of = holders(1)
    (ask,) = asked(of)
    files(recipe(models, regions[0.05]), of)
    assert not ask._holder._merges
    placed = [of.placed(recipe(models, regions[0.05]).method) for _ in range(12)]
    for one in placed:
        assert one is not None
        one.tensor(models[0].tensors[models[0].names[0]])
    assert len(ask._holder._merges) == 8

"""Core regions by curvature, (θi − θ0)²·vi, and files of second moments that are none."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpift_kernels import unpack_mask
from safetensors.torch import load_file, save_file

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import MOMENTS
from cpift.config.loading import load_config, with_fields
from cpift.config.run import RegionsConfig, RunConfig
from cpift.console.view import quiet
from cpift.disk.checksums import file_checksum
from cpift.disk.files import read_json
from cpift.errors import CheckpointError, ConfigError
from cpift.merging.planning import given_notes
from cpift.method.masks import read_summary
from cpift.method.measures import Curvature, curvature_in_fp64
from cpift.method.moments import Moments, open_moments
from cpift.method.regions import RegionSummary, Streaming, core_size, parameter_space, select_regions
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.stages.inputs import INPUTS_RECORD
from cpift.sweep.points import check_points
from cpift.text.units import show_size
from tests.helpers.checkpoints import Models, large, random_tensors, save_checkpoint
from tests.helpers.merges import config_file, make_models
from tests.helpers.sweeps import load
from tests.helpers.toys import make_toy
from tests.helpers.ways_to_merge import write_moments

CURVATURE = RegionsConfig(p=0.1, measure="curvature")


def moments_file(folder: Path, base: Checkpoint, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    file = write_moments(folder, base, seed)
    save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file)
    return file


def models(tmp_path: Path, dtype: torch.dtype, moments_dtype: torch.dtype) -> tuple[Models, dict[str, Checkpoint]]:
    origin = random_tensors(0, dtype)
    base, tuned = Checkpoint(save_checkpoint(tmp_path / "base", origin)), {}
    for task in range(3):
        step = random_tensors(task + 1, dtype, scale=0.05)
        moved = {n: origin[n] + step[n] if origin[n].is_floating_point() else origin[n] for n in origin}
        tuned[f"t{task}"] = Checkpoint(save_checkpoint(tmp_path / f"t{task}", moved))
    files = {task: moments_file(tmp_path / f"v-{task}", base, n, moments_dtype) for n, task in enumerate(tuned)}
    return (base, tuned), open_moments(files, base)


def vector(model: Checkpoint, names: tuple[str, ...]) -> np.ndarray:
    return torch.cat([model.tensor(name).float().flatten() for name in names]).numpy()


@pytest.mark.parametrize("moments_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_elements_of_largest_curvature_are_the_core(
    tmp_path: Path, dtype: torch.dtype, moments_dtype: torch.dtype
) -> None:
    (base, tuned), moments = models(tmp_path, dtype, moments_dtype)
    before = {file: file.read_bytes() for file in tmp_path.glob("*/*.safetensors")}
    names = parameter_space(base, CURVATURE)
    for task, region in select_regions(base, tuned, CURVATURE, Streaming(moments=moments)).items():
        origin, values, v = (vector(model, names) for model in (base, tuned[task], moments[task]))
        scores = curvature_in_fp64(origin, values, v)
        chosen = np.concatenate([unpack_mask(w, base.tensors[n].numel).numpy() for n, w in region.words.items()])
        count = core_size(0.1, len(scores))
        assert chosen.sum() == region.summary.count == count
        # What the definition has clearly above its own threshold is chosen, what it has clearly below is not.
        threshold = np.sort(scores)[-count]
        assert chosen[scores > threshold * (1 + 1e-5)].all()
        assert not chosen[scores < threshold * (1 - 1e-5)].any()
        assert region.summary.threshold == pytest.approx(np.sqrt(threshold), rel=1e-5)
        # As float32 has it, ties and all, bit for bit.
        rounded = np.abs((values - origin) * np.sqrt(v))
        expected = np.zeros(len(rounded), bool)
        expected[np.argsort(-rounded, kind="stable")[:count]] = True
        assert np.array_equal(chosen, expected & (rounded > 0))
    assert {file: file.read_bytes() for file in before} == before


def test_small_updates_of_small_moments_do_not_vanish(tmp_path: Path) -> None:
    """Δ² · v is below everything that float32 holds, and its order is kept."""
    base = Checkpoint(save_checkpoint(tmp_path / "base", {"w": torch.zeros(64)}))
    steps = torch.arange(1, 65).flip(0).float() * 1e-20
    tuned = {"t": Checkpoint(save_checkpoint(tmp_path / "t", {"w": steps}))}
    save_file({"w": torch.full((64,), 1e-30)}, tmp_path / "v.safetensors")
    moments = open_moments({"t": tmp_path / "v.safetensors"}, base)
    words = select_regions(base, tuned, CURVATURE, Streaming(moments=moments))["t"].words["w"]
    assert unpack_mask(words, 64).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_cut_of_the_work_and_pickling_change_nothing(tmp_path: Path) -> None:
    origin = large(0, torch.float32)
    base = Checkpoint(save_checkpoint(tmp_path / "base", origin))
    moved = {name: values + 0.1 * large(1, torch.float32)[name] for name, values in origin.items()}
    tuned = {"t": Checkpoint(save_checkpoint(tmp_path / "t", moved))}
    moments = open_moments({"t": moments_file(tmp_path / "v", base, 5)}, base)
    sent = pickle.loads(pickle.dumps(moments))
    found = [
        select_regions(base, tuned, CURVATURE, Streaming(budget=budget, moments=of))["t"]
        for budget, of in ((1 << 30, moments), (1 << 20, sent))
    ]
    assert found[0].summary == found[1].summary
    assert all(torch.equal(words, found[1].words[name]) for name, words in found[0].words.items())


def changed(file: Path, values: Mapping[str, torch.Tensor | None]) -> Path:
    tensors = load_file(file)
    for name, value in values.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_moments_that_are_no_squares_are_named(tmp_path: Path, value: float) -> None:
    (base, tuned), moments = models(tmp_path, torch.float32, torch.float32)
    bad = load_file(tmp_path / "v-t1" / MOMENTS)["cube"]
    bad[1, 2, 3] = value
    changed(tmp_path / "v-t1" / MOMENTS, {"cube": bad})
    moments = open_moments({task: tmp_path / f"v-{task}" / MOMENTS for task in moments}, base)
    with pytest.raises(CheckpointError, match="moments of t1: cube: holds NaN, Inf or values below 0") as raised:
        select_regions(base, tuned, CURVATURE, Streaming(moments=moments))
    assert "t0" not in str(raised.value)


def test_a_model_that_is_not_finite_is_named_and_not_its_moments(tmp_path: Path) -> None:
    (base, tuned), moments = models(tmp_path, torch.float32, torch.bfloat16)
    broken = load_file(tmp_path / "base" / "model.safetensors")
    broken["bias"][0] = float("inf")
    base = Checkpoint(save_checkpoint(tmp_path / "base", broken))
    with pytest.raises(CheckpointError, match="pretrained: bias: holds NaN or Inf"):
        select_regions(base, tuned, CURVATURE, Streaming(moments=moments))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("cube", None, "cube: is not there, and θ0 has it"),
        ("more", torch.ones(3), "more: is there, and no weight of θ0"),
        ("cube", torch.ones(2, 3), r"cube: has shape \[2, 3\], in θ0 \[2, 3, 5\]"),
        ("cube", torch.ones(2, 3, 5, dtype=torch.int32), "cube: is not there"),
        ("cube", torch.ones(2, 3, 5, dtype=torch.float64), "cube: is float64"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, value: torch.Tensor | None, why: str) -> None:
    base = Checkpoint(save_checkpoint(tmp_path / "base", random_tensors(0)))
    file = changed(moments_file(tmp_path / "v", base, 0), {name: value})
    with pytest.raises(CheckpointError, match=f"t0: {why}"):
        open_moments({"t0": file}, base)


def test_no_file_and_half_a_file_are_refused(tmp_path: Path) -> None:
    base = Checkpoint(save_checkpoint(tmp_path / "base", random_tensors(0)))
    with pytest.raises(CheckpointError, match="is no file in"):
        Moments(tmp_path / "none.safetensors", base)
    file = moments_file(tmp_path / "v", base, 0)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Moments(file, base)


def test_tasks_without_moments_are_named(tmp_path: Path) -> None:
    (base, tuned), moments = models(tmp_path, torch.float32, torch.bfloat16)
    del moments["t1"]
    with pytest.raises(CheckpointError, match="t1: has no second moments"):
        select_regions(base, tuned, CURVATURE, Streaming(moments=moments))
    assert Curvature.needs_moments


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """θ0 and two fine-tunes, one with moments in its folder, one with moments elsewhere."""
    root = make_models(tmp_path_factory.mktemp("given"))
    for number, name in enumerate(("one", "elsewhere")):
        write_moments(root / name, Checkpoint(root / "base"), number)
    return root


def curved(tmp_path: Path, given: Path, **changes: object) -> RunConfig:
    tasks: list[dict[str, object]] = [
        {"name": name, "checkpoint": {"path": str(given / name)}} for name in ("one", "two")
    ]
    tasks[1]["moments"] = str(given / "elsewhere" / MOMENTS)
    fields: dict[str, object] = {"tasks": tasks, "regions": {"p": 0.1, "measure": "curvature"}}
    return load_config(config_file(tmp_path, given, **(fields | changes)))


def recorded(folder: Path) -> dict[str, str]:
    """The checksums of second moments that a record of inputs has, by label."""
    record = read_json(folder / INPUTS_RECORD)
    return {label: one["files"][MOMENTS]["xxh3_128"] for label, one in record.items() if label.startswith("moments")}


def test_given_checkpoints_are_fused_by_curvature(given: Path, tmp_path: Path) -> None:
    config = curved(tmp_path, given)
    preflight(config, stage="fuse")
    run = Pipeline(config, InProcessEngine(), quiet())
    regions = run.regions()
    assert {"moments one", "moments two"} <= regions.inputs.keys()
    run.fuse()
    files = {"one": given / "one" / MOMENTS, "two": given / "elsewhere" / MOMENTS}
    assert recorded(regions.path) == {f"moments {task}": file_checksum(file) for task, file in files.items()}
    base = given / "base"
    cores = cpift.regions(
        base, {n: given / n for n in files}, p=0.1, measure="curvature", moments={"two": files["two"]}
    )
    for task, core in cores.items():
        assert core.summary == RegionSummary(**read_summary(regions.path)["regions"][task])
    plainly = StageArtifacts(curved(tmp_path, given, regions={"p": 0.1}))
    assert not any(name.startswith("moments") for name in plainly.regions.inputs), "what is not read names nothing"
    os.utime(files["two"], ns=(1, 1))
    assert StageArtifacts(config).regions.fingerprint != regions.fingerprint, "another file gets another name"


def test_given_checkpoints_are_averaged_by_their_moments(given: Path, tmp_path: Path) -> None:
    moments = {"two": given / "elsewhere" / MOMENTS}
    models = {name: given / name for name in ("one", "two")}
    made = cpift.merge(given / "base", models, tmp_path / "out", method="fisher", moments=moments)
    assert all(check["passed"] for check in made.checks)
    files = {"one": given / "one" / MOMENTS, **moments}
    assert recorded(made.path) == {f"moments {task}": file_checksum(file) for task, file in files.items()}
    assert cpift.merge(given / "base", models, tmp_path / "out", method="fisher", moments=moments).cached
    moments = {"two": given / "one" / MOMENTS}
    with pytest.raises(ConfigError, match="holds another merge"):
        cpift.merge(given / "base", models, tmp_path / "out", method="fisher", moments=moments)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"method": "fisher"},
            r"tasks\.two\.moments: there is no .*moments\.safetensors, and fusion\.method f",
        ),
        ({"measure": "curvature"}, r"tasks\.two\.moments: there is no .*, and regions\.measure curvature reads it"),
        ({"method": "linear", "moments": {"two": "x"}}, "moments: are read by nothing that is asked for"),
        ({"method": "fisher", "moments": {"three": "x"}}, "moments: three: is no model → one of one, two"),
        ({"method": "fisher", "moments": {"two": "x"}}, r"tasks\.1\.moments: there is no such file or folder"),
        (
            {"method": "fisher", "moments": {"two": "FOLDER"}},
            r"tasks\.two\.moments: .* is a folder, and fusion\.method fisher",
        ),
        ({"method": "fisher", "moments": {"two": 3}}, "moments: are no files by the name of a model"),
        ({"method": "fisher", "moments": {"two": "BASE"}}, r"tasks\.two\.moments: .*: is there, and no weight of θ0"),
        ({"method": "fisher", "vocabulary": "base", "moments": {"two": "V"}}, "fusion.vocabulary: makes other tensors"),
    ],
)
def test_what_is_wrong_with_moments_is_told_first(
    given: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    toy = make_toy(tmp_path / "toy", 0)
    places = {
        "BASE": str(write_moments(toy, Checkpoint(toy), 0)),
        "FOLDER": str(toy),
        "V": str(given / "elsewhere" / MOMENTS),
    }
    if "moments" in fields:
        fields = fields | {"moments": {task: places.get(file, file) for task, file in fields["moments"].items()}}
    with pytest.raises(ConfigError, match=said):
        cpift.merge(given / "base", {name: given / name for name in ("one", "two")}, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_moments_that_are_read(given: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (given / "one" / MOMENTS, given / "elsewhere" / MOMENTS))

    def said(**fields: object) -> str:
        (costs,) = (note for note in given_notes(curved(tmp_path, given, **fields)) if note.startswith("Reads "))
        return costs

    counted = f"and {show_size(size)} of second moments"
    assert f"{counted} twice, " in said()
    assert f"{counted} twice, " in said(fusion={"method": "fisher"})
    assert f"{counted} once, " in said(resources={"verify": False})
    assert counted not in said(regions={"p": 0.1})


@pytest.mark.parametrize("fields", [{"method": "fisher"}, {"measure": "curvature"}])
def test_moments_that_are_refused_when_they_are_read_leave_nothing(
    given: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    values = load_file(given / "one" / MOMENTS)
    save_file(values | {(last := list(values)[-1]): -values[last] - 1}, tmp_path / MOMENTS)
    moments = {"one": tmp_path / MOMENTS, "two": given / "elsewhere" / MOMENTS}
    models = {name: given / name for name in moments}
    with pytest.raises(CheckpointError, match=f"{last}: holds NaN, Inf or values below 0"):
        cpift.merge(given / "base", models, tmp_path / "out", moments=moments, **fields)
    assert [path.name for path in tmp_path.iterdir()] == [MOMENTS]


def test_probes_that_keep_none_are_told_first(smoke_config: Path) -> None:
    config = load_config(smoke_config, changes={"regions.measure": "curvature"})
    with pytest.raises(ConfigError, match=r"probe\.keep_moments: is false, and regions\.measure curvature"):
        preflight(config, stage="run")
    preflight(config, stage="probe")
    preflight(with_fields(config, {"probe.keep_moments": True}, "it"), stage="run")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"regions.measure": ["update", "curvature"]}, r"reads second moments \(at regions\.measure curvature\)"),
        ({"fusion.method": ["linear", "fisher"]}, r"reads second moments \(at fusion\.method fisher\)"),
        ({"backbone.source": ["staged", "/nowhere"]}, r"'/nowhere' is no folder and no hub id"),
    ],
)
def test_points_of_a_sweep_are_told_first(tmp_path: Path, space: dict[str, Any], said: str) -> None:
    sweep = load(tmp_path, space=space)
    preflight(sweep.base, stage="sweep final")
    with pytest.raises(ConfigError, match=said):
        check_points(sweep, "sweep final")
    if "moments" in said:
        check_points(load(tmp_path, space=space, fixed={"probe.keep_moments": True}), "sweep final")


def test_state_dicts_have_none() -> None:
    model = {"w": torch.ones(4)}
    for fields in ({"method": "fisher"}, {"measure": "curvature"}):
        with pytest.raises(ConfigError, match="reads second moments, and a state dict has none"):
            cpift.merge_state_dicts(model, {"a": model, "b": model}, **fields)  # type: ignore[arg-type]

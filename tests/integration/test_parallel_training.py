"""Two workers train as one does: DDP and FSDP2 (gloo), with frozen cores, killed and resumed."""

from __future__ import annotations

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import MOMENTS
from cpift.config.loading import load_config
from cpift.config.resources import Strategy
from cpift.config.run import DataSource, RegionsConfig, ResourcesConfig, RunConfig
from cpift.method.regions import save_regions, select_regions
from cpift.models.sources import materialise
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import FitSpec, StageSpec
from tests.helpers.fits import fit_spec, weights

pytestmark = pytest.mark.slow

STRATEGIES: dict[str, tuple[Strategy, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, bf16": ("fsdp", {"gather": "bfloat16", "precision": "bfloat16"}),
}
EXACT = ("ddp", "fsdp")  # but for the order of sums
# Two workers sum a batch in another order than one, and AdamW carries that on (measured: 2e-6 after 80 steps).
TOLERANCE = 1e-4


def spec(config: RunConfig, base: Path, out: Path, batch: int, accumulate: int = 1, **more: Any) -> FitSpec:
    """The smoke config's first probe, then a second stage in which its core is frozen; 8 examples a step."""
    changes = {
        "steps": 16,
        "batch_size": batch,
        "gradient_accumulation": accumulate,
        "checkpoint_every": 6,
        "log_every": 1,
        "precision": "float32",  # bf16 products would drown the sums' order
        "evaluate_every": 4,
        "keep": "best",
        "ema": 0.9,
    }
    stages = (StageSpec(("addition",)), StageSpec(("spelling",), frozen=("addition",)))
    training = config.probe_training.model_copy(update=changes | more)
    held = DataSource(procedural="echo", size=9)  # which two workers cannot share out evenly
    tasks = tuple(task.model_copy(update={"validation": held}) for task in config.tasks)
    return fit_spec(base, out, tasks, stages, training, regions=base.parent / "regions", keep_moments=True)


class _Killed(Exception):
    pass


def work(rank: int, folder: str, config: RunConfig) -> None:
    """One of two workers: each strategy once undisturbed, once stopped at a checkpoint of stage 1 and resumed."""
    gc.freeze()  # see conftest.py
    out = Path(folder)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2)
    barrier, main = torch.distributed.barrier, rank == 0
    kept: list[Path] = []

    def stop(checkpoint: Path, metrics: dict[str, Any]) -> None:
        barrier()
        if (metrics["stage"], metrics["step"]) == (1, 6):
            kept.append(checkpoint)
            raise _Killed

    for name, (strategy, more) in STRATEGIES.items():
        resources = ResourcesConfig(workers=2, strategy=strategy)
        undisturbed = replace(spec(config, out / "base", out / name, 2, 2, **more), resources=resources)
        hooks = FitHooks(on_checkpoint=lambda *_: barrier(), is_main=main)
        result = fit(undisturbed, hooks)
        if main:
            (out / f"{name}.json").write_text(json.dumps(result))
        broken = replace(spec(config, out / "base", out / f"{name} resumed", 2, 2, **more), resources=resources)
        with pytest.raises(_Killed):
            fit(broken, replace(hooks, on_checkpoint=stop))
        if main and strategy == "ddp":
            shutil.copytree(kept[0], out / "of two")
        fit(broken, replace(hooks, resume_from=kept.pop()))
        barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(smoke_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the fit of one process and those of two workers."""
    out = tmp_path_factory.mktemp("parallel")
    config = load_config(smoke_config, [])
    materialise(config.model, out / "base")
    alone = spec(config, out / "base", out / "one", 8)
    fit(replace(alone, stages=alone.stages[:1]))
    (out / "regions").mkdir()
    probes = {"addition": Checkpoint(alone.export)}
    save_regions(select_regions(Checkpoint(out / "base"), probes, RegionsConfig(p=0.2)), out / "regions")
    (out / "one.json").write_text(json.dumps(fit(spec(config, out / "base", out / "one", 8))))
    torch.multiprocessing.spawn(work, (str(out), config), nprocs=2)
    left = replace(spec(config, out / "base", out / "left", 2, 2), resources=ResourcesConfig(workers=2, min_workers=1))
    (out / "left.json").write_text(json.dumps(fit(left, FitHooks(resume_from=out / "of two"))))
    return out


def losses(folder: Path, name: str, field: str = "loss") -> torch.Tensor:
    return torch.tensor([entry[field] for entry in json.loads((folder / f"{name}.json").read_text())["log"]])


@pytest.mark.parametrize("strategy", [*EXACT, "left"])
def test_two_workers_have_the_loss_curve_of_one_process(folder: Path, strategy: str) -> None:
    """left: one of two that goes on alone from their checkpoint."""
    for field in ("loss", "grad_norm", "learning_rate"):
        one, two = losses(folder, "one", field), losses(folder, strategy, field)
        assert len(one) == 32
        torch.testing.assert_close(two, one, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", [*EXACT, "left"])
def test_two_workers_have_the_held_out_losses_of_one_process(folder: Path, strategy: str) -> None:
    one, two = (json.loads((folder / f"{name}.json").read_text())["held_out"] for name in ("one", strategy))
    assert [(row["stage"], row["step"]) for row in two] == [
        (stage, step) for stage in (0, 1) for step in (4, 8, 12, 16)
    ]
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(*(torch.tensor([row["loss"] for row in rows]) for rows in (two, one)), **close)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "left"])
def test_no_frozen_element_moves_on_either_worker(folder: Path, strategy: str) -> None:
    one, two = (json.loads((folder / f"{name}.json").read_text())["frozen"] for name in ("one", strategy))
    assert two == one
    assert two[0]["moved"] == 0 < two[0]["elements"]


def test_gathered_as_bf16_two_workers_learn_what_one_does(folder: Path) -> None:
    one, two = losses(folder, "one"), losses(folder, "fsdp, bf16")
    assert two[-1] < 0.9 * two[0]
    torch.testing.assert_close(two, one, rtol=0.02, atol=0.02)
    gathered = {name: json.loads((folder / f"{name}.json").read_text()).get("gathered") for name in STRATEGIES}
    assert gathered == {"ddp": None, "fsdp": "float32", "fsdp, bf16": "bfloat16"}


@pytest.mark.parametrize("strategy", EXACT)
def test_two_workers_keep_the_second_moments_of_one_process(folder: Path, strategy: str) -> None:
    """Of the last stage, gathered where they are shared out; resumed, the same bits."""
    one, two, resumed = (
        load_file(folder / name / "export" / MOMENTS) for name in ("one", strategy, f"{strategy} resumed")
    )
    shapes = {name: info.shape for name, info in Checkpoint(folder / "base").tensors.items()}
    assert {name: tuple(values.shape) for name, values in two.items()} == shapes
    for name, values in two.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, resumed[name])
        torch.testing.assert_close(values.float(), one[name].float(), rtol=0.02, atol=1e-9)
    assert sum(float(values.sum()) for values in one.values()) > 0
    records = [json.loads((folder / f"{name}.json").read_text())["moments"] for name in ("one", strategy)]
    assert records == [{"beta2": 0.999, "steps": 16}] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_workers_end_with_the_same_bits(folder: Path, strategy: str) -> None:
    wanted, got = (weights(folder / name / "export") for name in (strategy, f"{strategy} resumed"))
    assert got == wanted

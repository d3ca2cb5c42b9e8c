"""What one run reads of its models, and what it would spare if they stayed in memory.

    python -m benchmarks.merging.reads --output FOLDER

The smoke run, whose fine-tunes are trained first, and a Llama of 50M parameters in bf16 with three fine-tunes that are
noise. `disk`: bytes that the system read from the disk in a stage, over those that all models have; before `regions`
and before `fuse alone` their files were dropped from the page cache, before `fuse` they were as regions left them.
`cpu`: processor seconds of regions and of a merge in memory; `staying`: the same from models that stay, each the second
time. Appends a row each to results/reads.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.record import append
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config
from cpift.config.run import ModelConfig, RunConfig
from cpift.console.view import quiet
from cpift.merging.base import FusionInputs
from cpift.merging.in_memory import MergeInMemory
from cpift.merging.methods.cpift import Fusion
from cpift.merging.resident.engine import ResidentMerging
from cpift.merging.resident.residents import Residents
from cpift.method.regions import Streaming, select_regions
from cpift.models.sources import materialise
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline

SIZE = ScratchModel(hidden_size=512, intermediate_size=2048, layers=12, heads=8)
TASKS = ("a", "b", "c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output.absolute()
    torch.set_num_threads(1)
    smoke = load_config(Path("configs/smoke.yaml"), ["backbone.source=pretrained"])
    rows = [measured(smoke.model_copy(update={"output": output / "smoke"})), measured(scratch_run(output))]
    print(*rows, sep="\n")
    append("reads", rows)


def scratch_run(folder: Path) -> RunConfig:
    """A run over θ0 and fine-tunes that are there."""
    if not (folder / "base").exists():
        materialise(ModelConfig(scratch=SIZE, dtype="bfloat16"), folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    for seed, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(folder / "base", folder / task, dirs_exist_ok=True)
        moved = {
            name: (x.float() + 1e-3 * torch.randn(x.shape, generator=generator)).bfloat16() for name, x in base.items()
        }
        save_file(moved, folder / task / "model.safetensors", metadata={"format": "pt"})
    fields: dict[str, Any] = {
        "name": "scratch",
        "output": str(folder / "scratch"),
        "model": {"path": str(folder / "base")},
        "tasks": [{"name": task, "checkpoint": {"path": str(folder / task)}} for task in TASKS],
        "backbone": {"source": "pretrained"},
    }
    (folder / "scratch.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    return load_config(folder / "scratch.yaml")


def measured(config: RunConfig) -> dict[str, Any]:
    run = Pipeline(config, InProcessEngine(), quiet())
    folders = {"base": run.pretrained().path} | {task: probed.path for task, probed in run.probe().items()}
    opened = {name: Checkpoint(folder) for name, folder in folders.items()}
    has = sum(info.nbytes for model in opened.values() for info in model.tensors.values())
    files = [file for model in opened.values() for file in model.files]
    disk = {}
    for stage, cold in (("regions", True), ("fuse", False), ("fuse alone", True)):
        made = run.artifacts.fuse(run.known().groups or (), run.pretrained())
        shutil.rmtree(made.path, ignore_errors=True)
        if stage == "regions":
            shutil.rmtree(run.artifacts.regions.path, ignore_errors=True)
        if cold:
            dropped(files)
        before = from_disk()
        run.regions() if stage == "regions" else run.fuse()
        disk[stage] = round((from_disk() - before) / has, 3)
    base, tuned = opened["base"], {task: model for task, model in opened.items() if task != "base"}
    residents = Residents([None], 1 << 40)
    kept = ResidentMerging(None, lambda on_gpu: residents)
    cpu = {name: times_of(config, base, tuned, run, merging) for name, merging in (("cpu", None), ("staying", kept))}
    return {"run": config.name, "parameters": base.numel, "models": len(opened), "bytes": has, "disk": disk} | cpu


def times_of(
    config: RunConfig, base: Checkpoint, tuned: dict[str, Checkpoint], run: Pipeline, merging: ResidentMerging | None
) -> dict[str, float]:
    """Processor seconds, the second time."""
    found: dict[str, float] = {}
    inputs = FusionInputs(base, base, tuned, run.regions().path, list(tuned))
    for _ in range(2):
        started = time.process_time()
        select_regions(base, tuned, config.regions, Streaming(select=merging.select if merging else None))
        found["regions"] = round(time.process_time() - started, 3)
        method = Fusion(inputs, config.fusion)
        started = time.process_time()
        MergeInMemory(method, merging.placing(method) if merging else None, base, 1 << 30, checked=False).make()
        found["merge"] = round(time.process_time() - started, 3)
    return found


def dropped(files: Sequence[Path]) -> None:
    """Their pages are no longer in memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_disk() -> int:
    """Bytes that were read from a disk for this process."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    main()

"""Fuse the same checkpoints in one process, by 2 and by 4 Ray workers on as many nodes, and while workers are killed.

    python -m benchmarks.kills.fusion --work FOLDER                     # makes base and t1..t4 of 1.2B (12.4 GB) there
    python -m benchmarks.kills.fusion --work FOLDER --models FOLDER     # or uses base and t1..t4 of that folder

Every run is `cpift fuse` with regions and fusion. With workers, the cluster is a head without processors and a node (a
raylet) of one processor for every worker, all on this machine. `killed`: during regions, and again after a shard has
been finished, the process that runs the task is killed by SIGKILL. Every run has to give the sha256 of one process for
every shard and every mask. Times are of a machine whose nodes share two cores: they tell nothing of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kills.processes import command_line, descendants
from benchmarks.merging.speed import SHAPES, make_checkpoint
from benchmarks.record import append
from cpift.disk.files import file_sha256

TASK = {"regions": "ray::_mark", "fusion": "ray::_merge"}
STORE = 128 << 20  # bytes of each node's object store, through which only brackets and records pass
DEADLINE = 900.0  # seconds for one run
Kill = Callable[[str], str | None]  # kills what works in a stage and says what it was; None if nothing works there


def config(folder: Path, models: Path, tasks: list[str], shard_size: str) -> Path:
    raw = {
        "name": "kill-fusion",
        "model": {"path": str(models / "base")},
        "tasks": [{"name": name, "checkpoint": {"path": str(models / name)}} for name in tasks],
        "regions": {"p": 0.01},
        "backbone": {"source": "pretrained"},
        "fusion": {"shard_size": shard_size},
        "resources": {"verify": False, "memory_budget": "512MiB"},
    }
    path = folder / "kill-fusion.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@contextlib.contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """The address of a head without processors and a node for every worker."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "ray")}
    ray_cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": STORE})
    for _ in range(workers):
        ray_cluster.add_node(num_cpus=1, object_store_memory=STORE)
    try:
        yield ray_cluster.address
    finally:
        ray_cluster.shutdown()


def run(file: Path, out: Path, address: str | None, kill: Kill | None) -> dict[str, Any]:
    """One `cpift fuse` into `out`; `kill(stage)` is called until it has killed something in either stage."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "cpift.cli", "fuse", str(file), "--output", str(out)]
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
    killed: list[str] = []
    waiting = ["regions", "fusion"] if kill else []
    started = time.monotonic()
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            if time.monotonic() - started > DEADLINE:
                process.kill()
            if kill and waiting and ready(waiting[0], out) and (what := kill(waiting[0])):
                killed.append(f"{waiting.pop(0)}: {what}")
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{out.with_suffix('.log').read_text(encoding='utf-8')[-3000:]}")
    if waiting:
        raise RuntimeError(f"nothing was killed in {', '.join(waiting)}: the models are too small")
    return {"seconds": round(time.monotonic() - started, 1), "killed": killed}


def ready(stage: str, out: Path) -> bool:
    """Regions: at once. Fusion: as soon as a shard is finished, so that there is something to lose."""
    return stage == "regions" or any(out.glob(".work/*/shards/*.safetensors"))


def worker_below(root: int) -> Kill:
    """Kills one process that runs a task of a stage."""

    def kill(stage: str) -> str | None:
        pids = [pid for pid in descendants(root) if command_line(pid).startswith(TASK[stage])]
        if not pids:
            return None
        os.kill(pids[-1], signal.SIGKILL)
        return f"SIGKILL to {TASK[stage]}"

    return kill


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every shard and of every mask."""
    files = sorted([*out.glob("fuse/*/*.safetensors"), *out.glob("regions/*/*.safetensors")])
    return {f"{file.parts[-3]}/{file.name}": file_sha256(file) for file in files}


def experiment(name: str, file: Path, folder: Path) -> dict[str, Any]:
    workers = {"one process": 0, "2 workers": 2, "4 workers": 4, "killed": 2}[name]
    out = folder / "out"
    with contextlib.ExitStack() as held:
        address, kill = None, None
        if workers:
            address = held.enter_context(cluster(workers, folder))
            kill = worker_below(os.getpid()) if name == "killed" else None
        outcome = run(file, out, address, kill)
    kept = hashes(out)
    shutil.rmtree(out)
    together = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return {"run": name, "workers": workers} | outcome | {"sha256": together, "files": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["one process", "2 workers", "4 workers", "killed"])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for outputs and, without --models, checkpoints"
    )
    parser.add_argument("--models", type=Path, help="folder with base and t1..tN, only read")
    parser.add_argument("--size", choices=SHAPES, default="1.2B", help="of the checkpoints that are made")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--shard-size", default="200MB")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, keep none")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    models = (options.models or work / options.size).absolute()
    tasks = [f"t{i}" for i in range(1, options.tasks + 1)]
    if options.models is None:
        for seed, name in enumerate(("base", *tasks)):
            make_checkpoint(models / name, SHAPES[options.size], seed)
    file, rows = config(work, models, tasks, options.shard_size), []
    for name in options.runs:
        rows.append(experiment(name, file, work) | {"models": models.name, "tasks": options.tasks})
        row = rows[-1]
        print(
            f"{name}: {len(row['files'])} files, {row['sha256'][:16]}, {row['seconds']} s, {row['killed']}", flush=True
        )
        if not options.dry_run:
            append("kill_fusion", [row])
    if len({row["sha256"] for row in rows}) > 1:
        sys.exit("the files differ")


if __name__ == "__main__":
    main()

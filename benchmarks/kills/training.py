"""Kill parts of a run while it trains, again and again, and compare the model with an undisturbed run's.

    python -m benchmarks.kills.training                  # every kind; about twenty minutes on two idle cores
    python -m benchmarks.kills.training worker node      # some kinds

Each experiment runs `cpift probe` on one task of configs/smoke.yaml, with a checkpoint every 20 steps and a model large
enough for a step to take tens of milliseconds. After a checkpoint has appeared, and a random delay, it kills:

    worker       the training worker, by SIGKILL
    ddp, fsdp    one of two training workers
    controller   Ray Train's controller
    driver       `cpift` itself; the same command is then run again
    memory       what Ray's memory monitor chooses when the node runs out of memory (a process beside it fills it)
    limit        the worker's next allocations, by an address-space limit set from outside
    stop         nothing: the worker is stopped, and must be found to hang
    s3           the training worker, with its checkpoints in an object store (moto's server on loopback)
    node         the Ray node that the worker is on; another takes over
    elastic      the Ray node of one of two workers; the other goes on alone until a node joins

A command that ends with an error is run again, as a user would. One row an experiment in results/kills.jsonl: what was
killed and at which checkpoint, how often the command was run, and whether the SHA-256 of the model is the same. Where
another number of workers summed the gradients of some steps (elastic) it cannot be: there the row says which steps one
worker made alone, and how far any loss in its log is from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kills.disturbed import (
    CONTROLLER,
    DEADLINE,
    WORKER,
    Kill,
    Probe,
    fill_memory,
    kill_driver,
    limit_memory,
    set_threshold,
    sigkill,
    stop,
    wait_for_checkpoint,
)
from benchmarks.kills.object_store import BUCKET, object_store
from benchmarks.record import append

ROOT = Path(__file__).parents[2]
JOINED = "nothing: a node joined"


def config(folder: Path) -> Path:
    smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text(encoding="utf-8"))
    smoke["model"]["scratch"] |= {"hidden_size": 192, "intermediate_size": 384, "layers": 4}
    smoke["tasks"] = smoke["tasks"][:1]
    smoke["probe"] |= {"steps": 240, "checkpoint_every": 20, "batch_size": 16}
    smoke["resources"] = {"cpus_per_worker": 0.5, "threads_per_worker": 1, "max_failures": 10}
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(smoke), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Kind:
    kill: Kill
    kills: int
    like: str = "one"  # the undisturbed run that it is compared with
    changes: tuple[str, ...] = ()  # of the config


KINDS = {
    "worker": Kind(sigkill(WORKER), 4),
    "ddp": Kind(sigkill(WORKER), 3, "ddp"),
    "fsdp": Kind(sigkill(WORKER), 3, "fsdp"),
    "controller": Kind(sigkill(CONTROLLER), 3),
    "driver": Kind(kill_driver, 4),
    "memory": Kind(fill_memory, 3),
    "limit": Kind(limit_memory, 2, changes=("resources.hang_timeout=30",)),
    "stop": Kind(stop, 2, changes=("resources.hang_timeout=30",)),
    "s3": Kind(sigkill(WORKER), 2, changes=(f"resources.storage=s3://{BUCKET}/fits",)),
    "node": Kind(sigkill("never used: nodes are removed through the cluster"), 3),
    "elastic": Kind(sigkill("never used: nodes are removed through the cluster"), 2, "elastic"),
}
CHANGES = {
    "one": (),
    "ddp": ("resources.workers=2",),
    "fsdp": ("resources.workers=2", "resources.strategy=fsdp"),
    # Ray looks for nodes that joined once a minute: alone, 1200 steps take longer.
    "elastic": ("resources.workers=2", "resources.min_workers=1", "resources.cpus_per_worker=1", "probe.steps=1200"),
}


def disturb(probe: Probe, kind: Kind, rng: random.Random) -> list[dict[str, Any]]:
    """Run until the model is there, killing `kind.kills` times; what was killed, and after which checkpoint."""
    killed: list[dict[str, Any]] = []
    known: set[str] = set()
    while not probe.finished:
        if not probe.alive():
            if probe.starts > 3 + 2 * kind.kills:
                raise RuntimeError(f"ends with an error again and again; see {probe.output.with_suffix('.log')}")
            probe.start()
        if len(killed) >= kind.kills:
            assert probe.process is not None
            probe.process.wait(timeout=DEADLINE)
            continue
        if not wait_for_checkpoint(probe, known, rng):
            continue
        seen = probe.checkpoints()
        known |= set(seen)
        what = kind.kill(probe, rng)
        if what is not None:
            step = max((step for step in seen.values() if step is not None), default=0)
            killed.append({"what": what, "after_checkpoint_of_step": step})
            print(f"    {time.strftime('%H:%M:%S')} killed {what}, last checkpoint: step {step}", flush=True)
    if probe.process is not None:
        probe.process.wait(timeout=DEADLINE)
    return killed


@contextlib.contextmanager
def cluster(probe: Probe, *, at_once: bool = True) -> Iterator[Kill]:
    """A head without CPUs and two nodes of one each; the kill removes the node that a worker is on.

    at_once: another takes its place at once; else that is what the next kill does instead.
    """
    from ray.cluster_utils import Cluster

    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    probe.environment["RAY_ADDRESS"] = ray_cluster.address

    def kill(probe: Probe, rng: random.Random) -> str | None:
        if len(nodes) == 1:
            nodes.append(ray_cluster.add_node(num_cpus=1))
            return JOINED
        for node in nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if probe.processes(WORKER, root=raylet):
                nodes.remove(node)
                ray_cluster.remove_node(node, allow_graceful=False)
                if at_once:
                    nodes.append(ray_cluster.add_node(num_cpus=1))
                return "node of the worker"
        return None

    try:
        yield kill
    finally:
        ray_cluster.shutdown()


def experiment(name: str, kind: Kind, file: Path, folder: Path, undisturbed: Probe, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{name}/{seed}")
    probe = Probe(file, folder / name, CHANGES[kind.like] + kind.changes)
    started = time.time()
    if name == "memory":
        set_threshold(probe)
    if name in ("node", "elastic"):
        with cluster(probe, at_once=name == "node") as kill:
            killed = disturb(probe, Kind(kill, kind.kills), rng)
    elif name == "s3":
        with object_store() as probe.store:
            probe.environment |= probe.store.environment
            killed = disturb(probe, kind, rng)
    else:
        killed = disturb(probe, kind, rng)
    return {
        "kind": name,
        "kills": sum(one["what"] != JOINED for one in killed),
        "killed": killed,
        "commands": probe.starts,
        "seconds": round(time.time() - started, 1),
        "sha256": probe.digest(),
        **(elastic(probe, undisturbed) if name == "elastic" else same(probe, undisturbed)),
    }


def same(probe: Probe, undisturbed: Probe) -> dict[str, Any]:
    return {"same_as_undisturbed": probe.digest() == undisturbed.digest()}


def elastic(probe: Probe, undisturbed: Probe) -> dict[str, Any]:
    """What holds where the number of workers changed."""
    alone = probe.logged_steps(0) - probe.logged_steps(1)
    losses, wanted = probe.losses(), undisturbed.losses()
    assert losses.keys() == wanted.keys()
    apart = {step: abs(losses[step] / wanted[step] - 1) for step in wanted}
    worst, last = max(apart, key=lambda step: apart[step]), max(apart)
    return {
        "undisturbed_sha256": undisturbed.digest(),
        "logged_alone": [min(alone), max(alone), len(alone)] if alone else [],
        "steps": last,
        "worst_loss": {"step": worst, "apart": round(apart[worst], 6)},
        "last_loss": {"here": round(losses[last], 5), "undisturbed": round(wanted[last], 5)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--keep", type=Path, help="leave everything in this folder")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file, undisturbed = config(folder), {}
        for like in sorted({KINDS[name].like for name in options.kinds}):
            probe = Probe(file, folder / f"undisturbed-{like}", CHANGES[like])
            disturb(probe, Kind(sigkill(""), 0), random.Random(0))
            undisturbed[like] = probe
            print(f"undisturbed {like}: {probe.digest()[:12]}, {probe.starts} command", flush=True)
        rows = []
        for name in options.kinds:
            kind = KINDS[name]
            rows.append(experiment(name, kind, file, folder, undisturbed[kind.like], options.seed))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "killed"}), flush=True)
            append("kills", [rows[-1]])
    if not all(row.get("same_as_undisturbed", True) and row["kills"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Kill parts of a run while it trains, again and again, and compare the model with an undisturbed run's.

    python benchmarks/kill_experiments.py                  # every kind; about twenty minutes on two idle cores
    python benchmarks/kill_experiments.py worker node      # some kinds

Each experiment runs `cpift probe` on one task of configs/smoke.yaml, with a checkpoint every 20 steps and a model large
enough for a step to take tens of milliseconds. After a checkpoint has appeared, and a random delay, it kills:

    worker       the training worker, by SIGKILL
    ddp, fsdp    one of two training workers
    controller   Ray Train's controller
    driver       `cpift` itself; the same command is then run again
    memory       what Ray's memory monitor chooses when the node runs out of memory (a process beside it fills it)
    limit        the worker's next allocations, by an address-space limit set from outside
    stop         nothing: the worker is stopped, and must be found to hang
    node         the Ray node that the worker is on; another takes over

A command that ends with an error is run again, as a user would. One row an experiment in results/kills.jsonl: what was
killed and at which checkpoint, how often the command was run, and whether the SHA-256 of the model is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from processes import command_line, descendants, used_and_total
from record import append

from cpift.artifacts import file_sha256

ROOT = Path(__file__).parents[1]
WORKER, CONTROLLER = "RayTrainWorker", "TrainController"
DEADLINE = 400.0  # seconds without a new checkpoint
THRESHOLD = "RAY_memory_usage_threshold"


def config(folder: Path) -> Path:
    smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    smoke["model"]["scratch"] |= {"hidden_size": 192, "intermediate_size": 384, "layers": 4}
    smoke["tasks"] = smoke["tasks"][:1]
    smoke["probe"] |= {"steps": 240, "checkpoint_every": 20, "batch_size": 16}
    smoke["resources"] = {"cpus_per_worker": 0.5, "threads_per_worker": 1, "max_failures": 10}
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(smoke))
    return path


@dataclass
class Probe:
    """One `cpift probe` into a folder of its own, started as often as it takes."""

    config: Path
    output: Path
    changes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "cpift.cli", "probe", str(self.config), "--output", str(self.output)]
        for change in self.changes:
            command += ["--set", change]
        log = (self.output.with_suffix(".log")).open("a")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, text=True, env=os.environ | self.environment, start_new_session=True
        )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def finished(self) -> bool:
        return any(self.output.glob("probe/*/manifest.json"))

    def checkpoints(self) -> dict[str, int | None]:
        """Their names, and the step of those that are whole."""
        found = {path.name: path for path in sorted(self.output.glob(".work/*/ray/fit/checkpoint_*"))}
        return {name: step_of(path / "trainer_state.json") for name, path in found.items()}

    def processes(self, name: str, root: int | None = None) -> list[int]:
        """Descendants whose command line holds `name`, oldest first."""
        assert self.process is not None
        return [pid for pid in descendants(root or self.process.pid) if name in command_line(pid)]

    def digest(self) -> str:
        (model,) = self.output.glob("probe/*/model.safetensors")
        return file_sha256(model)


def step_of(state: Path) -> int | None:
    try:
        return int(json.loads(state.read_text())["global_step"])
    except (OSError, ValueError):
        return None


def wait_for_checkpoint(probe: Probe, known: set[str], rng: random.Random) -> bool:
    """Until a moment after the next checkpoint has appeared; False if the command ended before."""
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        if set(probe.checkpoints()) - known:
            time.sleep(rng.uniform(0, 4))
            return True
        if not probe.alive():
            return False
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint within {DEADLINE:g} s; see {probe.output.with_suffix('.log')}")


Kill = Callable[[Probe, random.Random], str | None]


def sigkill(name: str) -> Kill:
    def kill(probe: Probe, rng: random.Random) -> str | None:
        found = probe.processes(name)
        if not found:
            return None
        pid = rng.choice(found)
        what = command_line(pid)
        os.kill(pid, signal.SIGKILL)
        return what[:60]

    return kill


def kill_driver(probe: Probe, rng: random.Random) -> str | None:
    if not probe.alive():
        return None
    assert probe.process is not None
    os.kill(probe.process.pid, signal.SIGKILL)
    probe.process.wait()
    return "cpift probe"


HEADROOM = 2**30  # bytes that the machine has left below the monitor's threshold when it starts
FILLER = "import sys, time; held = bytearray(b'x') * int(sys.argv[1]); print('full', flush=True); time.sleep(60)"


def fill_memory(probe: Probe, rng: random.Random) -> str | None:
    """Fill the node above the monitor's threshold until one of Ray's processes is gone."""
    assert probe.process is not None
    before = {pid: command_line(pid) for pid in descendants(probe.process.pid) if "ray::" in command_line(pid)}
    if not any(WORKER in name for name in before.values()):
        return None
    used, total = used_and_total()
    size = int(float(probe.environment[THRESHOLD]) * total) - used + HEADROOM // 4
    filler = subprocess.Popen([sys.executable, "-c", FILLER, str(max(size, 1))], stdout=subprocess.DEVNULL)
    try:
        for _ in range(240):
            time.sleep(0.25)
            gone = [name for pid, name in before.items() if not command_line(pid)]
            if gone:
                return f"memory monitor: {', '.join(sorted(gone))[:80]}"
    finally:
        filler.kill()
        filler.wait()
    return None


def limit_memory(probe: Probe, rng: random.Random) -> str | None:
    """Let the worker's next allocations fail; some libraries then end it, in others it stands still for ever."""
    found = probe.processes(WORKER)
    if not found:
        return None
    size = int(Path(f"/proc/{found[0]}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(found[0], resource.RLIMIT_AS, (size - 2**28, size - 2**28))
    return f"address space of {command_line(found[0])[:40]}"


def stop(probe: Probe, rng: random.Random) -> str | None:
    found = probe.processes(WORKER)
    if not found:
        return None
    os.kill(found[0], signal.SIGSTOP)
    return f"stopped, not killed: {command_line(found[0])[:40]}"


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
    "node": Kind(sigkill("never used: nodes are removed through the cluster"), 3),
}
CHANGES = {
    "one": (),
    "ddp": ("resources.workers=2",),
    "fsdp": ("resources.workers=2", "resources.strategy=fsdp"),
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
def cluster(probe: Probe) -> Iterator[Kill]:
    """A head without CPUs and two nodes of one each; the kill removes the node that the worker is on."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    probe.environment["RAY_ADDRESS"] = made.address

    def kill(probe: Probe, rng: random.Random) -> str | None:
        for node in nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if probe.processes(WORKER, root=raylet):
                nodes.remove(node)
                made.remove_node(node, allow_graceful=False)
                nodes.append(made.add_node(num_cpus=1))  # a cluster replaces what it loses
                return "node of the worker"
        return None

    try:
        yield kill
    finally:
        made.shutdown()


def experiment(name: str, kind: Kind, file: Path, folder: Path, wanted: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{name}/{seed}")
    probe = Probe(file, folder / name, CHANGES[kind.like] + kind.changes)
    started = time.time()
    if name == "memory":
        used, total = used_and_total()
        threshold = (used + 2 * 2**30 + HEADROOM) / total  # Ray and the fine-tune take about two
        probe.environment |= {THRESHOLD: f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "250"}
    if name == "node":
        with cluster(probe) as kill:
            killed = disturb(probe, Kind(kill, kind.kills), rng)
    else:
        killed = disturb(probe, kind, rng)
    same = probe.digest() == wanted
    return {
        "kind": name,
        "kills": len(killed),
        "killed": killed,
        "commands": probe.starts,
        "seconds": round(time.time() - started, 1),
        "sha256": probe.digest(),
        "same_as_undisturbed": same,
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
        file, wanted = config(folder), {}
        for like in sorted({KINDS[name].like for name in options.kinds}):
            probe = Probe(file, folder / f"undisturbed-{like}", CHANGES[like])
            disturb(probe, Kind(sigkill(""), 0), random.Random(0))
            wanted[like] = probe.digest()
            print(f"undisturbed {like}: {wanted[like][:12]}, {probe.starts} command", flush=True)
        rows = []
        for name in options.kinds:
            kind = KINDS[name]
            rows.append(experiment(name, kind, file, folder, wanted[kind.like], options.seed))
            row = rows[-1]
            print(
                f"{name}: {row['kills']} kills, {row['commands']} commands, {row['seconds']:.0f} s, "
                f"{'same' if row['same_as_undisturbed'] else 'DIFFERENT'} model",
                flush=True,
            )
            append("kills", [row])
    if not all(row["same_as_undisturbed"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

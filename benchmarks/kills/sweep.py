"""Kill a sweep's driver twice, one of its nodes and its head; compare what it ends with to an undisturbed sweep.

    cpift sweep sweeps/smoke_p_tau.yaml --output runs/undisturbed
    python -m benchmarks.kills.sweep --undisturbed runs/undisturbed --output runs/killed

Starts a cluster on this machine (`ray start`, port 7479): a head without CPUs and one node, runs the same sweep on
it, and kills with SIGKILL the driver among the probes, the driver among the trials, and the node among the trials; a
new node joins, then a second one. At last it kills the head, waits for the driver to give up, starts head and node
again and gives the same command. Prints one JSON object and appends it to results/kill_sweep.jsonl: every output that
is there at a kill must have been made once and stay as it was, and its weights must equal the undisturbed sweep's bit
for bit. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kills.processes import kill_tree
from benchmarks.record import append

ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
PORT = 7479
TRAINED = ("probe", "backbone", "integrate")


class Cluster:
    """A head without CPUs, and nodes."""

    def __init__(self, logs: Path, ray_dir: Path):
        self._logs, self._ray_dir, self._count = logs, ray_dir, 0
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.start_head()

    def start_head(self) -> None:
        where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._ray_dir}"]
        self.head = self._start("--num-cpus=0", *where)
        time.sleep(20)

    def add_node(self, cpus: int) -> None:
        """Nodes of one machine need folders and agent ports of their own."""
        own = [f"--temp-dir={self._ray_dir}-{self._count}", f"--dashboard-agent-listen-port={52401 + self._count}"]
        self.nodes.append(self._start(f"--num-cpus={cpus}", f"--address=127.0.0.1:{PORT}", *own))
        time.sleep(10)

    def kill_node(self) -> None:
        kill_node(self.nodes.pop(0))

    def kill_head(self) -> None:
        kill_node(self.head)

    def stop(self) -> None:
        while self.nodes:
            self.kill_node()
        self.kill_head()

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        self._count += 1
        log = (self._logs / f"node-{self._count}.log").open("ab")
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory=200000000"]
        return subprocess.Popen([*ray, *flags], env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """With its workers, which sit in process groups of their own."""
    kill_tree(process.pid)
    process.wait()


def manifests(output: Path) -> dict[str, dict[str, Any]]:
    """Every finished artifact's manifest by its name; hashes and time stay in it when its weights are dropped."""
    by_folder = {}
    for path in output.glob("*/*/manifest.json"):
        if not path.parent.name.startswith("."):
            by_folder[f"{path.parts[-3]}/{path.parts[-2]}"] = json.loads(path.read_text(encoding="utf-8"))
    return by_folder


def made(manifest: dict[str, Any]) -> tuple[Any, Any]:
    """When, and in how many seconds."""
    return manifest.get("started"), manifest.get("seconds")


def count(output: Path, stage: str) -> int:
    return sum(name.startswith(f"{stage}/") for name in manifests(output))


class Driver:
    """`cpift sweep` on the cluster."""

    def __init__(self, sweep: str, output: Path):
        self._command = [str(Path(sys.executable).with_name("cpift")), "sweep", sweep, "--output", str(output)]
        self._log = output.parent / "driver.log"
        self._environment = {**ENVIRONMENT, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
        self.start()

    def start(self) -> None:
        log = self._log.open("ab")
        environment = self._environment
        self.process = subprocess.Popen(self._command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def give_up(self) -> int | None:
        """Seconds until it has ended by itself; None if it was killed after five minutes."""
        started = time.monotonic()
        try:
            self.process.wait(timeout=300)
            return round(time.monotonic() - started)
        except subprocess.TimeoutExpired:
            kill(self.process)
            return None

    def kill_when(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came before the end; then the driver was killed and started again."""
        if not self.wait(condition):
            return False
        kill(self.process)
        self.start()
        return True

    def wait(self, condition: Callable[[], bool]) -> bool:
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.1)
        return False


def best(output: Path) -> Any:
    record = json.loads((output / "sweep.json").read_text(encoding="utf-8"))
    return next(trial["points"] for trial in record["trials"] if trial["number"] == record["best"])


def weights(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: sha for name, sha in manifest["outputs"].items() if name.endswith(".safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="sweeps/smoke_p_tau.yaml")
    parser.add_argument("--undisturbed", type=Path, required=True, help="folder of the same sweep, finished in peace")
    parser.add_argument("--output", type=Path, required=True, help="an empty folder")
    parser.add_argument("--ray-dir", type=Path, default=Path("/tmp/cpift-kill-ray"))
    options = parser.parse_args()
    output = options.output.absolute()
    output.mkdir(parents=True)
    outcome = experiment(options.sweep, options.undisturbed, output, options.ray_dir)
    append("kill_sweep", [outcome])
    print(json.dumps(outcome, indent=1))


def experiment(sweep: str, undisturbed: Path, output: Path, ray_dir: Path) -> dict[str, Any]:
    started = time.time()
    events: dict[str, bool | int | None] = {}
    store, snapshots = output / "sweep-output", list[dict[str, dict[str, Any]]]()
    cluster = Cluster(output, ray_dir)
    try:
        cluster.add_node(cpus=2)
        driver = Driver(sweep, store)
        events["driver killed among the probes"] = driver.kill_when(lambda: count(store, "probe") >= 1)
        snapshots.append(manifests(store))
        events["driver killed among the trials"] = driver.kill_when(lambda: count(store, "integrate") >= 2)
        snapshots.append(manifests(store))
        events["node killed among the trials, another one joined"] = driver.wait(lambda: count(store, "integrate") >= 5)
        snapshots.append(manifests(store))
        cluster.kill_node()
        cluster.add_node(cpus=1)
        events["a second node joined among the trials"] = driver.wait(lambda: count(store, "integrate") >= 7)
        cluster.add_node(cpus=1)
        events["head killed among the trials"] = driver.wait(lambda: count(store, "integrate") >= 10)
        snapshots.append(manifests(store))
        cluster.kill_head()
        events["seconds until the driver gave up"] = driver.give_up()
        cluster.stop()
        cluster.start_head()
        cluster.add_node(cpus=2)
        driver.start()
        code = driver.process.wait()
    finally:
        cluster.stop()
    return report(store, undisturbed, snapshots) | events | {"exit code": code, "seconds": round(time.time() - started)}


def report(store: Path, undisturbed: Path, snapshots: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    ended, wanted = manifests(store), manifests(undisturbed)
    remade = [name for before in snapshots for name in before if made(before[name]) != made(ended.get(name, {}))]
    compared = {name for name in wanted if name.split("/")[0] in (*TRAINED, "fuse", "regions")}
    differing = [name for name in compared if weights(wanted[name]) != weights(ended.get(name, {"outputs": {}}))]
    return {
        "outputs there at each kill": [len(before) for before in snapshots],
        "of those made again": remade,
        "trained": {stage: count(store, stage) for stage in TRAINED},
        "trained undisturbed": {stage: count(undisturbed, stage) for stage in TRAINED},
        "weights compared": len(compared),
        "weights that differ": differing,
        "same best": best(store) == best(undisturbed),
    }


if __name__ == "__main__":
    main()

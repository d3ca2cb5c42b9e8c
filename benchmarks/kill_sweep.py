"""Kill a sweep's driver twice and one of its nodes once; compare what it ends with to an undisturbed sweep.

    cpift sweep sweeps/smoke_p_tau.yaml --output runs/undisturbed
    python benchmarks/kill_sweep.py --undisturbed runs/undisturbed --output runs/killed

Starts a cluster on this machine (`ray start`, port 7479): a head without CPUs and one node, runs the same sweep on
it, and kills with SIGKILL the driver among the probes, the driver among the trials, and the node among the trials; then
a new node joins, so that all that follows runs on it. Prints one JSON object: every output that is there must have been
made once and stay as it was, and its weights must equal the undisturbed sweep's bit for bit. Minutes.
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

ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
PORT = 7479
TRAINED = ("probe", "backbone", "integrate")


def start_node(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    """A node in a process group of its own, so that it dies whole."""
    log = (folder / f"node-{len(flags)}.log").open("ab")
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", *flags]
    memory = ["--object-store-memory=200000000"]
    return subprocess.Popen([*ray, *memory], env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """A node with its workers, which sit in process groups of their own."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    pids, queue = [], [process.pid]
    while queue:
        pid = queue.pop()
        pids.append(pid)
        queue += children.get(pid, [])
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def manifests(output: Path) -> dict[str, dict[str, Any]]:
    """Every finished artifact's manifest by its name, with the time it was written."""
    found = {}
    for path in output.glob("*/*/manifest.json"):
        if not path.parent.name.startswith("."):
            found[f"{path.parts[-3]}/{path.parts[-2]}"] = json.loads(path.read_text()) | {
                "written": path.stat().st_mtime_ns
            }
    return found


def count(output: Path, stage: str) -> int:
    return sum(name.startswith(f"{stage}/") for name in manifests(output))


class Driver:
    """`cpift sweep` on the cluster."""

    def __init__(self, sweep: str, output: Path):
        self._command = [str(Path(sys.executable).with_name("cpift")), "sweep", sweep, "--output", str(output)]
        self._log = output.parent / "driver.log"
        self._environment = {**ENVIRONMENT, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        log = self._log.open("ab")
        return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True)

    def kill_when(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came before the end; then the driver was killed and started again."""
        if not self.wait(condition):
            return False
        kill(self.process)
        self.process = self._start()
        return True

    def wait(self, condition: Callable[[], bool]) -> bool:
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.1)
        return False


def best(output: Path) -> Any:
    found = json.loads((output / "sweep.json").read_text())
    return next(trial["points"] for trial in found["trials"] if trial["number"] == found["best"])


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
    print(json.dumps(experiment(options.sweep, options.undisturbed, output, options.ray_dir), indent=1))


def experiment(sweep: str, undisturbed: Path, output: Path, ray_dir: Path) -> dict[str, Any]:
    folder = output.parent
    where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={ray_dir}"]
    head = start_node(folder, "--num-cpus=0", *where)
    time.sleep(20)
    # nodes of one machine need folders and agent ports of their own
    own = [f"--address=127.0.0.1:{PORT}", f"--temp-dir={ray_dir}-node", "--dashboard-agent-listen-port=52401"]
    node = start_node(folder, "--num-cpus=2", *own)
    time.sleep(10)
    started, events = time.time(), {}
    try:
        driver = Driver(sweep, output / "sweep-output")
        store = output / "sweep-output"
        snapshots = []
        events["driver killed among the probes"] = driver.kill_when(lambda: count(store, "probe") >= 1)
        snapshots.append(manifests(store))
        events["driver killed among the trials"] = driver.kill_when(lambda: count(store, "integrate") >= 2)
        snapshots.append(manifests(store))
        events["node killed among the trials, another one joined"] = driver.wait(lambda: count(store, "integrate") >= 5)
        kill_tree(node)
        snapshots.append(manifests(store))
        node = start_node(folder, "--num-cpus=2", *own)
        code = driver.process.wait()
    finally:
        kill_tree(head)
        if node.poll() is None:
            kill_tree(node)
    return report(store, undisturbed, snapshots) | events | {"exit code": code, "seconds": round(time.time() - started)}


def report(store: Path, undisturbed: Path, snapshots: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    ended, wanted = manifests(store), manifests(undisturbed)
    remade = [name for before in snapshots for name in before if before[name]["written"] != ended[name]["written"]]
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

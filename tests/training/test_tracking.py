from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from cpift.errors import StageError
from cpift.training.fit import fit
from cpift.training.spec import StageSpec
from cpift.training.tracking import TRACKERS, check_trackers, log_file, tracker_variables
from tests.helpers.fits import spec


def work(log: Path) -> None:
    with log_file(log):
        logging.getLogger("cpift.training.fit").info("step %d", 3)
        warnings.warn("careful", stacklevel=1)
        raise ZeroDivisionError


def test_a_workers_log_holds_warnings_and_what_ended_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        work(tmp_path / "a" / "worker-0.log")
    text = (tmp_path / "a" / "worker-0.log").read_text()
    for line in ("INFO cpift.training.fit: step 3", "careful", "Traceback", "ZeroDivisionError"):
        assert line in text
    logging.getLogger("cpift.training.fit").info("afterwards")
    assert (tmp_path / "a" / "worker-0.log").read_text() == text


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check_trackers(("tensorboard", "wandb"))
    assert str(problem) == "tracking: 'wandb' is not installed → pip install wandb, or leave it out"


def test_every_tracker_that_transformers_knows_may_be_named() -> None:
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_kubeflow_needs_a_job_to_report_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    (problem,) = check_trackers(("kubeflow",))
    assert "KUBEFLOW_TRAINER_SERVER_URL is not set" in str(problem)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://here")
    assert check_trackers(("kubeflow",)) == []


def test_other_trackers_get_losses_through_transformers_own_callback(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[str, int, str]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            logged.extend((args.run_name, state.global_step, name) for name in ("loss", "eval_loss") if name in logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "dvclive", Recorder)
    watched = spec(base, tmp_path, steps=2, evaluate_every=2, validation={"rows": 4})
    fit(replace(watched, tracking=("dvclive",)))
    assert logged == [("fit", 2, "eval_loss"), ("fit", 2, "loss")]


@pytest.mark.skipif(not find_spec("mlflow"), reason="mlflow is not installed")
def test_losses_go_to_mlflow_a_run_a_stage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = fit(replace(spec(base, tmp_path, *STAGES, steps=4), tracking=("mlflow",)))
    for stage in (0, 1):
        client = MlflowClient(f"sqlite:///{tmp_path}/logs/stage-{stage}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
        assert (run.info.run_name, run.info.status) == (f"fit, stage {stage}", "FINISHED")
        assert run.data.params["learning_rate"] == "0.003"
        found = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")]
        assert found == logged(result, stage)


@pytest.mark.skipif(not find_spec("mlflow"), reason="mlflow is not installed")
def test_a_fine_tune_that_fails_is_a_failed_run_and_the_next_one_is_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/all.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    bad = spec(base, tmp_path / "bad", learning_rate=1e30, max_grad_norm=1e30, steps=12)
    with pytest.raises(StageError, match="the loss is"):
        fit(replace(bad, title="bad", tracking=("mlflow",)))
    fit(replace(spec(base, tmp_path / "good", steps=2), title="good", tracking=("mlflow",)))
    client = MlflowClient(f"sqlite:///{tmp_path}/all.db")
    runs = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {"bad": "FAILED", "good": "FINISHED"}


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
def test_losses_go_to_wandb_a_run_a_stage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    result = fit(replace(spec(base, tmp_path, *STAGES, steps=4), tracking=("wandb",)))
    for stage in (0, 1):
        (file,) = (tmp_path / "logs" / f"stage-{stage}").glob("wandb/offline-run-*/run-*.wandb")
        assert wandb_curve(file, "train/loss") == logged(result, stage)


STAGES = (StageSpec(("add",)), StageSpec(("rev",)))


def logged(result: dict[str, Any], stage: int) -> list[tuple[int, float]]:
    found = [(entry["step"], entry["loss"]) for entry in result["log"] if entry["stage"] == stage]
    assert [step for step, _ in found] == [2, 4]
    return found


def wandb_curve(file: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, from the records of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in wandb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if name in items:
            found.append((items["train/global_step"], items[name]))
    return found


def wandb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, in them pieces of records."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_only_the_variables_of_the_trackers_in_use_go_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "MLFLOWER"):
        monkeypatch.setenv(name, "x")
    assert tracker_variables(("tensorboard",)) == {}
    assert "MLFLOWER" not in tracker_variables(("mlflow", "wandb"))
    assert tracker_variables(("tensorboard", "mlflow"))["MLFLOW_TRACKING_URI"] == "x"
    assert "WANDB_PROJECT" not in tracker_variables(("mlflow",))


STUCK = """
import sys, time
from cpift.training.tracking import ended_if_stuck

def hang():
    time.sleep(60)

with open(sys.argv[1], "w") as log, ended_if_stuck(0.3, log) as alive:
    alive(False)
    time.sleep(0.6)
    for _ in range(4):
        alive(True)
        time.sleep(0.15)
    print("worked", flush=True)
    alive(True)
    hang()
"""


@pytest.mark.slow
def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = subprocess.run([sys.executable, "-c", STUCK, log], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (1, "worked\n"), ended.stderr
    assert "in hang" in log.read_text()

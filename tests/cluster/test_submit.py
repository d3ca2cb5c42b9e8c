"""What a job is made of, without a cluster: the folder that is sent, the command, and the manifests."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from cpift.cluster import submit
from cpift.cluster.submit import JobSpec, package
from cpift.config.loading import load_config
from cpift.config.paths import PATHS
from cpift.config.run import RunConfig
from cpift.errors import ConfigError

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "ray_jobs"


def local_run(folder: Path, **changes: Any) -> Path:
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    (folder / "rows" / "test.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n')
    task = {"name": "a", "train": {"file": "rows/train.jsonl"}, "test": {"file": "${ROWS}/test.jsonl"}}
    fields = {
        "name": "t",
        "model": {"scratch": {}},
        "tasks": [task],
        "probe": {"steps": 1},
        "integration": {"steps": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields | changes))
    return path


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    monkeypatch.setenv("HF_TOKEN", "hf_abc123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hf_abc123too")
    return tmp_path


def sent(spec: JobSpec) -> dict[str, bytes]:
    return {str(p.relative_to(spec.working_dir)): p.read_bytes() for p in spec.working_dir.rglob("*") if p.is_file()}


def test_a_run_goes_with_its_data_and_loads_there(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = package(local_run(rows), ["regions.p=0.1"], "/shared/out", rows / "build", wheel=False)
    files = sent(spec)
    assert len(files) == 3
    assert shlex.split(spec.entrypoint) == [
        *("python", "-m", "cpift.cli", "run", "./run.yaml", "--output", "/shared/out", "--set", "regions.p=0.1")
    ]
    monkeypatch.delenv("ROWS")
    monkeypatch.chdir("/")
    task = load_config(spec.working_dir / "run.yaml").tasks[0]
    assert task.train.file is not None
    assert task.train.file.parent == (spec.working_dir / "data").resolve()
    assert task.train.file.read_text() == (rows / "rows" / "train.jsonl").read_text()


def test_a_sweep_goes_with_its_run_inline(rows: Path) -> None:
    local_run(rows)
    sweep = rows / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"run": "run.yaml", "space": {"regions.p": [0.1, 0.2]}}))
    spec = package(sweep, [], "/shared/out", rows / "build", wheel=False)
    assert "cpift.cli sweep ./sweep.yaml" in spec.entrypoint, "a sweep is titled by its file's name"
    shipped = yaml.safe_load((spec.working_dir / "sweep.yaml").read_text())
    assert shipped["run"]["tasks"][0]["train"]["file"].startswith("data/")


def test_cpift_itself_goes_along_and_nothing_is_installed(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "cpift-0.whl", "w") as archive:
            for name, source in (("cpift", ROOT / "cpift"), ("cpift_kernels", ROOT / "kernels" / "cpift_kernels")):
                for path in source.rglob("*.py"):
                    archive.write(path, name / path.relative_to(source))
        return folder / "cpift-0.whl"

    monkeypatch.setattr("cpift.cluster.submit.build_wheel", build_wheel)
    spec = package(local_run(rows), [], "/shared/out", rows / "build")
    assert set(spec.runtime_env) == {"working_dir", "env_vars"}, "a wheel in py_modules brings all its dependencies"
    command = [sys.executable, "-c", "import cpift, cpift_kernels; print(cpift.__file__, cpift_kernels.__file__)"]
    done = subprocess.run(command, cwd=spec.working_dir, capture_output=True, text=True, timeout=100, check=True)
    assert all(Path(file).is_relative_to(spec.working_dir) for file in done.stdout.split())


def test_nothing_of_the_environment_is_sent(rows: Path) -> None:
    spec = package(local_run(rows), [], "/shared/out", rows / "build", wheel=False)
    everything = repr(spec.runtime_env) + spec.entrypoint + repr(sent(spec))
    assert "hf_abc123" not in everything
    assert set(spec.runtime_env["env_vars"]) == {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("changes", "output", "said"),
    [
        ({"model": {"path": "model"}}, "/shared/out", ["model.path", "models are not sent"]),
        ({"model": {"path": "~/model"}}, "/shared/out", ["model.path", "models are not sent"]),
        ({"model": {"gguf": {"file": "a.gguf"}}}, "/shared/out", ["model.gguf.file", "models are not sent"]),
        ({"backbone": {"source": "rows"}}, "/shared/out", ["backbone.source: 'rows'", "or a hub id"]),
        ({"backbone": {"source": "./gone"}}, "/shared/out", ["backbone.source: './gone'"]),
        ({"resources": {"storage": "kept"}}, "/shared/out", ["resources.storage: 'kept'", "s3://bucket/folder"]),
        (
            {"tasks": [{"name": "a", "checkpoint": {"path": "tunes/a"}}]},
            "/shared/out",
            ["tasks.0.checkpoint.path: 'tunes/a'", "models are not sent"],
        ),
        ({"probe": {"stepz": 1}}, "/shared/out", ["probe.stepz", "did you mean 'steps'?"]),
        ({}, None, ["output", "--output /shared/runs/NAME"]),
        ({}, "runs/here", ["output", "'runs/here'"]),
    ],
)
def test_what_would_fail_there_is_refused_here(
    rows: Path, changes: dict[str, Any], output: str | None, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        package(local_run(rows, **changes), [], output, rows / "build", wheel=False)
    for part in said:
        assert part in str(caught.value)


def test_what_is_the_same_everywhere_is_sent_as_it_is(rows: Path) -> None:
    tasks = [{"name": "a", "checkpoint": {"path": "${TUNES}/a"}}, {"name": "b", "checkpoint": {"hub": "org/b"}}]
    changes = {"model": {"path": "/models/base"}, "backbone": {"source": "org/name"}, "tasks": tasks}
    changes |= {"resources": {"storage": "s3://bucket/kept"}, "probe": None, "integration": None}
    spec = package(local_run(rows, **changes), [], "/shared/out", rows / "build", wheel=False)
    shipped = yaml.safe_load((spec.working_dir / "run.yaml").read_text())
    assert {name: shipped[name] for name in changes} == changes


def test_paths_that_a_sweep_or_an_option_sets_are_prepared_too(rows: Path) -> None:
    local_run(rows)
    sweep, fields = rows / "sweep.yaml", {"run": "run.yaml", "fixed": {"tasks.0.train.file": "rows/train.jsonl"}}
    space = {"tasks.0.test.file": ["rows/test.jsonl", "rows/train.jsonl"]}
    sweep.write_text(yaml.safe_dump(fields | {"space": space}))
    spec = package(sweep, ["tasks.0.train.file=rows/test.jsonl"], "/shared/out", rows / "build", wheel=False)
    shipped = yaml.safe_load((spec.working_dir / "sweep.yaml").read_text())
    named = [shipped["fixed"]["tasks.0.train.file"], *shipped["space"]["tasks.0.test.file"]]
    named.append(shlex.split(spec.entrypoint)[-1].partition("=")[2])
    assert all((spec.working_dir / name).is_file() for name in named)
    assert len(set(named)) == 2, "equal files go once"
    sweep.write_text(yaml.safe_dump(fields | {"space": {"backbone.source": ["pretrained", "rows"]}}))
    with pytest.raises(ConfigError) as caught:
        package(sweep, ["model.path=mine"], "/shared/out", rows / "again", wheel=False)
    assert "space.backbone.source: 'rows'" in str(caught.value)
    assert "--set model.path: 'mine'" in str(caught.value)


def path_fields(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Dotted names of all fields of a config that take a pathlib.Path."""
    for name, field in model.model_fields.items():
        parts = list(_types(field.annotation))
        many = any(get_origin(part) is tuple for part in parts)
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from path_fields(part, f"{where}{name}.{'*.' * many}")
        if Path in parts:
            yield f"{where}{name}"


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def test_every_path_of_the_schema_has_its_kind_and_every_kind_what_becomes_of_it() -> None:
    found = set(path_fields(RunConfig))
    assert {"model.path", "tasks.*.checkpoint.path", "tasks.*.train.file", "output"} <= found
    assert found <= set(PATHS), "a new path: say in config.paths.PATHS what kind it is"
    texts = {
        "model.gguf.file",
        "model.chat_template",
        "backbone.source",
        "resources.storage",
    }  # not only paths, so plain text
    assert set(PATHS) == found | texts
    assert set(PATHS.values()) == set(submit._REMEDIES) | {"rows"}


def test_missing_data_is_refused(rows: Path) -> None:
    path = local_run(rows)
    (rows / "rows" / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"tasks\.0\.test\.file"):
        package(path, [], "/shared/out", rows / "build", wheel=False)


def test_an_entry_point_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(JOBS / "run.py"), "--config", str(tmp_path / "none.yaml"), "--set", "seed=1"]
    environment = {**os.environ, "CPIFT_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 2
    assert f"Results: {tmp_path / 'runs' / 'none'}" in done.stdout
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", ["run", "fuse", "sweep"])
def test_entry_points_hand_their_flags_to_cpift(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("cpift.cli.main.process", lambda: seen.extend(sys.argv))
    monkeypatch.delitem(sys.modules, "entry", raising=False)
    monkeypatch.syspath_prepend(JOBS)
    monkeypatch.setattr(sys, "argv", [job, "--set", "seed=1", "--config", "configs/a.yaml", "--output=/shared/a"])
    runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    sys.modules.pop("entry")
    assert seen == ["cpift", job, "configs/a.yaml", "--set", "seed=1", "--output=/shared/a"]


# ---- manifests ------------------------------------------------------------------------------------------------------

# Fields of KubeRay's ray.io/v1 types (rayjob_types.go, raycluster_types.go), as far as they may be set.
RAY_JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector"),
    *("submitterConfig", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources", "suspend"),
    *("entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes"),
}
RAY_CLUSTER = {
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "suspend",
}
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
WORKER = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}


def kuberay_clusters() -> list[dict[str, Any]]:
    job = yaml.safe_load((JOBS / "kuberay" / "rayjob.yaml").read_text())
    cluster = yaml.safe_load((JOBS / "kuberay" / "raycluster.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(job["spec"]) <= RAY_JOB
    return [job["spec"]["rayClusterSpec"], cluster["spec"]]


def test_kuberay_manifests_have_the_fields_of_their_types() -> None:
    versions = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    one, other = kuberay_clusters()
    assert one == other, "both manifests describe one cluster"
    assert set(one) <= RAY_CLUSTER
    assert one["rayVersion"] == versions["ray"]
    assert set(one["headGroupSpec"]) <= HEAD
    groups = {group["groupName"]: group for group in one["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    for group in groups.values():
        assert set(group) <= WORKER
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (one["headGroupSpec"], *groups.values()):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kuberay_pods_mount_the_shared_volume_and_hold_no_secret() -> None:
    claim = yaml.safe_load((JOBS / "kuberay" / "storage.yaml").read_text())
    for cluster in kuberay_clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            spec = group["template"]["spec"]
            (volume,) = spec["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            (container,) = spec["containers"]
            assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
            for entry in container["env"]:
                assert "valueFrom" in entry or "TOKEN" not in entry["name"]
    gpu = kuberay_clusters()[0]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    assert gpu["limits"]["nvidia.com/gpu"] == gpu["requests"]["nvidia.com/gpu"]


def test_ray_accepts_the_vm_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((JOBS / "vm_cluster.yaml").read_text()))
    validate_config(config)  # against the schema that Ray ships
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_runtime_environment_keeps_secrets_and_large_files_at_home() -> None:
    env = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    assert {"/.git/", "/kernels/", "/runs/", "*.safetensors"} <= set(env["excludes"])
    assert not [name for name in env["env_vars"] if name.endswith(("TOKEN", "SECRET", "KEY"))]

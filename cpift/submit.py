"""`cpift submit`: a run or a sweep as a Ray job, with the config and its data files sent along.

The working directory that the job gets holds one config, the data files it names and cpift itself, unpacked from its
wheel, and nothing of this machine besides. (A wheel in `py_modules` would be installed with all that it depends on, on
every node: gigabytes, and maybe another torch.) Ray keeps a job's specification where others can read it, so nothing of
the environment is put into it: secrets belong into the environment of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpift.config_loading import check_fields, read_yaml, secret_problems
from cpift.config_paths import expanded
from cpift.errors import ConfigError, CpiftError, Problem, StageError
from cpift.files import file_sha256

CONFIG = "config.yaml"
_EXTRA = "pip install 'cpift[cluster]'"


@dataclass(frozen=True)
class JobSpec:
    """What is sent: a command and the folder it runs in."""

    entrypoint: str
    working_dir: Path

    @property
    def runtime_env(self) -> dict[str, Any]:
        return {"working_dir": str(self.working_dir), "env_vars": {"OMP_NUM_THREADS": "1"}}


def package(config: Path, overrides: Sequence[str], output: str | None, folder: Path, wheel: bool = True) -> JobSpec:
    """Lay out in `folder` what a job needs. The kind of job follows from the file: a sweep has a `space`.

    wheel: send this cpift too, which then hides one that the nodes have installed.

    Raises ConfigError for what would fail on the cluster: unknown fields, relative model paths, no place for results.
    """
    raw = read_yaml(config)
    sweep = "space" in raw
    run, origin = _run_of(raw, config) if sweep else (raw, config)
    working_dir = folder / "job"
    (working_dir / "data").mkdir(parents=True)
    problems = list(_ship_data(run, origin.absolute().parent, working_dir / "data"))
    problems += secret_problems({"--set": list(overrides), "--output": output, "sweep": {**raw, "run": None}})
    problems += _local_paths(run) + _check_output(raw, run, output, sweep)
    check_fields(run, str(origin), problems)
    (working_dir / CONFIG).write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = ["python", "-m", "cpift.cli", "sweep" if sweep else "run", CONFIG]
    command += ["--output", output] if output else []
    command += [part for text in overrides for part in ("--set", text)]
    if wheel:
        with zipfile.ZipFile(build_wheel(folder)) as archive:
            archive.extractall(working_dir)
    return JobSpec(shlex.join(command), working_dir)


def _run_of(raw: dict[str, Any], config: Path) -> tuple[dict[str, Any], Path]:
    """The run inside a sweep, put inline where the sweep names a file."""
    if isinstance(raw.get("run"), str):
        origin = (config.absolute().parent / Path(raw["run"]).expanduser()).resolve()
        raw["run"] = read_yaml(origin)
        return raw["run"], origin
    run = raw.get("run")
    if not isinstance(run, dict):
        raise ConfigError(str(config), [Problem("run", "is required", "name the run's YAML file")])
    return run, config


def _sources(run: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    tasks = run.get("tasks")
    for number, task in enumerate(tasks if isinstance(tasks, list) else []):
        for split in ("train", "test"):
            source = task.get(split) if isinstance(task, dict) else None
            if isinstance(source, dict) and isinstance(source.get("file"), str):
                yield f"tasks.{number}.{split}.file", source


def _ship_data(run: dict[str, Any], origin: Path, folder: Path) -> Iterator[Problem]:
    """Copy the data files and let the config name the copies; equal files go once."""
    for where, source in _sources(run):
        value, missing = expanded(source["file"])
        for name in missing:
            yield Problem(where, f"the environment has no variable {name}", f"export {name}=... first")
        path = (origin / Path(value).expanduser()).resolve()
        if missing:
            continue
        if not path.is_file():
            yield Problem(where, f"there is no such file: {path}", "check the path")
            continue
        copy = folder / f"{file_sha256(path)[:12]}-{path.name}"
        if not copy.exists():
            shutil.copyfile(path, copy)
        source["file"] = f"data/{copy.name}"


def _local_paths(run: dict[str, Any]) -> list[Problem]:
    """Model folders are too large to send: they must lie where the nodes see them, under an absolute path."""
    model = run.get("model")
    model = model if isinstance(model, dict) else {}
    gguf = model.get("gguf")
    loose = gguf.get("file") if isinstance(gguf, dict) and not gguf.get("package") else None
    found = {"model.path": model.get("path"), "model.gguf.file": loose}
    remedy = "models are not sent: put it on storage that every node sees and give its absolute path there, or a hub id"
    return [
        Problem(where, f"{value!r} is relative to this machine's folder", remedy)
        for where, value in found.items()
        if isinstance(value, str) and not value.startswith(("/", "${"))
    ]


def _check_output(raw: dict[str, Any], run: dict[str, Any], output: str | None, sweep: bool) -> list[Problem]:
    given = output or raw.get("output") or (None if sweep else run.get("output"))
    if isinstance(given, str) and given.startswith("/"):
        return []
    remedy = "give --output with a folder on storage that every node sees, for example --output /shared/runs/NAME"
    return [Problem("output", f"{given!r}: a job's own folder is deleted after it", remedy)]


def build_wheel(folder: Path) -> Path:
    """The wheel of the source tree that this package runs from."""
    tree = Path(__file__).resolve().parents[1]
    if not (tree / "pyproject.toml").is_file():
        raise CpiftError(
            "cpift is installed without its source tree, so there is no wheel to send: install the same cpift on the "
            "cluster's nodes and submit with --no-wheel"
        )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CpiftError(f"the wheel could not be built:\n{done.stderr.strip()}")
    (wheel,) = folder.glob("cpift-*.whl")
    return wheel


def submit(spec: JobSpec, address: str, name: str) -> str:
    """Send a job; returns its submission id."""
    return _client(address).submit_job(
        entrypoint=spec.entrypoint, runtime_env=spec.runtime_env, metadata={"name": name}
    )


def follow(address: str, job: str) -> None:
    """Print the job's log until it ends. Raises StageError unless it ended well."""
    client = _client(address)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    status = client.get_job_status(job)
    print(f"Job {job}: {status.value}")
    if status.value != "SUCCEEDED":
        message = re.sub(r"\s+", " ", client.get_job_info(job).message or "")[:300]
        raise StageError(
            f"job {job} ended {status.value}: {message}\nSubmit it again to go on from what it has finished"
        )


def _client(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except (ImportError, RuntimeError) as error:
        if "ray[default]" in str(error) or isinstance(error, ImportError):
            raise CpiftError(f"the jobs API needs ray[default]: {_EXTRA}") from None
        raise CpiftError(f"{address}: {error}") from None
    except (ConnectionError, ValueError) as error:
        raise CpiftError(
            f"no jobs API at {address} ({str(error).splitlines()[0]}): is the head running with its dashboard "
            "(ray[default]), and is this its address, for example http://HEAD:8265?"
        ) from None

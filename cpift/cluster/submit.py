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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cpift.config.code import word_at
from cpift.config.loading import check_fields, read_yaml, secret_problems
from cpift.config.paths import PathKind, expanded, is_packaged, path_kind, texts
from cpift.console.terminal import say
from cpift.disk.files import SOURCE_TREE, file_sha256
from cpift.errors import ConfigError, CpiftError, Problem, StageError, first_line
from cpift.text.escaping import without_colours

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

    Raises ConfigError for what would fail on the cluster: unknown fields, paths of this machine, no place for results.
    """
    raw = read_yaml(config)
    sweep = "space" in raw
    run, origin = _run_of(raw, config) if sweep else (raw, config)
    working_dir = folder / "job"
    (working_dir / "data").mkdir(parents=True)
    changes = list(overrides)
    paths = _paths(run, raw if sweep else {}, changes)
    problems = list(_prepare(paths, origin.absolute().parent, working_dir / "data"))
    problems += secret_problems({"--set": list(overrides), "--output": output, "sweep": {**raw, "run": None}})
    problems += _check_output(raw, run, output, sweep)
    check_fields(run, str(origin), problems)
    (working_dir / config.name).write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = ["python", "-m", "cpift.cli", "sweep" if sweep else "run", f"./{config.name}"]
    command += ["--output", output] if output else []
    command += [part for text in changes for part in ("--set", text)]
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


@dataclass(frozen=True)
class _Value:
    """A path in what is sent: the field, where it stands, and what puts another in its place."""

    field: str
    where: str
    text: str
    put: Callable[[str], None]


def _paths(run: dict[str, Any], sweep: dict[str, Any], overrides: list[str]) -> Iterator[_Value]:
    """Every path of a run, of what a sweep sets of it, and of `--set`."""
    for section, key, field in list(texts(run)):
        if not is_packaged(section, field):
            yield _Value(field, field, section[key], partial(section.__setitem__, key))
    fixed, space = (part if isinstance(part := sweep.get(name), dict) else {} for name in ("fixed", "space"))
    for field, value in list(fixed.items()):
        if isinstance(value, str):
            yield _Value(field, f"fixed.{field}", value, partial(fixed.__setitem__, field))
    for field, values in space.items():
        for place, value in enumerate(values if isinstance(values, list) else []):
            if isinstance(value, str):
                yield _Value(field, f"space.{field}", value, partial(values.__setitem__, place))
    for place, text in enumerate(overrides):
        field, _, value = (part.strip() for part in text.partition("="))
        yield _Value(field, f"--set {field}", value, partial(_override, overrides, place, field))


def _override(overrides: list[str], place: int, field: str, value: str) -> None:
    overrides[place] = f"{field}={value}"


def _prepare(values: Iterator[_Value], origin: Path, data: Path) -> Iterator[Problem]:
    """Rows are copied into the folder `data`, and the copies named; code beside the run goes beside the job's config.
    Of all else the nodes must see the same path."""
    for value in values:
        if word_at(value.field) is not None:
            yield from _ship_code(value, origin, data.parent)
        kind = path_kind(value.field)
        if kind == "rows":
            yield from _ship(value, origin, data)
        elif kind is not None and not _same_on_nodes(value, kind, origin):
            yield Problem(value.where, f"{value.text!r} is relative to this machine's folder", _REMEDIES[kind])


_REMEDIES: Mapping[PathKind, str] = {
    "model": "models are not sent: put it where every node sees it and give its absolute path there, or a hub id",
    "source": "models are not sent: give the absolute path of a folder that every node sees, or a hub id",
    "place": "give an absolute path on storage that every node sees, or a URI such as s3://bucket/folder",
}


def _same_on_nodes(value: _Value, kind: PathKind, origin: Path) -> bool:
    """Whether a path means the same on every node: absolute, a URI, from the nodes' environment, or no path at all."""
    text = value.text
    if text.startswith(("/", "${")) or "://" in text or value.field == "output":  # see `_check_output`
        return True
    return kind == "source" and not text.startswith((".", "~")) and not (origin / text).is_dir()


def _ship(value: _Value, origin: Path, folder: Path) -> Iterator[Problem]:
    """Copy a file of rows and let the field name the copy; equal files go once."""
    text, missing = expanded(value.text)
    for name in missing:
        yield Problem(value.where, f"the environment has no variable {name}", f"export {name}=... first")
    path = (origin / Path(text).expanduser()).resolve()
    if missing:
        return
    if not path.is_file():
        yield Problem(value.where, f"there is no such file: {path}", "check the path")
        return
    copy = folder / f"{file_sha256(path)[:12]}-{path.name}"
    if not copy.exists():
        shutil.copyfile(path, copy)
    value.put(f"data/{copy.name}")


def _ship_code(value: _Value, origin: Path, folder: Path) -> Iterator[Problem]:
    """Copy the module that a word names, if it is a file beside the run; else it has to be installed on the nodes."""
    module, _, attribute = value.text.partition(":")
    path, copy = origin / f"{module}.py", folder / f"{module}.py"
    if not attribute or not path.is_file():
        return
    if copy.exists() and copy.read_bytes() != path.read_bytes():
        yield Problem(value.where, f"{path} has the name of another module of the job", "rename one of them")
        return
    shutil.copyfile(path, copy)


def _check_output(raw: dict[str, Any], run: dict[str, Any], output: str | None, sweep: bool) -> list[Problem]:
    folder = output or raw.get("output") or (None if sweep else run.get("output"))
    if isinstance(folder, str) and folder.startswith("/"):
        return []
    remedy = "give --output with a folder on storage that every node sees, for example --output /shared/runs/NAME"
    return [Problem("output", f"{folder!r}: a job's own folder is deleted after it", remedy)]


def build_wheel(folder: Path) -> Path:
    """The wheel of the source tree that this package runs from."""
    tree = SOURCE_TREE
    if not (tree / "pyproject.toml").is_file():
        raise CpiftError(
            "cpift is installed without its source tree, so there is no wheel to send: install the same cpift on the "
            "cluster's nodes and submit with --no-wheel"
        )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise CpiftError(f"the wheel could not be built:\n{done.stderr.strip()}")
    (wheel,) = folder.glob("cpift-*.whl")
    return wheel


def submit(spec: JobSpec, address: str, name: str) -> str:
    """Send a job; returns its submission id."""
    number: str = _client(address).submit_job(
        entrypoint=spec.entrypoint, runtime_env=spec.runtime_env, metadata={"name": name}
    )
    return number


def follow(address: str, job: str) -> None:
    """Print the job's log until it ends. Raises StageError unless it ended well."""
    client = _client(address)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            say(without_colours(lines).removesuffix("\n"))

    asyncio.run(tail())
    status = client.get_job_status(job)
    say(f"Job {job}: {status.value}")
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
            f"no jobs API at {address} ({first_line(error)}): is the head running with its dashboard "
            "(ray[default]), and is this its address, for example http://HEAD:8265?"
        ) from None

"""The models that regions and fusion read, as their records describe them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpift.checkpoints.opening import file_fingerprint, model_files
from cpift.disk.artifacts import Artifact
from cpift.disk.files import file_sha256, read_json
from cpift.errors import ChangedInput, Problem
from cpift.pipeline.stages.names import ModelRef

INPUTS_RECORD = "inputs.json"


@contextmanager
def hashing(models: Mapping[str, ModelRef], hashed: Collection[str], moments: Mapping[str, Path]) -> Iterator[None]:
    """Hash the files of the models whose labels are in `hashed` beside a block that reads them, and `moments`: by task
    the second moments that it reads too.

    `describe_inputs` then has the hashes; it hashes a file anew that changed meanwhile."""
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cpift-hash") as pool:
        begun = [pool.submit(file_sha256, file) for file in _files(models, hashed, moments)]
        try:
            yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        wait(begun)


def describe_inputs(
    models: Mapping[str, ModelRef], hashed: Collection[str], moments: Mapping[str, Path]
) -> dict[str, Any]:
    """By label each model's fingerprint, and the size of each of its files, with its sha256 for the labels `hashed`;
    and so second moments, `moments <task>`, where anything is hashed."""
    files = _files(models, hashed, moments)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = dict(zip(files, pool.map(file_sha256, files), strict=True))
    read = {label: (model.fingerprint, model_files(model.path)) for label, model in models.items()}
    read |= {f"moments {task}": (file_fingerprint(file), [file]) for task, file in moments.items()}
    return {
        label: {
            "fingerprint": fingerprint,
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": hashes.get(file)} for file in parts},
        }
        for label, (fingerprint, parts) in read.items()
    }


def _files(models: Mapping[str, ModelRef], hashed: Collection[str], moments: Mapping[str, Path]) -> list[Path]:
    files = [file for label in models if label in hashed for file in model_files(models[label].path)]
    return list(dict.fromkeys([*files, *(moments.values() if hashed else ())]))


def require_same_bytes(record: Path, described: Mapping[str, Any], artifact: Artifact) -> None:
    """Raise ChangedInput if core regions were selected from other bytes than those of files of the same name now."""
    selected = read_json(record) if record.is_file() else {}
    problems = [
        Problem(f"{label}: {name}", "is not the file that core regions were selected from", _TOUCH)
        for label, model in selected.items()
        for name, now in described.get(label, {"files": {}})["files"].items()
        if None not in (hashes := {now["sha256"], model["files"].get(name, now)["sha256"]}) and len(hashes) > 1
    ]
    if problems:
        raise ChangedInput(artifact.title, problems)


_TOUCH = "it has the size and time of the other: `touch` it, so that regions are selected anew, and run again"

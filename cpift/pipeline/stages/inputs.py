"""The models that regions and fusion read, as their records describe them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.checkpoints.opening import file_fingerprint, model_files
from cpift.config.run import ResourcesConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.checksums import file_checksum
from cpift.disk.files import file_sha256, read_json
from cpift.errors import ChangedInput, Problem
from cpift.pipeline.stages.names import ModelRef

INPUTS_RECORD = "inputs.json"
_CHECKSUM = "xxh3_128"


@dataclass(frozen=True)
class Inputs:
    """Models by label, and second moments by task. summed: the labels of models all of whose bytes are looked at, which
    moments then are too. hashed: whether weights have a sha256 as well; small files have theirs always."""

    models: Mapping[str, ModelRef]
    summed: Collection[str]
    moments: Mapping[str, Path]
    hashed: bool

    @classmethod
    def of(
        cls,
        models: Mapping[str, ModelRef],
        resources: ResourcesConfig,
        moments: Mapping[str, Path],
        unread: Collection[str] = (),
    ) -> Inputs:
        """As a run looks at them. unread: labels of models that are not read."""
        looking = resources.verify or resources.hash_inputs
        summed = [label for label in models if label not in unread] if looking else []
        return cls(models, summed, moments, resources.hash_inputs)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Look at the bytes of files beside a block that reads them.

        `described` then knows what they are; it looks anew at a file that changed meanwhile."""
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cpift-hash") as pool:
            begun = self._begun(pool)
            try:
                yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            wait([one for of_file in begun.values() for one in of_file.values()])

    def described(self) -> dict[str, Any]:
        """By label each model's fingerprint, and of each of its files the size and, where its bytes are looked at, the
        checksum of weights and the sha256 of what has one; and so second moments, `moments <task>`."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = {
                file: {name: one.result() for name, one in of_file.items()}
                for file, of_file in self._begun(pool).items()
            }
        return {
            label: {
                "fingerprint": fingerprint,
                "files": {
                    file.name: {"bytes": file.stat().st_size, "sha256": None, **found.get(file, {})} for file in files
                },
            }
            for label, (fingerprint, files) in self._read().items()
        }

    def _read(self) -> dict[str, tuple[str, list[Path]]]:
        """By label a fingerprint and the files."""
        read = {label: (model.fingerprint, model_files(model.path)) for label, model in self.models.items()}
        return read | {f"moments {task}": (file_fingerprint(file), [file]) for task, file in self.moments.items()}

    def _begun(self, pool: ThreadPoolExecutor) -> dict[Path, dict[str, Future[str]]]:
        """By file, what its record says of its bytes."""
        files = [file for label in self.models if label in self.summed for file in model_files(self.models[label].path)]
        files += self.moments.values() if self.summed else ()
        begun: dict[Path, dict[str, Future[str]]] = {}
        for file in dict.fromkeys(files):
            weights = file.suffix == ".safetensors"
            begun[file] = {_CHECKSUM: pool.submit(file_checksum, file)} if weights else {}
            begun[file] |= {"sha256": pool.submit(file_sha256, file)} if self.hashed or not weights else {}
        return begun

    def require_as_recorded(self, record: Path, described: Mapping[str, Any], artifact: Artifact) -> None:
        """Raise ChangedInput if core regions were selected from other bytes than those of files of the same name now.

        A record of before there were checksums has a sha256 of everything, which is then found of the file."""
        selected = read_json(record) if record.is_file() else {}
        files = {label: {file.name: file for file in files} for label, (_, files) in self._read().items()}
        problems = [
            Problem(f"{label}: {name}", "is not the file that core regions were selected from", _TOUCH)
            for label, model in selected.items()
            for name, now in described.get(label, {"files": {}})["files"].items()
            if name in model["files"] and _are_others(model["files"][name], now, files[label][name])
        ]
        if problems:
            raise ChangedInput(artifact.title, problems)


def _are_others(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> bool:
    """Whether the bytes of a file are not those of a record, where both were looked at."""
    if now.get(_CHECKSUM) and before.get(_CHECKSUM):
        return bool(now[_CHECKSUM] != before[_CHECKSUM])
    looked_at = now["sha256"] or now.get(_CHECKSUM)
    return bool(looked_at and before["sha256"] and file_sha256(file) != before["sha256"])


_TOUCH = "it has the size and time of the other: `touch` it, so that regions are selected anew, and run again"

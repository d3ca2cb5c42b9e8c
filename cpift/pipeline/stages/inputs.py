"""The models that regions and fusion read, as their records describe them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cpift.checkpoints.opening import model_files
from cpift.disk.files import file_sha256
from cpift.pipeline.stages.names import ModelRef

INPUTS_RECORD = "inputs.json"


def describe_inputs(models: Mapping[str, ModelRef], hashed: bool) -> dict[str, Any]:
    """By label each model's fingerprint, and the size and, if `hashed`, sha256 of each of its files."""
    files = list(dict.fromkeys(file for model in models.values() for file in model_files(model.path)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = dict(zip(files, pool.map(file_sha256, files) if hashed else [None] * len(files), strict=True))
    return {
        label: {
            "fingerprint": model.fingerprint,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": hashes[file]} for file in model_files(model.path)
            },
        }
        for label, model in models.items()
    }

"""cpift: Core Parameter Isolation Fine-Tuning (CPI-FT, arXiv 2508.21741).

Names are looked up when they are first used, so that `import cpift` costs nothing; see docs/python.md.
"""

import os
from typing import TYPE_CHECKING, Any

# Before transformers is imported: with the package `kernels` installed it would run compiled code from the hub.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

if TYPE_CHECKING:
    from cpift.api import RunResult as RunResult
    from cpift.api import diff as diff
    from cpift.api import extract_lora as extract_lora
    from cpift.api import load_config as load_config
    from cpift.api import merge as merge
    from cpift.api import merge_state_dicts as merge_state_dicts
    from cpift.api import plan as plan
    from cpift.api import regions as regions
    from cpift.api import run as run
    from cpift.checkpoints.lora_extraction import Extraction as Extraction
    from cpift.descendants import extend as extend
    from cpift.descendants import forget as forget
    from cpift.errors import CheckpointError as CheckpointError
    from cpift.errors import ConfigError as ConfigError
    from cpift.errors import CpiftError as CpiftError
    from cpift.errors import DataError as DataError
    from cpift.errors import StageError as StageError
    from cpift.evaluation.metrics import Metric as Metric
    from cpift.evaluation.metrics import Reply as Reply
    from cpift.merge_folder import MergeResult as MergeResult
    from cpift.merging.base import MergeMethod as MergeMethod
    from cpift.merging.conflicts import Claims as Claims
    from cpift.merging.conflicts import ConflictRule as ConflictRule
    from cpift.merging.forms import UpdateMerge as UpdateMerge
    from cpift.merging.forms import WeightedMerge as WeightedMerge
    from cpift.method.changes import Change as Change
    from cpift.method.cores import Core as Core
    from cpift.method.cores import Cores as Cores
    from cpift.method.freeze_callback import FreezeCallback as FreezeCallback
    from cpift.method.freeze_callback import frozen as frozen
    from cpift.model_diff import ModelDiff as ModelDiff

    __version__: str

_HOMES = {
    "api": ("RunResult", "diff", "extract_lora", "load_config", "merge", "merge_state_dicts", "plan", "regions", "run"),
    "method.changes": ("Change",),
    "method.cores": ("Core", "Cores"),
    "checkpoints.lora_extraction": ("Extraction",),
    "descendants": ("extend", "forget"),
    "errors": ("CheckpointError", "ConfigError", "CpiftError", "DataError", "StageError"),
    "method.freeze_callback": ("FreezeCallback", "frozen"),
    "evaluation.metrics": ("Metric", "Reply"),
    "merge_folder": ("MergeResult",),
    "merging.base": ("MergeMethod",),
    "merging.forms": ("UpdateMerge", "WeightedMerge"),
    "merging.conflicts": ("Claims", "ConflictRule"),
    "model_diff": ("ModelDiff",),
}  # module → the names that are public here
_PUBLIC = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Change",
    "CheckpointError",
    "Claims",
    "ConfigError",
    "ConflictRule",
    "Core",
    "Cores",
    "CpiftError",
    "DataError",
    "Extraction",
    "FreezeCallback",
    "MergeMethod",
    "MergeResult",
    "Metric",
    "ModelDiff",
    "Reply",
    "RunResult",
    "StageError",
    "UpdateMerge",
    "WeightedMerge",
    "__version__",
    "diff",
    "extend",
    "extract_lora",
    "forget",
    "frozen",
    "load_config",
    "merge",
    "merge_state_dicts",
    "plan",
    "regions",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _PUBLIC:
        from importlib import import_module

        value = getattr(import_module(f"cpift.{_PUBLIC[name]}"), name)
    else:
        raise AttributeError(f"module 'cpift' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cpift")
    except PackageNotFoundError:  # imported from a source tree that was never installed
        return "0+unknown"

"""The table of all ways to merge: config, plan, identity, model card, reference and comparisons ask it."""

from __future__ import annotations

from cpift.errors import entry
from cpift.merging.base import MergeMethod
from cpift.merging.methods.cpift import Fusion
from cpift.merging.methods.dare import Dare
from cpift.merging.methods.linear import Linear
from cpift.merging.methods.slerp import Slerp
from cpift.merging.methods.task_arithmetic import TaskArithmetic
from cpift.merging.methods.ties import Ties

METHODS: dict[str, type[MergeMethod]] = {
    "cpift": Fusion,
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
}


def method_named(name: str) -> type[MergeMethod]:
    """Raises CpiftError for a name that is none of METHODS."""
    return entry(METHODS, name, "fusion.method")

"""What a check of a merged model says, and comparisons of tensors bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import pieces


class Check(TypedDict):
    """What was compared after the work, and whether it is as it has to be."""

    name: str
    passed: bool | None  # None: there was nothing to compare
    detail: str


OnElements = Callable[[int, str], None]  # elements since the last call, and the tensor they belong to


def failures(checks: Sequence[Check]) -> list[str]:
    """The checks that failed, in words. One that had nothing to compare did not fail."""
    return [f"{check['name']}: {check['detail']}" for check in checks if check["passed"] is False]


def compared(name: str, count: int, wrong: Sequence[str] | int, what: str, more: str = "") -> Check:
    """A check that looked at so many things; `wrong`: those that are not as they have to be, or how many."""
    if not count:
        return {"name": name, "passed": None, "detail": f"nothing to compare: {what}"}
    listed = "" if isinstance(wrong, int) or not wrong else f", wrong: {', '.join(wrong[:5])}"
    return {"name": name, "passed": not wrong, "detail": what + listed + more}


def check_copied(source: Checkpoint, written: Checkpoint, names: Sequence[str]) -> Check:
    """Tensors outside the parameter space equal θ_base bit for bit."""
    wrong = [name for name in names if not _same_bits(source, written, name)]
    name = "every tensor outside the parameter space equals the backbone bit for bit"
    what = f"{len(names)} tensors compared, {len(wrong)} differ" if names else "every tensor is in it"
    return compared(name, len(names), wrong, what)


def _same_bits(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    import torch

    return all(
        torch.equal(one.slice(name, *piece).view(torch.uint8), other.slice(name, *piece).view(torch.uint8))
        for piece in pieces(one.tensors[name].numel)
    )

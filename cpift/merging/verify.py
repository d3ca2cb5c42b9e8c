"""What a merge wrote, read back from the disk and compared with its inputs, by code that did not write it.

The cores are compared with their donors bit for bit, all of them; elsewhere the definition is evaluated for a sample
(`definition`). At last transformers is asked whether it takes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift_kernels import count_mask, gather_masked, union_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import is_finite
from cpift.checkpoints.layout import loading_faults
from cpift.checkpoints.slices import pieces, sweep
from cpift.formats.safetensors import TensorInfo
from cpift.merging.definition import check_definition
from cpift.merging.engine import Progress
from cpift.merging.fusion import Fusion
from cpift.merging.methods import Baseline
from cpift.text.units import show_size

if TYPE_CHECKING:
    import torch

Check = dict[str, Any]  # name, passed (None where there was nothing to compare), detail


def verify(
    method: Fusion | Baseline, like: Checkpoint, folder: Path, progress: Progress = lambda elements, name: None
) -> list[Check]:
    """Check the checkpoint in `folder`, which `method` made with the layout of `like`."""
    written = Checkpoint(folder)
    checks = [_accounted(like, written)]
    if isinstance(method, Fusion):
        checks += [_cores(method, written, progress), _outside(method, written)]
    return [*checks, check_definition(method, written), _finite(written)]


def failures(checks: Sequence[Check]) -> list[str]:
    """The checks that failed, in words. One that had nothing to compare has not."""
    return [f"{check['name']}: {check['detail']}" for check in checks if check["passed"] is False]


def _compared(name: str, compared: int, wrong: Sequence[str] | int, what: str, more: str = "") -> Check:
    """A check that looked at so many things; `wrong`: those that are not as they have to be, or how many."""
    if not compared:
        return {"name": name, "passed": None, "detail": f"nothing to compare: {what}"}
    listed = "" if isinstance(wrong, int) or not wrong else f", wrong: {', '.join(wrong[:5])}"
    return {"name": name, "passed": not wrong, "detail": what + listed + more}


def _finite(written: Checkpoint) -> Check:
    floating = [info.name for info in written.tensors.values() if info.floating and info.numel]
    bad = [name for name in floating if not is_finite(written, name)]
    return _compared("every element of the fused model is finite", len(floating), bad, f"{len(floating)} tensors")


def _accounted(like: Checkpoint, written: Checkpoint) -> Check:
    wanted = {name: (info.shape, info.dtype) for name, info in like.tensors.items()}
    found = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    name = "every tensor of the inputs is in the fused model, with shape and dtype, and no other"
    return _compared(name, len(wanted), wrong, f"{len(wanted)} tensors")


def _cores(fusion: Fusion, written: Checkpoint, progress: Progress) -> Check:
    """Compare every core element that has one donor with that donor, bit for bit."""
    compared = differing = 0
    for info in written.tensors.values():
        for start, stop in sweep([*fusion.models, written], info, pieces(info.numel)):
            progress(stop - start, info.name)
            if fusion.masks.has(info.name):
                more, wrong = _slice_cores(fusion, written, info, start, stop)
                compared, differing = compared + more, differing + wrong
    name = "every core element of the fused model equals its donor bit for bit"
    what = (
        f"{compared:,} elements compared, {differing:,} differ" if compared else "no element is one task's core alone"
    )
    return _compared(name, compared, differing, what)


def _slice_cores(fusion: Fusion, written: Checkpoint, info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    import torch

    operands = fusion.operands(info.name, start, stop)
    if count_mask(operands.core) == 0:
        return 0, 0
    out, compared, differing = written.slice(info.name, start, stop), 0, 0
    owned = [mask for mask in operands.masks if mask is not None]
    for source, mask in zip(operands.sources, operands.masks, strict=True):
        if mask is None:
            continue
        others = [other for other in owned if other is not mask]
        sole = mask & ~union_mask(others) if others else mask
        got, donor = gather_masked(out, sole), gather_masked(source, sole).to(out.dtype)
        compared += donor.numel()
        differing += int((got.view(torch.uint8) != donor.view(torch.uint8)).sum())
    return compared, differing


def _outside(fusion: Fusion, written: Checkpoint) -> Check:
    """Tensors outside the parameter space equal θ_base bit for bit."""
    names = [name for name in written.names if not fusion.masks.has(name)]
    wrong = [name for name in names if not _same_bits(fusion.inputs.backbone, written, name)]
    name = "every tensor outside the parameter space equals the backbone bit for bit"
    what = f"{len(names)} tensors compared, {len(wrong)} differ" if names else "every tensor is in it"
    return _compared(name, len(names), wrong, what)


def _same_bits(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    import torch

    return all(
        torch.equal(one.slice(name, *piece).view(torch.uint8), other.slice(name, *piece).view(torch.uint8))
        for piece in pieces(one.tensors[name].numel)
    )


def check_loads(folder: Path, memory: int) -> Check:
    """Whether transformers takes the model: every parameter of the class that config.json names is there with its
    shape, as its own loading has it, and the logits are finite where the model fits into so many bytes."""
    name, written = "transformers takes every tensor of the fused model", Checkpoint(folder)
    wrong = loading_faults(written)
    if not wrong and written.nbytes <= memory:
        try:
            logits = _logits(folder)
        except Exception as error:  # the model's own code: whatever it says, the merge is not to be lost
            wrong = [f"{type(error).__name__}: {error}"]
        else:
            detail, passed = f"loaded, {logits.numel():,} logits", bool(logits.isfinite().all())
            return {"name": f"{name}, and its logits are finite", "passed": passed, "detail": detail}
    why = f"; not loaded, for it is larger than the memory budget ({show_size(memory)})"
    count = len(written.tensors)
    return _compared(name, count, wrong, f"{count} tensors by name and shape", "" if wrong else why)


def _logits(folder: Path) -> torch.Tensor:
    import torch

    from cpift.models.sources import load_model

    with torch.inference_mode():
        model = load_model(folder)
        rows = model.get_input_embeddings().num_embeddings
        tokens = torch.arange(1, 9)[None] % int(rows)  # type: ignore[arg-type]
        logits: torch.Tensor = model(tokens, use_cache=False).logits  # some classes build no cache of every config
    return logits

"""What a merge wrote, read back from the disk and compared with its inputs, by code that did not write it.

The cores are compared with their donors bit for bit, all of them; elsewhere the definition is evaluated for a sample
(`verify_definition`). At last transformers is asked whether it takes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpift_kernels import count_mask, gather_masked, union_mask

from cpift.checkpoints import Checkpoint, is_finite
from cpift.errors import StageError
from cpift.fusion import Fusion
from cpift.merging import Progress
from cpift.methods import Baseline
from cpift.safetensors_files import TensorInfo
from cpift.streaming import pieces, sweep
from cpift.units import show_size
from cpift.verify_definition import check_definition

Check = dict[str, Any]  # name, passed, detail


def verify(
    method: Fusion | Baseline, like: Checkpoint, folder: Path, progress: Progress = lambda elements, name: None
) -> list[Check]:
    """Check the checkpoint in `folder`, which `method` made with the layout of `like`.

    Raises StageError that lists every check that failed.
    """
    written = Checkpoint(folder)
    checks = [_accounted(like, written)]
    if isinstance(method, Fusion):
        checks += [_cores(method, written, progress), _outside(method, written)]
    checks += [check_definition(method, written), _finite(written)]
    require_passed(checks)
    return checks


def require_passed(checks: Sequence[Check]) -> None:
    """Raise StageError that lists the checks that failed, if any did."""
    failed = [f"  - {check['name']}: {check['detail']}" for check in checks if not check["passed"]]
    if failed:
        raise StageError("the fused model is not what it has to be; it is not kept\n" + "\n".join(failed))


def _finite(written: Checkpoint) -> Check:
    bad = [info.name for info in written.tensors.values() if info.floating and not is_finite(written, info.name)]
    detail = f"{len(written.names)} tensors" + (f", not so: {', '.join(bad[:5])}" if bad else "")
    return {"name": "every element of the fused model is finite", "passed": not bad, "detail": detail}


def _accounted(like: Checkpoint, written: Checkpoint) -> Check:
    wanted = {name: (info.shape, info.dtype) for name, info in like.tensors.items()}
    found = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return {
        "name": "every tensor of the inputs is in the fused model, with shape and dtype, and no other",
        "passed": not wrong,
        "detail": f"{len(wanted)} tensors" + (f", wrong: {', '.join(wrong[:5])}" if wrong else ""),
    }


def _cores(fusion: Fusion, written: Checkpoint, progress: Progress) -> Check:
    """Compare every core element that has one donor with that donor, bit for bit."""
    compared = differing = 0
    for info in written.tensors.values():
        for start, stop in sweep([*fusion.models, written], info, pieces(info.numel)):
            progress(stop - start, info.name)
            if fusion.masks.has(info.name):
                more, wrong = _slice_cores(fusion, written, info, start, stop)
                compared, differing = compared + more, differing + wrong
    return {
        "name": "every core element of the fused model equals its donor bit for bit",
        "passed": differing == 0,
        "detail": f"{compared:,} elements compared, {differing:,} differ",
    }


def _slice_cores(fusion: Fusion, written: Checkpoint, info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
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
    return {
        "name": "every tensor outside the parameter space equals the backbone bit for bit",
        "passed": not wrong,
        "detail": f"{len(names)} tensors compared, {len(wrong)} differ",
    }


def _same_bits(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    return all(
        torch.equal(one.slice(name, *piece).view(torch.uint8), other.slice(name, *piece).view(torch.uint8))
        for piece in pieces(one.tensors[name].numel)
    )


def check_loads(folder: Path, memory: int) -> Check:
    """Whether transformers takes the model: names and shapes, and finite logits where it fits into so many bytes."""
    from cpift.models import load_model
    from cpift.pretrained import empty_network

    written = Checkpoint(folder)
    name = "transformers takes every tensor of the fused model"
    if written.nbytes <= memory:
        with torch.inference_mode():
            logits = load_model(folder)(torch.arange(1, 9)[None]).logits
        return {
            "name": f"{name}, and its logits are finite",
            "passed": bool(logits.isfinite().all()),
            "detail": f"loaded, {logits.numel():,} logits",
        }
    with torch.device("meta"):
        network = empty_network(folder)
    wanted = {key: tuple(tensor.shape) for key, tensor in network.named_parameters()}
    wrong = sorted(
        key for key, shape in wanted.items() if key in written.tensors and written.tensors[key].shape != shape
    )
    wrong += sorted(key for key in wanted if key not in written.tensors)
    detail = f"{len(wanted)} parameters by name and shape" + (f", wrong: {', '.join(wrong[:5])}" if wrong else "")
    why = f"; not loaded, for it is larger than the memory budget ({show_size(memory)})"
    return {"name": name, "passed": not wrong, "detail": detail + why}

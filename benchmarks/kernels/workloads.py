"""What speed.py times: for each operation its inputs, the bytes it must move, a check and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpift_kernels as ck
import torch
from torch import Tensor

from benchmarks.merging.mergekit_environment import MergekitSlerp

Run = Callable[[], Any]
CHUNK = 1 << 22


@dataclass(frozen=True)
class Workload:
    """One operation on one set of inputs.

    bytes: what must be read and written, once; reads: the tensors that the read ceiling is measured on; ours: by
    backend; check: raises AssertionError if a result of `ours` is wrong; result_bytes: what a run allocates for its
    result; rivals: plain torch and mergekit, `close` ends what they hold.
    """

    bytes: int
    reads: list[Tensor]
    ours: Callable[[ck.Backend], Any]
    check: Callable[[Any], None]
    result_bytes: int = 0
    rivals: dict[str, Run] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Setting:
    """elements of each model, dtype, number of tasks, share of the elements in a core, device, mergekit's folder."""

    elements: int
    dtype: torch.dtype
    tasks: int
    share: float
    device: str
    mergekit: Path | None = None

    def models(self) -> list[Tensor]:
        """θ0 and `tasks` fine-tunes of it: relative updates of about 1 %, made in chunks."""
        generator = torch.Generator(self.device).manual_seed(0)
        models = [torch.empty(self.elements, dtype=self.dtype, device=self.device) for _ in range(self.tasks + 1)]
        for part in chunks(self.elements):
            noise = [torch.randn(part.stop - part.start, generator=generator, device=self.device) for _ in models]
            models[0][part] = noise[0].to(self.dtype)
            for model, update in zip(models[1:], noise[1:], strict=True):
                model[part] = (models[0][part].float() + 0.01 * update).to(self.dtype)
        return models

    def masks(self) -> list[Tensor]:
        """`tasks` random packed masks of the given share."""
        generator = torch.Generator(self.device).manual_seed(1)
        parts: list[list[Tensor]] = [[] for _ in range(self.tasks)]
        for part in chunks(self.elements):
            for task in parts:
                draw = torch.rand(part.stop - part.start, generator=generator, device=self.device)
                task.append(ck.pack_mask(draw < self.share))
        return [torch.cat(task) for task in parts]


def chunks(elements: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, elements)) for start in range(0, elements, CHUNK))


def select(s: Setting) -> Workload:
    models, count = s.models(), int(s.share * s.elements)
    base, tuned = models[0], models[1:]

    def check(cores: list[list[ck.CoreMask]]) -> None:
        for model, (core,) in zip(tuned, cores, strict=True):
            _check_selection(base, model, core, count)

    def magnitude(model: Tensor) -> Tensor:
        return (model.float() - base.float()).abs()

    return Workload(
        bytes=sum(map(_nbytes, models)) + s.tasks * s.elements // 8,
        reads=models,
        ours=lambda backend: ck.select_cores([base], [[m] for m in tuned], [count], backend=backend),
        check=check,
        result_bytes=s.tasks * s.elements // 8,
        rivals={
            "torch.kthvalue": lambda: [magnitude(m).kthvalue(s.elements - count).values for m in tuned],
            "torch.topk": lambda: [magnitude(m).topk(count, sorted=False).indices for m in tuned],
        },
    )


def _check_selection(base: Tensor, model: Tensor, core: ck.CoreMask, count: int) -> None:
    """Marked are all above the threshold and the first of those at it, `count` in all."""
    words, above, ties, open_tie = core.words[0], 0, 0, True
    for part in chunks(base.numel()):
        magnitude = (model[part].float() - base[part].float()).abs()
        bits = ck.unpack_mask(words[part.start // 32 : (part.stop + 31) // 32], part.stop - part.start)
        assert torch.equal(bits & (magnitude != core.threshold), magnitude > core.threshold)
        tied = bits[magnitude == core.threshold]
        first = int(tied.sum())
        assert bool(tied[:first].all())
        assert open_tie or first == 0, "a tie was marked after one that was not"
        open_tie = open_tie and first == len(tied)
        above, ties = above + int((magnitude > core.threshold).sum()), ties + first
    assert above + ties == count == core.count


def gram(s: Setting) -> Workload:
    models, excluded = s.models(), ck.union_mask(s.masks())
    expected: list[Tensor] = []

    def check(result: Tensor) -> None:
        if not expected:
            expected.append(ck.masked_gram(models[0], models[1:], excluded, backend="reference"))
        assert torch.equal(result, expected[0])

    def plain() -> Tensor:
        kept = ~ck.unpack_mask(excluded, s.elements)
        base = torch.where(kept, models[0].float(), 0.0)
        vectors = [base, *(torch.where(kept, m.float(), 0.0) - base for m in models[1:])]
        return torch.stack([torch.stack([torch.dot(a, b) for b in vectors]) for a in vectors])

    return Workload(
        bytes=sum(map(_nbytes, models)) + s.elements // 8,
        reads=models,
        ours=lambda backend: ck.masked_gram(models[0], models[1:], excluded, backend=backend),
        check=check,
        rivals={"torch": plain},
    )


def apply(s: Setting) -> Workload:
    models, out = s.models(), torch.empty(s.elements, dtype=s.dtype, device=s.device)
    masks = ck.resolve_conflicts("last", models[0], models[1:], s.masks(), backend="reference")
    scale = torch.full((1, s.tasks + 1), 1 / (s.tasks + 1), dtype=torch.float64)

    def fuse(backend: ck.Backend) -> Tensor:
        ck.fused_apply(out, models, scale, [None, *masks], backend=backend)
        return out

    def check(result: Tensor) -> None:
        epsilon = torch.finfo(s.dtype).eps
        for part in chunks(s.elements):
            words = [mask[part.start // 32 : (part.stop + 31) // 32] for mask in masks]
            want, values = torch.empty_like(result[part]), [model[part] for model in models]
            ck.fused_apply(want, values, scale, [None, *words], backend="reference")
            error = (result[part].float() - want.float()).abs()
            assert bool((error <= epsilon * want.float().abs() + 1e-6).all())
        out.fill_(float("nan"))

    def plain() -> Tensor:
        total: Any = sum(m.float() * float(scale[0, 0]) for m in models)
        for model, mask in zip(models[1:], masks, strict=True):
            total = torch.where(ck.unpack_mask(mask, s.elements), model.float(), total)
        fused: Tensor = total.to(s.dtype)
        return fused

    return Workload(
        bytes=sum(map(_nbytes, models)) + s.tasks * s.elements // 8 + _nbytes(out),
        reads=models,
        ours=fuse,
        check=check,
        rivals={"torch": plain},
    )


def slerp(s: Setting) -> Workload:
    """Plain SLERP of two whole vectors: Gram, coefficients, one combination."""
    models, out = s.models(), torch.empty(s.elements, dtype=s.dtype, device=s.device)
    nothing = torch.zeros((s.elements + 31) // 32, dtype=torch.int32, device=s.device)

    def fuse(backend: ck.Backend) -> Tensor:
        gram = ck.masked_gram(models[0], models[1:], nothing, backend=backend)
        ck.fused_apply(
            out, models, ck.slerp_coefficients(gram, [0.5], 1e-6).coefficients, [None, None], backend=backend
        )
        return out

    squares = _dot(models[0], models[0]) * _dot(models[1], models[1])
    angle = math.acos(_dot(models[0], models[1]) / math.sqrt(squares))
    scale = math.sin(angle / 2) / math.sin(angle)
    rivals: dict[str, Run] = {}
    theirs = MergekitSlerp(s.mergekit, models, 0.5) if s.mergekit and s.device == "cpu" else None
    if theirs:
        rivals["mergekit"] = theirs.run

    def close(result: Tensor, expected: Callable[[slice], Tensor], tolerance: float = 0.0) -> None:
        """Within two units in the last place of the summands (coefficients are fp32), or the relative tolerance."""
        allowed = max(2 * torch.finfo(s.dtype).eps, tolerance)
        for part in chunks(s.elements):
            summands = scale * sum(model[part].double().abs() for model in models)
            assert bool(((result[part].double() - expected(part)).abs() <= allowed * summands).all())

    def check(result: Tensor) -> None:
        close(result, lambda part: scale * (models[0][part].double() + models[1][part].double()))
        if theirs:
            theirs.run()
            close(theirs.result(), lambda part: result[part].double(), 1e-4)  # it takes LERP from cosΩ = 0.9995 on

    return Workload(
        bytes=2 * sum(map(_nbytes, models)) + _nbytes(out),
        reads=models,
        ours=fuse,
        check=check,
        rivals=rivals,
        close=theirs.close if theirs else lambda: None,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return sum(float(torch.dot(a[part].double(), b[part].double())) for part in chunks(a.numel()))


def overlap(s: Setting) -> Workload:
    masks = s.masks()
    expected = ck.overlap_counts([[m] for m in masks], backend="reference")

    def check(result: Tensor) -> None:
        assert torch.equal(result, expected)

    return Workload(
        bytes=sum(map(_nbytes, masks)),
        reads=masks,
        ours=lambda backend: ck.overlap_counts([[m] for m in masks], backend=backend),
        check=check,
    )


def freeze(s: Setting) -> Workload:
    """Save the frozen elements, zero them, put them back."""
    values, words = s.models()[0], s.masks()[0]
    before, count = values.clone(), ck.count_mask(words)

    def cycle(backend: ck.Backend) -> Tensor:
        saved = ck.gather_masked(values, words, backend=backend)
        ck.zero_masked_(values, words, backend=backend)
        ck.scatter_masked_(values, words, saved, backend=backend)
        return saved

    def check(saved: Tensor) -> None:
        assert torch.equal(values, before)
        assert torch.equal(saved, ck.gather_masked(values, words, backend="reference"))

    # the mask three times, the frozen values read and written twice and zeroed; whole cache lines are the machine's
    return Workload(
        bytes=3 * _nbytes(words) + 5 * count * values.element_size(),
        reads=[values],
        ours=cycle,
        check=check,
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


WORKLOADS: dict[str, Callable[[Setting], Workload]] = {
    "select_cores": select,
    "masked_gram": gram,
    "fused_apply": apply,
    "slerp": slerp,
    "overlap_counts": overlap,
    "freeze": freeze,
}

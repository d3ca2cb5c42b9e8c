"""Every operation on the card against its reference on the CPU: the same bits, or what rounding allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cpift_kernels as ck
import torch
from torch import Tensor

from benchmarks.gpu.card import Card, Sizes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RAW = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TASKS = 3


class WrongError(Exception):
    """A result that differs from the reference's."""


def same(what: str, found: Tensor, wanted: Tensor) -> None:
    """Bit for bit, or WrongError."""
    mine, its = (x.detach().cpu().contiguous().view(RAW[x.element_size()]).view(-1) for x in (found, wanted))
    if len(mine) != len(its):
        raise WrongError(f"{what}: {len(mine)} elements, not {len(its)}")
    if differ := (mine != its).nonzero().view(-1).tolist():
        raise WrongError(f"{what}: {len(differ)} of {len(mine)} elements differ, the first at {differ[0]}")


def close(what: str, found: Tensor, wanted: Tensor, allowed: Tensor) -> None:
    """Within `allowed` of each element, or WrongError."""
    wrong = (found.cpu().double() - wanted.double()).abs() > allowed
    if bool(wrong.any()):
        raise WrongError(f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are further off than rounding allows")


@dataclass(frozen=True)
class Inputs:
    """θ0, fine-tunes and masks on the CPU, and `there`: a copy of one on the card, off any alignment if asked."""

    dtype: torch.dtype
    sizes: list[int]
    device: str
    offset: int = 0

    def models(self) -> list[list[Tensor]]:
        """[task + 1][tensor]; a part of each did not change."""
        generator = torch.Generator().manual_seed(len(self.sizes))
        base = [torch.randn(size, generator=generator) for size in self.sizes]
        tuned = []
        for _ in range(TASKS):
            step = [0.02 * torch.randn(size, generator=generator) for size in self.sizes]
            moved = [torch.rand(size, generator=generator) < 0.7 for size in self.sizes]
            tuned.append([x + s * m for x, s, m in zip(base, step, moved, strict=True)])
        return [[x.to(self.dtype) for x in model] for model in (base, *tuned)]

    def masks(self, share: float = 0.3) -> list[list[Tensor]]:
        """[task][tensor], packed."""
        generator = torch.Generator().manual_seed(7)
        return [[ck.pack_mask(torch.rand(n, generator=generator) < share) for n in self.sizes] for _ in range(TASKS)]

    def there(self, tensor: Tensor) -> Tensor:
        offset = self.offset if tensor.dtype in DTYPES.values() else 0
        placed = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=self.device)[offset:]
        return placed.copy_(tensor.view(-1))


def selection(x: Inputs) -> None:
    models, total = x.models(), sum(x.sizes)
    there = [[x.there(tensor) for tensor in model] for model in models]
    for counts in ([max(total // 100, 1), total // 2], [0, total]):
        found = ck.select_cores(there[0], there[1:], counts, backend="triton")
        wanted = ck.select_cores(models[0], models[1:], counts, backend="reference")
        for task, cores in enumerate(zip(found, wanted, strict=True)):
            for mine, its in zip(*cores, strict=True):
                if (mine.count, mine.threshold) != (its.count, its.threshold):
                    raise WrongError(
                        f"task {task}: {mine.count} above {mine.threshold}, not {its.count}, {its.threshold}"
                    )
                for t, (a, b) in enumerate(zip(mine.words, its.words, strict=True)):
                    same(f"mask of task {task}, tensor {t}", a, b)


def nonfinite(x: Inputs) -> None:
    """A NaN is named, and is none of the results."""
    models = [[x.there(tensor) for tensor in model] for model in x.models()]
    models[2][-1][-1] = float("nan")
    try:
        ck.select_cores(models[0], models[1:], [1], backend="triton")
    except ValueError as error:
        if f"task 1, tensor {len(x.sizes) - 1}" in str(error):
            return
        raise WrongError(f"a NaN in the last tensor of task 1 is named so: {error}") from None
    raise WrongError("a NaN in the last tensor of task 1 is not noticed")


def overlaps(x: Inputs) -> None:
    masks = x.masks()
    there = [[x.there(words) for words in task] for task in masks]
    found = ck.overlap_counts_per_tensor(there, backend="triton")
    same("counts", found, ck.overlap_counts_per_tensor(masks, backend="reference"))


def conflicts(x: Inputs) -> None:
    base, *tuned = [model[-1] for model in x.models()]
    masks = [task[-1] for task in x.masks()]
    for policy in ("magnitude", "last", "mean"):
        there = [x.there(tensor) for tensor in (base, *tuned)]
        words = [x.there(mask) for mask in masks]
        found = ck.resolve_conflicts(policy, there[0], there[1:], words, backend="triton")
        wanted = ck.resolve_conflicts(policy, base, tuned, masks, backend="reference")
        for task, (a, b) in enumerate(zip(found, wanted, strict=True)):
            same(f"{policy}, mask of task {task}", a, b)


def gram(x: Inputs) -> None:
    base, *tuned = [model[-1] for model in x.models()]
    mask = x.masks()[0][-1]
    there, words = [x.there(tensor) for tensor in (base, *tuned)], x.there(mask)
    first, again = (ck.masked_gram(there[0], there[1:], words, backend="triton") for _ in range(2))
    same("the second time", first, again)
    wanted = ck.masked_gram(base, tuned, mask, backend="reference")
    same("inner products", first, wanted)


def apply(x: Inputs) -> None:
    sources = [model[-1] for model in x.models()]
    masks = [None, *(task[-1] for task in x.masks())]
    scale = torch.tensor([[0.4, -0.2, 0.5, 0.3]], dtype=torch.float64)
    out, wanted = x.there(sources[0]), torch.empty_like(sources[0])
    words = [None if mask is None else x.there(mask) for mask in masks]
    ck.fused_apply(out, [x.there(source) for source in sources], scale, words, backend="triton")
    ck.fused_apply(wanted, sources, scale, masks, backend="reference")
    same("fused elements", out, wanted)


def together(x: Inputs) -> None:
    """All tensors of a model in one buffer."""
    layout, models, masks = ck.FlatLayout(x.sizes), x.models(), x.masks()
    here = [laid(model, layout) for model in models]
    words = [laid(task, layout) for task in masks]
    there, held = [x.there(model) for model in here], [x.there(task) for task in words]
    found = ck.flat_overlaps(held, layout, backend="triton")
    same("counts", found, ck.flat_overlaps(words, layout, backend="reference"))
    found = ck.flat_gram(there[0], there[1:], held[0], layout, elements=4096, backend="triton")
    wanted = ck.flat_gram(here[0], here[1:], words[0], layout, elements=4096, backend="reference")
    same("inner products", found, wanted)
    scales = torch.linspace(-0.3, 0.5, len(x.sizes) * len(here)).view(len(x.sizes), -1)
    out, fused = torch.zeros_like(there[0]), torch.zeros_like(here[0])
    ck.flat_apply(out, there, scales.to(out.device), [None, *held], layout, backend="triton")
    ck.flat_apply(fused, here, scales, [None, *words], layout, backend="reference")
    for t in range(len(x.sizes)):
        same(f"fused elements of tensor {t}", layout.tensor(out, t), layout.tensor(fused, t))


def laid(parts: Sequence[Tensor], layout: ck.FlatLayout) -> Tensor:
    """Tensors, or their masks, at their places in a buffer, with zeros between them."""
    masks = parts[0].dtype == torch.int32
    flat = torch.zeros(layout.total // (32 if masks else 1), dtype=parts[0].dtype, device=parts[0].device)
    for number, part in enumerate(parts):
        (layout.words if masks else layout.tensor)(flat, number).copy_(part)
    return flat


def magnitudes(x: Inputs) -> None:
    base, tuned = (model[-1] for model in x.models()[:2])
    found = ck.delta_magnitudes(x.there(base), x.there(tuned), backend="triton")
    wanted = ck.delta_magnitudes(base, tuned, backend="reference")
    same("largest", found.largest, wanted.largest)
    same("changed", found.changed, wanted.changed)
    for name in ("l1", "squares", "origin_squares"):
        close(name, getattr(found, name), getattr(wanted, name), 2.0**-40 * getattr(wanted, name))


def freezing(x: Inputs) -> None:
    values, mask = x.models()[0][-1], x.masks()[0][-1]
    there, words = x.there(values), x.there(mask)
    saved = ck.gather_masked(there, words, backend="triton")
    same("saved", saved, ck.gather_masked(values, mask, backend="reference"))
    zeroed = values.clone()
    ck.zero_masked_(there, words, backend="triton")
    ck.zero_masked_(zeroed, mask, backend="reference")
    same("zeroed", there, zeroed)
    ck.scatter_masked_(there, words, saved, backend="triton")
    same("put back", there, values)


def holding(x: Inputs) -> None:
    values, masks = x.models()[0], x.masks()[0]
    there, words = [x.there(tensor) for tensor in values], [x.there(mask) for mask in masks]
    found = ck.hold_masked(there, words, backend="triton")
    wanted = ck.hold_masked(values, masks, backend="reference")
    moved = [tensor + 1 for tensor in values]
    for tensor, other in zip(there, moved, strict=True):
        tensor.copy_(other)
    for one, list_ in ((found, there), (wanted, moved)):
        one.restore_(list_)
        one.zero_(len(list_) - 1, list_[-1])
    for t, (a, b) in enumerate(zip(there, moved, strict=True)):
        same(f"tensor {t}", a, b)
    # A pull's arithmetic is torch's, whose CPU and GPU kernels may round a lerp differently by one unit.
    for one, list_ in ((found, there), (wanted, moved)):
        one.pull_(list_, [0.25] * len(list_))
    for t, (a, b) in enumerate(zip(there, moved, strict=True)):
        close(f"pulled tensor {t}", a, b, torch.finfo(x.dtype).eps * 2 * b.double().abs() + 1e-6)


OPERATIONS: dict[str, Callable[[Inputs], None]] = {
    "select_cores": selection,
    "what is not finite": nonfinite,
    "overlap_counts": overlaps,
    "resolve_conflicts": conflicts,
    "masked_gram": gram,
    "fused_apply": apply,
    "all tensors in one buffer": together,
    "delta_magnitudes": magnitudes,
    "gather, zero, scatter": freezing,
    "hold_masked": holding,
}


def cases(card: Card, sizes: Sizes) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and check of every operation, dtype, alignment and size."""
    for operation, check in OPERATIONS.items():
        for name, dtype in DTYPES.items():
            for offset in (0, 1):
                for last in sizes.small:
                    inputs = Inputs(dtype, [sizes.small[-1] // 2, 1, last], card.device, offset)
                    where = f"{operation}, {name}, {last} elements" + (", off its alignment" if offset else "")
                    yield where, partial(check, inputs)

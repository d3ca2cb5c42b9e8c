"""How fast, and with how many launches and waits: kernels alone, calls over a whole model, copies, a captured step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cpift_kernels as ck
import torch
from torch import Tensor

from benchmarks.gpu.bits import WrongError, laid, same
from benchmarks.gpu.card import Action, Card, Sizes
from benchmarks.kernels.workloads import WORKLOADS, Setting

Row = dict[str, Any]
OPERATIONS = ("select_cores", "masked_gram", "fused_apply", "overlap_counts", "freeze")


def copy_rate(card: Card, sizes: Sizes) -> float:
    """Bytes a second read and written by a copy in the card's memory."""
    source = torch.ones(sizes.copied, dtype=torch.int16, device=card.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / card.seconds(lambda: target.copy_(source), sizes.repeats)


def large(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Large tensors against independent checks; no times."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for tasks in sizes.tasks:
            for operation in OPERATIONS:
                workload = WORKLOADS[operation](Setting(sizes.large, dtype, tasks, 0.01, card.device))
                try:
                    for _ in range(2):
                        workload.check(workload.ours("triton"))
                except AssertionError as error:
                    raise WrongError(f"{operation}, {name}, {sizes.large} elements, {tasks} tasks: {error}") from None
                yield {"operation": operation, "dtype": name, "elements": sizes.large, "tasks": tasks, "correct": True}


def far(card: Card, sizes: Sizes) -> Iterator[Row]:
    """One tensor longer than 32-bit indices: what lies at its end is found, and put back there."""
    base, tuned = (torch.zeros(sizes.far, dtype=torch.bfloat16, device=card.device) for _ in range(2))
    places = torch.tensor([3, sizes.far // 2, sizes.far - 4000, sizes.far - 1])
    tuned[places.to(card.device)] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device=card.device)
    (core,) = ck.select_cores([base], [[tuned]], [len(places)], backend="triton")[0]
    words = torch.zeros_like(core.words[0], device="cpu")
    words[places // 32] = (1 << (places % 32)).to(torch.int32)
    same("mask", core.words[0], words)
    held = ck.hold_masked([tuned], [core.words[0]], backend="triton")
    saved = ck.gather_masked(tuned, core.words[0], backend="triton")
    same("saved", saved, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16))
    tuned.fill_(5.0)
    held.restore_([tuned])
    same("put back", tuned[places.to(card.device)], saved)
    yield {"operation": "select_cores, hold_masked", "dtype": "bf16", "elements": sizes.far, "correct": True}


def kernels(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Each operation alone on large tensors."""
    rate, tasks = copy_rate(card, sizes), max(sizes.tasks)
    yield {"operation": "copy", "elements": sizes.copied, "gb_per_second": rate / 1e9}
    for operation in OPERATIONS:
        workload = WORKLOADS[operation](Setting(sizes.timed, torch.bfloat16, tasks, 0.01, card.device))
        row = timed(card, sizes, partial(workload.ours, "triton"))
        speed = workload.bytes / row["seconds"]
        named = {"operation": operation, "dtype": "bf16", "elements": sizes.timed, "tasks": tasks}
        rates = {"gb_per_second": speed / 1e9, "copy_gb_per_second": rate / 1e9, "share_of_copy": speed / rate}
        yield {**named, **row, **rates}
        del workload


def timed(card: Card, sizes: Sizes, action: Action) -> Row:
    """seconds, launches, torch_operations, waits of one call."""
    seconds = card.seconds(action, sizes.repeats)
    return {"seconds": seconds, **card.counts(action)}


def calls(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Calls over all tensors of a model: what launches and waits cost beside the work."""
    models = [_model(card, sizes.model, seed) for seed in range(4)]
    base, tuned = models[0], models[1:]
    count = sum(sizes.model) // 100
    cores = ck.select_cores(base, tuned, [count], backend="triton")
    masks = [core.words for (core,) in cores]
    out = [torch.empty_like(tensor) for tensor in base]
    for tensor, other in zip(out, base, strict=True):
        tensor.copy_(other)
    held = ck.hold_masked(out, masks[0], backend="triton")
    of_tensors = [*zip(base, zip(*tuned, strict=True), zip(*masks, strict=True), strict=True)]
    scale = torch.full((1, 4), 0.25, dtype=torch.float64)

    def grams() -> None:
        for x, others, words in of_tensors:
            gram = ck.masked_gram(x, others, words[0], backend="triton")
            ck.slerp_coefficients(gram, [0.5, 0.3, 0.25], 1e-6)

    def fused() -> None:
        for target, (x, others, words) in zip(out, of_tensors, strict=True):
            ck.fused_apply(target, [x, *others], scale, [None, *words], backend="triton")

    def resolved() -> None:
        for x, others, words in of_tensors:
            ck.resolve_conflicts("magnitude", x, others, words, backend="triton")

    def zeroed() -> None:
        for place, tensor in enumerate(out):
            held.zero_(place, tensor)

    actions: dict[str, Callable[[], object]] = {
        "select_cores": lambda: ck.select_cores(base, tuned, [count], backend="triton"),
        "resolve_conflicts": resolved,
        "masked_gram and slerp_coefficients": grams,
        "fused_apply": fused,
        "restore": lambda: held.restore_(out),
        "pull": lambda: held.pull_(out, [0.5] * len(out)),
        "zero": zeroed,
    }
    named = {"dtype": "bf16", "elements": sum(sizes.model), "tensors": len(base), "tasks": 3}
    for operation, action in actions.items():
        yield {"operation": operation, **named, **timed(card, sizes, action)}
    for operation, row in _flat(card, sizes, models, masks, count):
        yield {"operation": f"{operation}, flat", **named, **row}


def _flat(
    card: Card, sizes: Sizes, models: list[list[Tensor]], masks: list[list[Tensor]], count: int
) -> Iterator[tuple[str, Row]]:
    """The same with each model in one buffer: the same masks, in fewer launches."""
    layout = ck.FlatLayout(sizes.model)
    base, *tuned = [laid(model, layout) for model in models]
    cores = ck.select_cores([base], [[x] for x in tuned], [count], backend="triton")
    for task, (core,) in enumerate(cores):
        for t, words in enumerate(masks[task]):
            same(f"flat mask of task {task}, tensor {t}", layout.words(core.words[0], t), words)
    held, out = [core.words[0] for (core,) in cores], torch.empty_like(base)
    scale = torch.full((len(sizes.model), 4), 0.25, device=base.device)
    actions: dict[str, Callable[[], object]] = {
        "select_cores": lambda: ck.select_cores([base], [[x] for x in tuned], [count], backend="triton"),
        "overlap_counts": lambda: ck.flat_overlaps(held, layout, backend="triton").cpu(),
        "resolve_conflicts": lambda: ck.resolve_conflicts("magnitude", base, tuned, held, backend="triton"),
        "masked_gram": lambda: ck.flat_gram(base, tuned, held[0], layout, elements=1 << 22, backend="triton").cpu(),
        "fused_apply": lambda: ck.flat_apply(out, [base, *tuned], scale, [None, *held], layout, backend="triton"),
    }
    for name, action in actions.items():
        yield name, timed(card, sizes, action)


def _model(card: Card, tensors: list[int], seed: int) -> list[Tensor]:
    """Values of one seed, moved by another's: fine-tunes of the model of seed 0."""
    generators = [torch.Generator(card.device).manual_seed(1 + number) for number in (0, seed)]

    def drawn(size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, device=card.device, dtype=torch.float32)

    return [(drawn(n, generators[0]) + 0.01 * seed * drawn(n, generators[1])).bfloat16() for n in tensors]


def captured(card: Card, sizes: Sizes) -> Iterator[Row]:
    """A step of freezing as a graph: its replays have the bits of the calls."""
    values = _model(card, sizes.model, 0)
    masks = [ck.pack_mask(tensor > 1.0) for tensor in values]
    wanted = [tensor.clone() for tensor in values]
    held = ck.hold_masked(values, masks, backend="triton")
    replay = card.captured(lambda: held.restore_(values))
    for _ in range(2):
        for tensor in values:
            tensor.add_(1.0)
        replay()
    for t, (found, before, words) in enumerate(zip(values, wanted, masks, strict=True)):
        moved = before + 1.0 + 1.0
        same(f"tensor {t}", found, torch.where(ck.unpack_mask(words, len(before)), before, moved))
    named = {"dtype": "bf16", "elements": sum(sizes.model), "tensors": len(values)}
    yield {"operation": "restore, captured", **named, "seconds": card.seconds(replay, sizes.repeats), "correct": True}


def transfers(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Between the memories of machine and card, pinned and not."""
    there = torch.empty(sizes.copied, dtype=torch.uint8, device=card.device)
    pinned, plain = card.pinned(sizes.copied), torch.ones(sizes.copied, dtype=torch.uint8)
    actions: dict[str, Callable[[], object]] = {
        "to the card, pinned": lambda: there.copy_(pinned, non_blocking=True),
        "to the card, pageable": lambda: there.copy_(plain),
        "from the card, pinned": lambda: pinned.copy_(there, non_blocking=True),
        "from the card, pageable": lambda: plain.copy_(there),
    }
    for name, action in actions.items():
        seconds = card.seconds(action, sizes.repeats)
        yield {
            "operation": name,
            "bytes": there.nbytes,
            "seconds": seconds,
            "gb_per_second": there.nbytes / seconds / 1e9,
        }

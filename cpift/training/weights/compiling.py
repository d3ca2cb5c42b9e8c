"""Decoder layers compiled by torch (`compile: true`).

Each shape of a batch has code of its own: code for sizes that vary is made for those that are seen first, so that a
fine-tune that goes on from a checkpoint would compute in another order than one that was never stopped. So rows are
padded to `max_length`, which costs nothing where they are packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cpift.config.training import TrainingConfig

_SHAPES = 64  # of one layer's code: full and last batches, in training and looking, with a mask and without, by layer


def fixed_length(training: TrainingConfig) -> int | None:
    """Tokens that every row of a batch is padded to; None where it need not be."""
    return training.max_length if training.compile else None


@contextmanager
def compiled(model: Any, asked: bool) -> Iterator[None]:
    """Within it each decoder layer is compiled when it is first used, forward and backward; names stay as they are.

    Layers that are not compiled any more, for there were too many shapes, are an error: they would not compute the same
    bits.
    """
    if not asked:
        yield
        return
    import torch._dynamo

    from cpift.training.weights.units import layers_of

    config: Any = torch._dynamo.config
    for layer in layers_of(model):
        layer.compile(dynamic=False)
    try:
        with config.patch(recompile_limit=_SHAPES, fail_on_recompile_limit_hit=True):
            yield
    finally:
        for layer in layers_of(model):
            layer._compiled_call_impl = None  # as torch has it before

"""transformers' conversion of a file's tensors to its class's parameters, run without values.

transformers stacks tensors of the file to one parameter (the experts of a layer are one), renames others, and adds or
drops the prefix of the base model. Nothing of that is decided here: its own conversion runs on tensors that have no
values and remember where their elements lie in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpift.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
RESAVE = (
    "save it in its class's own layout: AutoModelForCausalLM.from_pretrained(..., dtype='auto')"
    ".save_pretrained(..., save_original_format=False)"
)


@dataclass(frozen=True)
class Block:
    """A box of a parameter, and its elements in a tensor of the file: at offset + Σ strides · index within the box."""

    tensor: str
    start: Shape  # the box, by dimension of the parameter
    size: Shape
    offset: int  # in elements of the tensor, flat
    strides: Shape  # in the tensor, by dimension of the parameter

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of_tensor(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the tensor's elements [numel of the tensor], in the shape of the box."""
        return flat.as_strided(self.size, self.strides, self.offset + flat.storage_offset())

    def of_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """A view of the box of a parameter."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            parameter = parameter.narrow(dim, start, size)
        return parameter

    def narrowed(self, dim: int, start: int, length: int) -> Block | None:
        """What of it lies in start..start+length-1 of a dimension, counted from `start`; None if nothing does."""
        first = max(self.start[dim], start)
        last = min(self.start[dim] + self.size[dim], start + length)
        if first >= last:
            return None
        offset = self.offset + (first - self.start[dim]) * self.strides[dim]
        begin, size = _put(self.start, dim, first - start), _put(self.size, dim, last - first)
        return replace(self, start=begin, size=size, offset=offset)

    def shifted(self, dim: int, by: int) -> Block:
        return replace(self, start=_put(self.start, dim, self.start[dim] + by))

    def permuted(self, order: Sequence[int]) -> Block:
        start, size, strides = (tuple(values[d] for d in order) for values in (self.start, self.size, self.strides))
        return replace(self, start=start, size=size, strides=strides)

    def unsqueezed(self, dim: int, at: int) -> Block:
        """With a dimension more, of which it takes the index `at`."""
        start, size = _insert(self.start, dim, at), _insert(self.size, dim, 1)
        return replace(self, start=start, size=size, strides=_insert(self.strides, dim, 0))

    def squeezed(self, dim: int) -> Block:
        start, size, strides = (values[:dim] + values[dim + 1 :] for values in (self.start, self.size, self.strides))
        return replace(self, start=start, size=size, strides=strides)


def _put(values: Shape, place: int, value: int) -> Shape:
    return (*values[:place], value, *values[place + 1 :])


def _insert(values: Shape, place: int, value: int) -> Shape:
    return (*values[:place], value, *values[place:])


class Untraceable(Exception):
    """An operation that does more than move boxes of elements."""


class Traced:
    """A tensor without values: its shape, and the blocks of the file's tensors that it is made of.

    What transformers' conversions do to it is in `MOVES` and in the methods below; all else raises Untraceable.
    """

    def __init__(self, shape: Sequence[int], blocks: Sequence[Block]):
        import torch

        self.shape, self.blocks = torch.Size(shape), tuple(blocks)

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Traced:
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return cls(shape, [Block(name, (0,) * len(shape), tuple(shape), 0, strides)])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        move = MOVES.get(function.__name__)
        if move is None:
            raise Untraceable(function.__name__)
        return move(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else Untraceable(name)

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable("iter")

    def __getitem__(self, key: Any) -> Any:
        raise Untraceable("index")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Traced:
        return self

    def narrow(self, dim: int, start: int, length: int) -> Traced:
        blocks = (block.narrowed(dim, start, length) for block in self.blocks)
        return Traced(_put(tuple(self.shape), dim, length), [block for block in blocks if block is not None])

    def squeeze(self, dim: int) -> Traced:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        return Traced(self.shape[:dim] + self.shape[dim + 1 :], [block.squeezed(dim) for block in self.blocks])


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0].shape
    if any(tensor.shape != first for tensor in tensors):
        raise Untraceable("stack of several shapes")
    dim %= len(first) + 1
    blocks = [block.unsqueezed(dim, at) for at, tensor in enumerate(tensors) for block in tensor.blocks]
    return Traced(_insert(tuple(first), dim, len(tensors)), blocks)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first, at, blocks = tuple(tensors[0].shape), 0, []
    dim %= len(first)
    for tensor in tensors:
        if _put(tuple(tensor.shape), dim, 0) != _put(first, dim, 0):
            raise Untraceable("cat of several shapes")
        blocks += [block.shifted(dim, at) for block in tensor.blocks]
        at += tensor.shape[dim]
    return Traced(_put(first, dim, at), blocks)


def _split(tensor: Traced, sizes: Sequence[int] | int, dim: int = 0) -> list[Traced]:
    dim %= tensor.ndim
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [tensor.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> list[Traced]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return Traced([tensor.shape[dim] for dim in order], [block.permuted(order) for block in tensor.blocks])


MOVES: dict[str, Callable[..., Any]] = {  # by names of torch's functions
    "stack": _stack,
    "cat": _cat,
    "split": _split,
    "chunk": _chunk,
    "transpose": _transpose,
}


def converted(network: PreTrainedModel, tensors: Mapping[str, Shape]) -> tuple[dict[str, Traced], list[str]]:
    """What `from_pretrained` would make of tensors of these names and shapes, by name in `network.state_dict()`; and
    the tensors that it would not take. `network` may be on `meta`.

    Raises CheckpointError where the conversion does more than move boxes of elements.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state, mapping = network.state_dict(), get_model_conversion_mapping(network)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: operation for operation in converters for pattern in operation.source_patterns}
    plain: dict[str, Traced] = {}
    joined: dict[str, WeightConverter] = {}
    unloaded = []
    for name in sorted(tensors, key=dot_natural_key):  # the order in which transformers stacks
        target, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unloaded.append(name)
        elif pattern is None:
            plain[target] = Traced.of(name, tensors[name])
        else:
            converter = joined.setdefault(target, deepcopy(by_pattern[pattern]))
            converter.add_tensor(target, name, pattern, Traced.of(name, tensors[name]))  # type: ignore[arg-type]  # Traced stands in for a tensor
    for target, converter in joined.items():
        plain |= _run(converter, target, network)
    return plain, unloaded


def _run(converter: Any, target: str, network: PreTrainedModel) -> dict[str, Traced]:
    try:
        tensors = converter.convert(target, model=network, config=network.config)
    except Untraceable as error:
        what = f"is made by {', '.join(map(str, converter.operations))} when it is loaded, which uses {error}"
        raise CheckpointError("checkpoint", [Problem(target, what, RESAVE)]) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


def not_given(network: PreTrainedModel, traced: Mapping[str, Traced]) -> Iterator[str]:
    """Parameters that no tensor gives, those that are tied together by their first name."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from (same[0] for same in names.values() if not any(name in traced for name in same))


def wrapping_prefix(network: PreTrainedModel, tensors: Mapping[str, Shape]) -> str:
    """What all names of a file have before those that the class would take them by; nothing where it takes them.

    Raises CheckpointError as `converted` does.
    """
    parts = next(iter(tensors), "").split(".")
    first = f"{parts[0]}."
    if not all(name.startswith(first) for name in tensors) or not _lacks(network, tensors):
        return ""
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth]) + "."
        if not all(name.startswith(prefix) for name in tensors):
            break
        if not _lacks(network, {name.removeprefix(prefix): shape for name, shape in tensors.items()}):
            return prefix
    return ""


def _lacks(network: PreTrainedModel, tensors: Mapping[str, Shape]) -> bool:
    return any(True for _ in not_given(network, converted(network, tensors)[0]))

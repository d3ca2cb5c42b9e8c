"""A model's files and its class: where in which parameter every tensor of a checkpoint lies.

Regions, masks and everything that is written have the names of the file; what is trained has those of the class, where
one parameter may be a stack of many tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift_kernels import pack_mask, unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.disk.facts import remembered
from cpift.errors import CheckpointError, Problem, named_line
from cpift.pretrained.architecture import config_text, known_class, skeleton, untrainable
from cpift.pretrained.conversion import MOVES, Block, Shape, Traced, converted, not_given
from cpift.pretrained.loading import code_problems, loading_info

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors and the parameters (and kept buffers) of its class correspond."""

    shapes: Mapping[str, Shape]  # of the parameters that the file gives
    blocks: Mapping[str, tuple[Block, ...]]  # by parameter
    places: Mapping[str, tuple[tuple[str, Block], ...]]  # by tensor of the file: its parameters and their blocks
    sizes: Mapping[str, Shape]  # of the tensors
    unloaded: tuple[str, ...]  # tensors that the class does not take
    missing: tuple[str, ...]  # parameters that no tensor gives, tied ones by one of their names
    misfits: tuple[Problem, ...]  # parameters that are not given as config.json has them

    def same(self, parameter: str) -> str | None:
        """The tensor that is this parameter, element by element; None if there is no such tensor."""
        first = self.blocks[parameter][0]
        alone = len(self.blocks[parameter]) == 1 and self.sizes[first.tensor] == self.shapes[parameter] == first.size
        return first.tensor if alone and first == Traced.of(first.tensor, first.size).blocks[0] else None

    def tensor_of(self, parameter: str) -> str | None:
        """`same`, and None for what the class does not have or no tensor gives."""
        return self.same(parameter) if self.blocks.get(parameter) else None

    def trained(self, network: torch.nn.Module) -> list[str]:
        """The tensors that parameters of `network` are made of; of those that make one tied parameter, the first."""
        parameters, seen, found = dict(network.named_parameters(remove_duplicate=False)), dict[int, str](), list[str]()
        for tensor, parts in self.places.items():
            holders = [parameters.get(name) for name, _ in parts]
            if all(
                holder is not None and seen.setdefault(id(holder), name) == name
                for holder, (name, _) in zip(holders, parts, strict=True)
            ):
                found.append(tensor)
        return found

    def parameter(self, name: str, tensor: Callable[[str], torch.Tensor], rows: range | None = None) -> torch.Tensor:
        """A parameter in its class's layout, made of the file's tensors; the tensor itself where it is the same.

        rows: of its first dimension, at least one; only what they are made of is asked for.
        """
        import torch

        alone = self.same(name)
        if alone is not None:
            return tensor(alone) if rows is None else tensor(alone)[rows.start : rows.stop]
        blocks, shape = self.blocks[name], self.shapes[name]
        if rows is not None:
            some = (block.narrowed(0, rows.start, len(rows)) for block in blocks)
            blocks, shape = tuple(block for block in some if block is not None), (len(rows), *shape[1:])
        out: torch.Tensor | None = None
        for block in blocks:
            values = tensor(block.tensor).contiguous().view(-1)
            out = torch.empty(shape, dtype=values.dtype) if out is None else out
            block.of_parameter(out).copy_(block.of_tensor(values))
        assert out is not None
        return out

    def tensor(self, name: str, parameter: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the file, made of the parameters; the parameter itself where it is the same."""
        import torch

        places = self.places[name]
        if self.same(places[0][0]) == name:
            return parameter(places[0][0])
        out: torch.Tensor | None = None
        for holder, block in places:
            values = block.of_parameter(parameter(holder).detach())
            out = torch.empty(math.prod(self.sizes[name]), dtype=values.dtype) if out is None else out
            block.of_tensor(out).copy_(values)
        assert out is not None
        return out.view(self.sizes[name])


def checkpoint_layout(checkpoint: Checkpoint) -> Layout:
    """`layout_of` the class that the checkpoint's config.json names. Raises CheckpointError."""
    return layout_of(skeleton(checkpoint.folder), {info.name: info.shape for info in checkpoint.tensors.values()})


def layout_of(network: PreTrainedModel, tensors: Mapping[str, Shape]) -> Layout:
    """How tensors of these names and shapes give the parameters of `network`, which may be on `meta`.

    Raises CheckpointError where transformers' conversion does more than move boxes of elements.
    """
    state = network.state_dict()
    traced, unloaded = converted(network, tensors)
    wrong = [_misfit(name, trace, tuple(state[name].shape)) for name, trace in traced.items()]
    places: dict[str, list[tuple[str, Block]]] = {}
    for name, trace in traced.items():
        for block in trace.blocks:
            places.setdefault(block.tensor, []).append((name, block))
    return Layout(
        shapes={name: tuple(trace.shape) for name, trace in traced.items()},
        blocks={name: trace.blocks for name, trace in traced.items()},
        places={name: tuple(parts) for name, parts in places.items()},
        sizes={name: tuple(shape) for name, shape in tensors.items()},
        unloaded=tuple(unloaded),
        missing=tuple(not_given(network, traced)),
        misfits=tuple(problem for problem in wrong if problem is not None),
    )


def _misfit(name: str, trace: Traced, wanted: Shape) -> Problem | None:
    """Shapes that are not the class's; fewer elements than the shape has, where the file lacks some of a stack."""
    if tuple(trace.shape) == wanted and sum(block.numel for block in trace.blocks) == math.prod(wanted):
        return None
    return Problem(name, f"has shape {list(trace.shape)} in the file, config.json says {list(wanted)}", "restore it")


def key_mapping(folder: Path) -> dict[str, str] | None:
    """`from_pretrained`'s argument of that name for a folder whose files have a `Checkpoint.prefix`, else None."""
    prefix = Checkpoint(folder).prefix
    return {f"^{re.escape(prefix)}": ""} if prefix else None


_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")


def is_buffer(network: PreTrainedModel, tensor: str) -> bool:
    """Whether a tensor that the class does not load is none of its weights: what releases before kept with them.

    transformers' own list for the class says so, or the name: a buffer of rotary embeddings and the like, or a bias of
    a module that has none but holds others, as the causal masks of attention were.
    """
    listed = (*_BUFFERS, *(network._keys_to_ignore_on_load_unexpected or ()))
    if any(re.search(pattern, tensor) for pattern in listed):
        return True
    path, _, leaf = tensor.rpartition(".")
    modules = dict(network.named_modules())
    holder = next((modules[name] for name in (path, f"{network.base_model_prefix}.{path}") if name in modules), None)
    return leaf == "bias" and holder is not None and any(True for _ in holder.children())


def models_table() -> str:
    """The table of docs/supported.md."""
    moves = ", ".join(f"`{name}`" for name in MOVES)
    buffers = ", ".join(f"`{pattern}`" for pattern in _BUFFERS)
    rows = [
        (
            "a class of transformers that reads text alone",
            "trained and merged, as `architectures` of `config.json` names it",
        ),
        ("one that reads images, sound or the like too", "merged; training it is refused by `plan`"),
        ("θ0 whose files lack a parameter of its class, or have it in another shape", "refused by `plan`"),
        (
            f"parameters that transformers makes of several tensors by {moves}",
            "trained, frozen and exported tensor by tensor, under the file's names",
        ),
        (
            "parameters that it makes otherwise",
            "merged with tunes of the same layout; training is refused, with the way to save them anew",
        ),
        ("names that all have a prefix before those of their class (`module.`)", "read without it, θ0's too"),
        (
            "a tune of θ0 under other names: experts in one tensor or each in its own, a prefix more or less",
            "read under θ0's names",
        ),
        (
            f"buffers that the class does not load: its own list, {buffers}, `bias` of a module of modules",
            "a tune's are left out, θ0's are kept",
        ),
        ("other tensors that one of the two lacks", "refused by `plan`, with counts and first names of both"),
    ]
    return "\n".join(["| what | what happens |", "|---|---|", *(f"| {what} | {does} |" for what, does in rows)])


def loading_faults(checkpoint: Checkpoint) -> list[str]:
    """Parameters that transformers, loading the model, would not have from its files, or not with the class's shape; or
    why it would not load them at all. Headers are read."""
    import torch

    infos = checkpoint.tensors.values()
    empty = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos}
    try:
        info = loading_info(checkpoint.folder, empty)
    except Exception as error:  # the class's own code
        try:
            layout = checkpoint_layout(checkpoint)
            return [problem.where for problem in layout.misfits] or list(layout.missing) or [named_line(error)]
        except CheckpointError as reason:
            return [named_line(error), *(problem.where for problem in reason.problems)]
    return [*sorted(info["missing_keys"]), *sorted(key for key, *_ in info["mismatched_keys"]), *info["error_msgs"]]


def known_loading_faults(checkpoint: Checkpoint) -> list[str]:
    """`loading_faults`; transformers is asked once for the same configuration, names and shapes, and not at all where
    these are known to be a common class's."""
    faults: list[str] = _remembered_whole("loads", checkpoint, lambda: loading_faults(checkpoint))
    return faults


def unloadable(checkpoint: Checkpoint, where: str) -> list[Problem]:
    """What `loading_faults` finds, as a problem; empty if transformers loads the model."""
    faults = known_loading_faults(checkpoint)
    some = ", ".join(faults[:3]) + (", …" if len(faults) > 3 else "")
    what = f"{checkpoint.folder} lacks {len(faults)} parameters of its class, or has them in another shape ({some})"
    remedy = "give the files that belong to config.json, saved by transformers (save_pretrained)"
    return [Problem(where, what, remedy)] if faults else []


def unwritable(checkpoint: Checkpoint, where: str) -> list[Problem]:
    """Why what is trained could not be written back to the names of a checkpoint; empty if it can be."""
    try:
        _remembered_whole("writes", checkpoint, lambda: require_whole(checkpoint_layout(checkpoint), checkpoint.folder))
    except CheckpointError as error:
        return [Problem(f"{where}: {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    return []


def _remembered_whole(what: str, checkpoint: Checkpoint, find: Callable[[], Any]) -> Any:
    """What `find` says of a checkpoint's class and headers: nothing where they are known to be each other's, and
    where it was found to be nothing before."""
    try:
        text, whole = config_text(checkpoint.folder), _known_whole(checkpoint)
    except CheckpointError:
        return find()
    if whole:
        return []
    infos = [[info.name, info.shape, info.kind] for info in checkpoint.tensors.values()]
    return remembered(what, [text, infos], find, holds=lambda problems: not problems)


def _known_whole(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the parameters of its class and nothing else, by what is known of it."""
    plain = known_class(checkpoint.folder)
    if plain is None or code_problems(checkpoint.folder, ""):
        return False
    return {info.name: info.shape for info in checkpoint.tensors.values() if info.floating} == plain.own and all(
        info.floating for info in checkpoint.tensors.values()
    )


def require_trainable(folder: Path) -> None:
    """Raise CheckpointError where the model in a folder cannot be trained: `untrainable`, `unwritable`."""
    if problems := untrainable(folder, "model") or unwritable(Checkpoint(folder), "model"):
        raise CheckpointError(f"model {folder}", problems)


def require_whole(layout: Layout, folder: Path) -> None:
    """Raise CheckpointError that names parameters of the class that the folder has no tensor for, or of another shape:
    they would be random, and what they learn could not be written back."""
    problems = [Problem(name, "is not in the checkpoint", "restore the file") for name in layout.missing]
    if problems := [*problems, *layout.misfits]:
        raise CheckpointError(f"checkpoint {folder}", first_problems(problems, 8))


class ParameterMasks(Mapping[str, "torch.Tensor"]):
    """Packed masks of a file's tensors as those of the class's parameters; put together when they are asked for."""

    def __init__(self, layout: Layout, masks: Mapping[str, torch.Tensor]):
        self._layout, self._masks = layout, masks
        held = {holder: None for name in masks for holder, _ in layout.places.get(name, ())}
        strangers = (name for name in masks if name not in layout.sizes)
        self._names = (*held, *strangers)  # who asks for a stranger's parameter is the one to complain

    def __getitem__(self, name: str) -> torch.Tensor:
        alone = self._layout.same(name) if name in self._layout.blocks else name
        if alone is not None:
            return self._masks[alone]
        return pack_mask(self._layout.parameter(name, self._bits).reshape(-1))

    def _bits(self, tensor: str) -> torch.Tensor:
        """Bool, flat; nothing of a tensor outside the parameter space is masked."""
        import torch

        numel = math.prod(self._layout.sizes[tensor])
        return (
            unpack_mask(self._masks[tensor], numel) if tensor in self._masks else torch.zeros(numel, dtype=torch.bool)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

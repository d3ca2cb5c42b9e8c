"""Model directories as named lazy tensors.

A checkpoint is a folder with safetensors (one file, or shards with an index) beside `config.json` and the tokenizer.
Tensors are read through a memory map, whole or in slices: a model is never whole in memory, nor need a tensor be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.disk.mapped import MappedFile, file_version
from cpift.errors import CheckpointError, Problem
from cpift.formats.quantised import dense_remedy, quantised, whole_numbers
from cpift.formats.safetensors import DTYPES, DtypeError, FormatError, TensorInfo, read_header
from cpift.pretrained.tying import prefix_of, tied_in
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object, read_weight_map

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ONE_MODEL, _SHAPES_LISTED = "use fine-tunes of one model", 3
_FURTHER = "it has {count} that θ0 lacks ({names})"
_COMPUTED = ("float32", "float16", "bfloat16")
_CONVERT = "give the checkpoint in bf16, fp16 or fp32"
_SCAN = 1 << 22  # elements looked at together


class Checkpoint:
    """A model folder opened for reading. Only headers are read until a tensor is asked for.

    Raises CheckpointError, with every problem of the folder: no safetensors, a missing or truncated shard, a tensor
    that the index names but no shard has or that a shard has but not the index, a tensor in two shards, one file beside
    an index of others, an unsupported dtype.
    """

    prefix = ""  # what the files' names have before those that are read (`prefix_of`)
    replaced_alone: frozenset[str] | None = None  # of a model of a part of θ0 (`towers`): all other tensors are θ0's
    rewritten: Mapping[str, Any] = {}  # small files that a model like this has otherwise: fields, text; None: not

    def __init__(
        self, folder: Path, ties: Mapping[str, str] | None = None, apart: bool = False, prefix: str | None = None
    ):
        """ties, prefix: what `tied_in` and `prefix_of` say, if it is known. apart: tied names are tensors too, with the
        same values."""
        self.folder, self.is_apart = folder, apart
        self._maps: dict[Path, MappedFile] = {}
        self._versions: dict[Path, tuple[int, ...]] = {}
        problems: list[Problem] = []
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files(problems):
            self._read_header(file, problems)
        if problem := quantised(folder, self.config, self.tensors):
            problems = [problem]  # what else is wrong follows from it
        else:
            self._check_index(problems)
        if problems:
            raise CheckpointError(f"checkpoint {folder}", problems)
        self.prefix = prefix_of(folder, self.config, self.tensors) if prefix is None else prefix
        bare = (replace(info, name=name.removeprefix(self.prefix)) for name, info in self.tensors.items())
        self.tensors = {info.name: info for info in bare}
        self.ties = dict(tied_in(folder, self.config, self.tensors) if ties is None else ties)
        self._copies: dict[str, TensorInfo] = {}  # of tied names: what the files hold a second time
        self._tie()
        self.tensors = dict(sorted(self.tensors.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.ties, self.is_apart, self.prefix)  # another process maps the files itself

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names in sorted order: the *name order* that linear indices and ties refer to, whatever the shards."""
        return tuple(self.tensors)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json; empty where there is none. Raises UnreadableError."""
        path = self.folder / "config.json"
        return read_object(path, MODEL_CONFIG) if path.is_file() else {}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, contiguous, in the file's dtype; the caller's own."""
        return self.mapped(name).clone()

    def mapped(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype, as a view of the mapped file: only to read."""
        info = self.tensors[name]
        return self.slice(name, 0, info.numel).reshape(info.shape)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop-1 of a tensor, row-major, as a view [stop - start] of the mapped file: only to read."""
        info = self.tensors[name]
        return self._map(info.file).view(info.start + start * info.itemsize, info.dtype, stop - start)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """float32 [R, length]: the elements from each of starts [R] on; past the end the last one is repeated."""
        import torch

        numel = self.tensors[name].numel
        places = np.minimum(starts[:, None] + np.arange(length), numel - 1)
        return self.slice(name, 0, numel)[torch.from_numpy(places)].float()

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Have elements start..stop-1 read from the disk in the background."""
        info = self.tensors[name]
        size = info.itemsize
        self._map(info.file).prefetch(info.start + start * size, info.start + stop * size)

    def release(self, name: str, start: int, stop: int) -> None:
        """Give back the memory that elements start..stop-1 took while they were read."""
        info = self.tensors[name]
        size = info.itemsize
        self._map(info.file).release(info.start + start * size, info.start + stop * size)

    def _map(self, file: Path) -> MappedFile:
        if file not in self._maps:
            self._maps[file] = MappedFile(file, self._versions.get(file))
        return self._maps[file]

    def require_unchanged(self) -> None:
        """Raise ChangedInput unless every file that was read is still there and as it was."""
        for file in self._maps.values():
            file.require_unchanged()

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return None
        try:
            return read_weight_map(path)
        except UnreadableError as error:
            raise CheckpointError(f"checkpoint {self.folder}", [error.problem(INDEX_FILE)]) from error

    def _files(self, problems: list[Problem]) -> list[Path]:
        index = self._index()
        names = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
        if index is None and not (self.folder / SINGLE_FILE).is_file():
            problems.append(_no_weights(self.folder))
            return []
        if SINGLE_FILE not in names and (self.folder / SINGLE_FILE).is_file():
            what = f"is there beside an index of {len(names)} other files, and which of the two is meant is not known"
            problems.append(Problem(SINGLE_FILE, what, f"remove what is stale: this file, or {INDEX_FILE}"))
        for name in names:
            if (self.folder / name).is_symlink() and not (self.folder / name).exists():
                problems.append(_dead_link(self.folder / name))
            elif not (self.folder / name).is_file():
                problems.append(
                    Problem(name, "is named in the index but not there", "download or copy this shard again")
                )
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def _read_header(self, file: Path, problems: list[Problem]) -> None:
        try:
            self._versions[file] = file_version(file)
            infos = read_header(file)
        except DtypeError as error:
            fp8 = error.dtype.startswith("F8")
            remedy = dense_remedy(self.folder, "fp8") if fp8 else _CONVERT
            problems.append(Problem(file.name, str(error), remedy))
            return
        except (FormatError, OSError) as error:
            denied = isinstance(error, PermissionError)
            remedy = "change its permissions" if denied else "the file is damaged: download or copy it again"
            problems.append(Problem(file.name, f"cannot be read ({error})", remedy))
            return
        problems += _not_computed_with(infos)
        for info in infos:
            if info.name in self.tensors:
                first = self.tensors[info.name].file.name
                problems.append(Problem(info.name, f"is in {first} and in {file.name}", "remove the stale shard"))
            else:
                self.tensors[info.name] = info

    def _check_index(self, problems: list[Problem]) -> None:
        index = self._index()
        readable = {info.file.name for info in self.tensors.values()}
        for name, shard in (index or {}).items():
            if shard in readable and name not in self.tensors:
                problems.append(Problem(name, f"is not in {shard}, where the index has it", "mend the index"))
        for name, info in self.tensors.items():
            if index is not None and name not in index:
                problems.append(Problem(name, f"is in {info.file.name}, but not in the index", "mend the index"))

    def _tie(self) -> None:
        """One tensor for what is tied, under the name that the class has for it; or, apart, one for each name."""
        for target, source in self.ties.items():
            copy = self.tensors.pop(target, None)
            if source in self.tensors and copy is not None:
                self._copies[target] = copy
            elif copy is not None:  # the files have it under the tied name alone
                self.tensors[source] = replace(copy, name=source)
            if self.is_apart and source in self.tensors:
                self.tensors[target] = replace(self.tensors[source], name=target)

    @property
    def tied_by_class(self) -> bool:
        """Whether config.json alone, with the names that most classes have, says something else of what is tied."""
        said = bool(self.config.get("tie_word_embeddings"))
        plain = all(name == "lm_head.weight" for name in self._copies)
        return (bool(self._copies) and not (said and plain)) or (
            said and not self.ties and "lm_head.weight" in self.tensors
        )

    def apart(self) -> Checkpoint:
        """The same model with a tensor for every tied name; itself where nothing is tied."""
        return type(self)(self.folder, self.ties, True, self.prefix) if self.ties and not self.is_apart else self

    def unequal_copies(self) -> Iterator[Problem]:
        """What is wrong where a tied tensor is there twice and the two differ; reads both, in slices."""
        for target, copy in self._copies.items():
            source = self.tensors[self.ties[target]]
            wrong = self._compare(copy, source) if copy.shape == source.shape else None
            if wrong != (0, 0.0):
                how = f"in {wrong[0]:,} of {copy.numel:,} elements (by up to {wrong[1]:.3g})" if wrong else "in shape"
                what = f"differs from {source.name} {how}, but the model's configuration ties the two"
                remedy = (
                    "if both are meant, set tie_word_embeddings: false; if not, save the model again with transformers"
                )
                yield Problem(target, what, remedy)

    def _compare(self, copy: TensorInfo, source: TensorInfo) -> tuple[int, float]:
        """How many elements of two tensors of one shape differ, and by how much at most."""
        wrong, largest = 0, 0.0
        for start in range(0, copy.numel, _SCAN):
            stop = min(start + _SCAN, copy.numel)
            values = self._map(copy.file).view(copy.start + start * copy.itemsize, copy.dtype, stop - start)
            apart = (values.double() - self.slice(source.name, start, stop).double()).abs()
            wrong, largest = wrong + int((apart != 0).sum()), max(largest, float(apart.max()))
            self.release(source.name, start, stop)
        return wrong, largest


def _not_computed_with(infos: Sequence[TensorInfo]) -> list[Problem]:
    """What is wrong with the first tensor that no stage computes with: other floats, or weights in whole numbers.

    Buffers may hold them.
    """
    for info in infos:
        kind = DTYPES[info.kind]
        if info.floating and kind not in _COMPUTED:
            return [Problem(info.name, f"is {kind}, and fp32, fp16 and bf16 are computed with", _CONVERT)]
        if not info.floating and info.name.endswith(".weight"):
            what = f"has whole numbers where weights are floats ({kind}): it is quantised"
            return [Problem(info.name, what, "give the unquantised checkpoint that it was made from")]
    return []


def _dead_link(path: Path) -> Problem:
    return Problem(path.name, "is a symbolic link that leads to no file", "put the file itself there")


def _no_weights(folder: Path) -> Problem:
    if not folder.is_dir():
        return Problem(str(folder), "is no folder", "check the path")
    if (folder / SINGLE_FILE).is_symlink():
        return _dead_link(folder / SINGLE_FILE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder) + '-safetensors'!r})"
        )
        convert = f'where you trust the file, convert it and copy the tokenizer: python -c "{code}"'
        return Problem(str(folder), "holds pickled weights only, which can run code when loaded", convert)
    return Problem(str(folder), "holds no model.safetensors and no index of shards", "check the path")


def differences(base: Checkpoint, other: Checkpoint) -> list[Problem]:
    """What keeps `other` from being a fine-tune of `base`: the tensors that one of them lacks, in a sentence, and other
    shapes."""
    lacking = [name for name in base.names if name not in other.tensors]
    further = [name for name in other.names if name not in base.tensors]
    said = [
        text.format(count=len(names), names=_some(names))
        for names, text in ((lacking, "θ0 has {count} that it lacks ({names})"), (further, _FURTHER))
        if names
    ]
    problems = [Problem("its tensors", "; ".join(said), _ONE_MODEL)] if said else []
    problems += whole_numbers(base.tensors, other.tensors)
    shapes = {
        name: f"has shape {list(other.tensors[name].shape)}, in θ0 {list(info.shape)}"
        for name, info in base.tensors.items()
        if name in other.tensors and other.tensors[name].shape != info.shape
    }
    if len(shapes) <= _SHAPES_LISTED:
        return problems + [Problem(name, what, _ONE_MODEL) for name, what in shapes.items()]
    first, what = next(iter(shapes.items()))
    said_of_all = f"{len(shapes)} have another shape than in θ0 ({first} {what})"
    return [*problems, Problem("its tensors", said_of_all, _ONE_MODEL)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def require_same_layout(base: Checkpoint, others: Mapping[str, Checkpoint]) -> None:
    """Raise CheckpointError naming every model and tensor that does not fit `base`, and tied weights that differ.

    Reads headers, and tied weights where a model has them twice.
    """
    problems = [
        Problem(f"{label}: {problem.where}", problem.what, problem.remedy)
        for label, other in [("pre-trained model", base), *(item for item in others.items() if item[1] is not base)]
        for problem in (*differences(base, other), *other.unequal_copies())
    ]
    if problems:
        raise CheckpointError(f"models that do not fit {base.folder}", first_problems(problems, 20))


def first_problems(problems: list[Problem], count: int) -> list[Problem]:
    more = len(problems) - count
    return problems if more <= 0 else [*problems[:count], Problem("and", f"{more} more", "")]

"""Sizes that a model's files state, compared with what the files hold before anything of that size is built.

A config.json may say anything: of 2⁴⁰ columns, or 10⁹ layers, transformers would build what it says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpift.errors import Problem
from cpift.formats.gguf import read_gguf
from cpift.formats.safetensors import FormatError, read_header
from cpift.text.units import show_size
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object, shown

# A folder's JSON files that decide how a model is built and what its text becomes; each is an object.
_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# Fields that name files to be read in the place of those that are checked, hashed and merged.
ELSEWHERE = {
    "config.json": ("configuration_files", "transformers_weights"),
    "tokenizer_config.json": ("fast_tokenizer_files",),
}
_USE = "remove the field; if the files that it names are the ones that are meant, give them the usual names"
# Files that libraries read in one piece → the most bytes of one; the largest tokenizers have a tenth of it.
_LARGEST = {
    "chat_template.jinja": MODEL_CONFIG.size,
    **dict.fromkeys(("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt"), 1 << 28),
}
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "block_count"),
)
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "vocab_size", "head_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "embedding_length", "feed_forward_length"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "kv_lora_rank", "q_lora_rank"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "expert_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
)
_MOST_LAYERS, _WIDEST = 10_000, 1 << 24  # where no tensors tell
_SLACK = 8  # several parts of a layer may be kept as one tensor, or a tensor as several


def folder_problems(folder: Path, where: str) -> list[Problem]:
    """What is wrong with a model folder's small files: they cannot be read, name others to be read in
    their place, or state sizes beyond its tensors."""
    problems = list(_too_large(folder, where))
    config: dict[str, Any] = {}
    for name in _OBJECTS:
        try:
            stated = read_object(folder / name, MODEL_CONFIG)
        except FileNotFoundError:
            continue
        except UnreadableError as error:
            problems.append(error.problem(f"{where}, {name}"))
        except OSError as error:
            problems.append(Problem(f"{where}, {name}", f"cannot be read ({error.strerror})", "check the path"))
        else:
            config = stated if name == "config.json" else config
            problems += [
                Problem(
                    f"{where}, {name}, {field}", "has transformers read other files than those that are checked", _USE
                )
                for field in ELSEWHERE.get(name, ())
                if stated.get(field) is not None
            ]
    return problems + list(size_problems(config, f"{where}, config.json", *_extent(folder)))


def _too_large(folder: Path, where: str) -> Iterator[Problem]:
    for name, most in _LARGEST.items():
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) > most:
            what = f"has {size:,} bytes, and {most:,} are read at most"
            yield Problem(f"{where}, {name}", what, "is it the right file?")


def size_problems(config: Mapping[str, Any], where: str, layers: int, width: int) -> Iterator[Problem]:
    """Fields that say more than `layers` and `width`, or no size at all; those of text models inside others too."""
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            most = (layers, width) if name == "text_config" else (_MOST_LAYERS, _WIDEST)
            yield from size_problems(value, f"{where}, {name}", *most)
        most_here = layers if name in _LAYERS else width if name in _WIDTHS else None
        for size in value if isinstance(value, list) else [value]:
            if most_here is None or size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                yield Problem(f"{where}, {name}", f"is {shown(size)}, no size", "restore the file")
            elif size > most_here:
                what = f"is {size:,}, and the tensors have room for {most_here:,} at most"
                yield Problem(f"{where}, {name}", what, "restore the file, or give the weights that belong to it")


def gguf_problems(file: Path, where: str) -> list[Problem]:
    """What is wrong with a GGUF file: its head cannot be read, or states sizes beyond its tensors or the memory."""
    try:
        head = read_gguf(file)
    except UnreadableError as error:
        return [Problem(where, str(error))]
    except OSError as error:
        return [Problem(where, f"{error.filename}: {error.strerror}", "check the path")]
    problems = list(size_problems(head.model, where, *_room_in(list(head.shapes.values()))))
    memory = memory_problem(head.parameters, 2, where)
    return [*problems, memory] if memory else problems


def _room_in(shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Layers and width that tensors of these shapes can have at most."""
    return len(shapes), _SLACK * max((size for shape in shapes for size in shape), default=1)


def _extent(folder: Path) -> tuple[int, int]:
    shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            shapes += [info.shape for info in read_header(file)]
        except (FormatError, OSError):  # told by who opens the checkpoint
            return _MOST_LAYERS, _WIDEST
    return _room_in(shapes) if shapes and not (folder / "adapter_config.json").exists() else (_MOST_LAYERS, _WIDEST)


def memory_problem(parameters: int, itemsize: int, where: str) -> Problem | None:
    """A model that this machine cannot hold once, whatever is done with it."""
    needed, there = parameters * itemsize, machine_memory()
    if needed <= there:
        return None
    what = f"describes {parameters:,} parameters, {show_size(needed)}; this machine has {show_size(there)}"
    return Problem(where, what, "describe a smaller model, or use a larger machine")


def machine_memory() -> int:
    """Bytes of the machine's memory; where the system does not tell (Windows), no limit is known beforehand."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(system: Path = Path("/")) -> int:
    """Bytes of memory that are free, or page cache, on the machine and in every control group (of a container, of a
    job) that this process is in; all of the machine's where the system does not tell. system: the root of its files."""
    free = [machine_memory()]
    with suppress(OSError):
        for line in (system / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
    return max(0, min(free + list(_left_by_groups(system))))


def _left_by_groups(system: Path) -> Iterator[int]:
    lines = []
    with suppress(OSError):
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        controllers, place = line.split(":", 2)[1:]
        if controllers in _GROUPS:
            folder, limit, used, cache = _GROUPS[controllers]
            root = system / folder
            group = root / place.lstrip("/")  # in a container maybe one that is seen from outside alone
            for one in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                with suppress(OSError, ValueError):  # the root has no files, and a group without a limit says `max`
                    stat = dict(entry.split() for entry in (one / "memory.stat").read_text("ascii").splitlines())
                    taken = int((one / used).read_text("ascii")) - int(stat.get(cache, 0))
                    yield int((one / limit).read_text("ascii")) - taken


# Controllers of a group → their folder, its files of limit and use, and what of the use is page cache that can go.
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}

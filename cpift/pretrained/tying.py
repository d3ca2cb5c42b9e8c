"""Names in a model's files that mean what another name means: tied parameters, and a prefix before all of them.

A tied parameter is one tensor that a model uses under two names, as input embedding and as output layer.

Which pairs there are, the model's class says; whether they are tied, its configuration with the class's defaults. What
a file holds a second time has to be a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cpift.disk.facts import remembered
from cpift.errors import CheckpointError
from cpift.formats.safetensors import TensorInfo
from cpift.pretrained.architecture import known_class, skeleton, tied_names
from cpift.pretrained.conversion import wrapping_prefix

_TIE = "tie_word_embeddings"


def tied_in(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tied name → the name of the tensor that it is, for a model's files with these `names`.

    Names are the files' where they have them, else the class's. Raises CheckpointError where config.json makes no
    model.
    """
    if not config or _says_no(config):
        return {}
    held = set(names)
    return {
        file_name(target, held) or target: file_name(source, held) or source
        for target, source in tied_names(folder).items()
    }


def prefix_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """What a wrapper left before the names of all tensors (`module.`); "" where there is nothing."""
    if not config or len({name.split(".")[0] for name in tensors}) != 1:
        return ""
    shapes = {name: info.shape for name, info in tensors.items()}

    def find() -> str:
        network = skeleton(folder)
        state = network.state_dict()
        return "" if any(name in state for name in shapes) else wrapping_prefix(network, shapes)

    try:
        if (plain := known_class(folder)) and any(name in plain.shapes for name in shapes):
            return ""
        return str(remembered("wrapping prefix", [config, shapes], find))
    except CheckpointError:
        return ""  # who needs the class says what is wrong with it


def file_name(parameter: str, names: set[str]) -> str | None:
    """The name that files have for a parameter of the class: its own, or with another prefix if only one fits."""
    if parameter in names:
        return parameter
    end = ".".join(parameter.split(".")[-2:])
    matching = [name for name in names if name == end or name.endswith(f".{end}")]
    return matching[0] if len(matching) == 1 else None


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that ties nothing and is otherwise the same."""
    nested = {key: untied_config(value) for key, value in config.items() if isinstance(value, dict) and _TIE in value}
    return {**config, **nested, _TIE: False}


def _says_no(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says so without its class: most do, and transformers need not be loaded."""
    return config.get(_TIE) is False and not any(
        isinstance(value, dict) and "model_type" in value for value in config.values()
    )

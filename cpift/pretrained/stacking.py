"""Which models' layers may stand one after another, and the config.json of what is made of them.

Layers of the classes in UNIFORM have the same parameters and compute alike whatever their number, but for what a list
of config.json says of each: such a list is put together as the layers are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpift.errors import CheckpointError, Problem
from cpift.pretrained.architecture import CONFIG, config_text, effective_config
from cpift.pretrained.fields import config_differences

_TYPES, _POSITIONS = "layer_types", "no_rope_layers"
# `model_type` → lists of config.json with an entry for each layer. Tests ask transformers' classes for both.
UNIFORM: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "phi3", "olmo2", "granite", "mixtral", "starcoder2", "stablelm"), ()),
    **dict.fromkeys(("gpt2", "gpt_neox", "phi", "cohere", "qwen3_moe", "olmo", "glm", "glm4", "opt", "bloom"), ()),
    **dict.fromkeys(("gptj", "arcee", "helium", "seed_oss", "nemotron", "olmoe", "granitemoe"), ()),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text", "cohere2"), (_TYPES,)),
    "smollm3": (_TYPES, _POSITIONS),
}
COUNTS = ("num_hidden_layers", "n_layer")
# Fields by which a class decides of each layer by its number → the value with which it does not.
_BY_NUMBER: Mapping[str, Any] = {
    "scale_attn_by_inverse_layer_idx": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
# Fields that a class makes such lists of, where config.json has none.
_MAKE_LISTS = (
    *("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval"),
    "use_sliding_window",
)
_REMEDY = "layers of other models can be merged as whole models alone, without fusion.slices"


def require_uniform(folder: Path) -> None:
    """Raise CheckpointError where the layers of the model in a folder may not stand in another's place."""
    config = json.loads(config_text(folder))
    kind = config.get("model_type")
    if kind not in UNIFORM:
        what = f"is {kind!r}, and it is not known that its layers may stand in any place"
        raise CheckpointError(f"model {folder}", [Problem(f"{CONFIG}, model_type", what, _REMEDY)])
    problems = [
        Problem(f"{CONFIG}, {name}", f"is {config[name]!r:.60}: what a layer computes depends on its number", _REMEDY)
        for name, alike in _BY_NUMBER.items()
        if config.get(name) not in (None, alike)
    ]
    if problems:
        raise CheckpointError(f"model {folder}", problems)


def apart_beside_layers(base: Path, other: Path) -> list[Problem]:
    """Fields by which two models compute otherwise, but for how many layers there are and what each of them is."""
    ours = {*COUNTS, *_MAKE_LISTS, *(name for names in UNIFORM.values() for name in names)}
    return [
        Problem(f"{CONFIG}, {one.field}", one.what, "layers that stand in one model have to compute alike: give others")
        for one in config_differences(base, other)
        if one.effect == "computes" and one.field not in ours
    ]


def stacked_config(base: Mapping[str, Any], layers: Sequence[Sequence[tuple[Path, int]]]) -> dict[str, Any]:
    """The config.json of a model of these layers: every field as `base` has it, but for their number and lists.

    layers: of each layer of the new model, the models' folders and layers that it is made of. Raises CheckpointError
    where these are of several kinds, or where the class would have other layers than these.
    """
    lists = UNIFORM[str(base.get("model_type"))]
    wanted = {name: _entries(name, layers) for name in lists}
    count = next((name for name in COUNTS if name in base), COUNTS[0])
    config = {**base, count: len(layers)} | {name: wanted[name] for name in lists if name in base}
    if wanted and _lists_of(config, lists) != wanted:
        config |= wanted
    if wanted and _lists_of(config, lists) != wanted:
        what = f"of the layers that are asked for, {', '.join(lists)} would be {wanted}, and its class has others"
        raise CheckpointError("fusion.slices", [Problem("fusion.slices", what, "ask for other layers")])
    return config


def _entries(name: str, layers: Sequence[Sequence[tuple[Path, int]]]) -> list[Any]:
    by_folder = {folder: effective_config(folder)[name] for layer in layers for folder, _ in layer}
    found = [[by_folder[folder][number] for folder, number in layer] for layer in layers]
    for number, entries in enumerate(found):
        if any(entry != entries[0] for entry in entries):
            said = ", ".join(f"{folder.name} {at}: {by_folder[folder][at]}" for folder, at in layers[number])
            what = f"merge layers of several kinds into layer {number} ({name} of {said})"
            raise CheckpointError("fusion.slices", [Problem("fusion.slices", what, "pair layers of one kind")])
    return [entries[0] for entries in found]


def _lists_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What the class makes of a config.json that is not written yet."""
    with tempfile.TemporaryDirectory(prefix="cpift-config-") as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        effective = effective_config(Path(folder))
    return {name: effective.get(name) for name in names}

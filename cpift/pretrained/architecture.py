"""What a model's `config.json` says it is: the class that transformers has for it, without weights and without the
folder's own code.

Built on the `meta` device, kept by the text of config.json: fine-tunes of one model share it, so nobody may change it.
What is asked of it before a run is answered by `plain` where that knows the class, and else kept on the disk too
(`disk.facts`), so that transformers need not be loaded again.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.disk.facts import remembered
from cpift.errors import CheckpointError, Problem, named_line
from cpift.formats.sizes import folder_problems
from cpift.pretrained.loading import class_of, generating_classes, load_config
from cpift.pretrained.plain import PlainClass, plain_class
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG = "config.json"
_SENSES = ("vision", "audio", "vq", "image", "video", "text_encoder")  # beginnings of the names of nested configs
_ELSEWHERE = "train it elsewhere and give its tunes (tasks.*.checkpoint); merging takes it"


@dataclass(frozen=True)
class _Source:
    """A config.json: equal to every other of the same text."""

    text: str
    folder: Path = field(compare=False)


def model_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the model in a folder: what config.json leaves out has its class's default.

    Raises CheckpointError where config.json is missing or transformers knows no such model.
    """
    return _config(_source(folder))


def effective_config(folder: Path) -> dict[str, Any]:
    """`model_config` as JSON has its values, nested configurations too. Raises CheckpointError."""
    source = _source(folder)
    config = remembered("effective config", source.text, lambda: json.dumps(_config(source).to_dict(), default=str))
    values: dict[str, Any] = json.loads(config)
    return values


def skeleton(folder: Path) -> PreTrainedModel:
    """The model on the `meta` device: modules, names and shapes, float32, no values. Its class is the one that
    config.json names; where it names none of transformers, the one that generates text.

    Shared by everybody who asks: not to be changed. Raises CheckpointError.
    """
    return _skeleton(_source(folder))


def untrainable(folder: Path, where: str) -> list[Problem]:
    """Why the model in a folder can be merged, but not trained on rows of text; empty if it can be trained."""
    try:
        source = _source(folder)
        reasons = [] if _plain(source) else remembered("untrainable", source.text, lambda: _untrainable(source))
    except CheckpointError as error:
        return [Problem(where, problem.what, problem.remedy) for problem in error.problems]
    return [Problem(where, what, remedy) for what, remedy in reasons]


def _untrainable(source: _Source) -> list[tuple[str, str]]:
    config, network = _config(source), _class(source)
    text, _ = generating_classes()
    senses = [name for name in config.sub_configs if name.startswith(_SENSES)]
    if config.get_text_config() is config and not senses and network in (text.get(type(config), None), *text.values()):
        if "loss_function" in inspect.unwrap(network.forward).__code__.co_names:
            return []
        # Decoders of translation models and other old classes: they compare the logits at a token with that token.
        what = f"is a {network.__name__}, and its class does not use transformers' loss of the next token"
        return [(what, _ELSEWHERE)]
    also = f" ({', '.join(senses)})" if senses else ""
    what = f"is a {network.__name__}{also}, and only models of text alone are trained"
    return [(what, _ELSEWHERE)]


def tied_names(folder: Path) -> Mapping[str, str]:
    """Parameters that are no tensors of their own → the parameter that each is tied to, in the skeleton's names.

    The class decides which they are and config.json, with the class's defaults, whether. Raises CheckpointError.
    """
    source = _source(folder)
    plain = _plain(source)
    names: Mapping[str, str] = (
        plain.ties if plain else remembered("tied names", source.text, lambda: _tied_names(source))
    )
    if names:
        _require_readable(source)
    return names


def _tied_names(source: _Source) -> dict[str, str]:
    config = _config(source)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    if not any(getattr(part, "tie_word_embeddings", False) for part in parts):
        return {}  # without building the model
    return dict(_skeleton(source).all_tied_weights_keys)


def embedding_names(folder: Path) -> tuple[str, ...]:
    """Parameters with a row for every token: of input embedding and output layer. Raises CheckpointError."""
    source = _source(folder)
    _require_readable(source)
    plain = _plain(source)
    return (
        plain.embeddings
        if plain
        else tuple(remembered("embedding names", source.text, lambda: _embedding_names(_skeleton(source))))
    )


def _embedding_names(network: PreTrainedModel) -> list[str]:
    ends = [id(module) for module in (network.get_input_embeddings(), network.get_output_embeddings())]
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if id(module) in ends
        for name, _ in module.named_parameters()
    ]


def kept_wide(folder: Path) -> list[str]:
    """Parameters that the class computes with in float32, whatever the rest is in. Raises CheckpointError."""
    source = _source(folder)
    return [] if _plain(source) else list(remembered("kept wide", source.text, lambda: _kept_wide(_skeleton(source))))


def _kept_wide(network: PreTrainedModel) -> list[str]:
    listed = {*(network._keep_in_fp32_modules or ()), *(network._keep_in_fp32_modules_strict or ())}
    pattern = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in sorted(listed)))
    return [name for name, _ in network.named_parameters() if listed and pattern.search(name)]


def narrowing(folder: Path, where: str) -> list[Problem]:
    """Why the weights of the model in a folder are not gathered as bfloat16; empty if they may be. `where`: the field.

    Raises CheckpointError.
    """
    if not (wide := kept_wide(folder)):
        return []
    what = f"is bfloat16, and the model's class computes in float32 with {wide[0]}" + (", …" if wide[1:] else "")
    return [Problem(where, what, "write auto or float32")]


def recomputable(folder: Path) -> bool:
    """Whether layers of the model in a folder can be computed again in the backward pass. Raises CheckpointError."""
    return known_class(folder) is not None or bool(skeleton(folder).supports_gradient_checkpointing)


def reads_field(folder: Path, name: str) -> bool:
    """Whether the code of the model's class, or of a class that it is built of, reads a field of its configuration.

    Raises CheckpointError.
    """
    config, code = model_config(folder), _code(_source(folder))
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    maps = [getattr(part, "attribute_map", None) or {} for part in parts]
    names = {name, *(alias for aliases in maps for alias, real in aliases.items() if real == name)}
    return any(re.search(rf"config\.{re.escape(alias)}\b|[\"']{re.escape(alias)}[\"']", code) for alias in names)


def has_parameter(folder: Path, name: str) -> bool:
    """Whether the class of the model in a folder has a parameter of this name. Raises CheckpointError."""
    return any(name == known for known, _ in skeleton(folder).named_parameters(remove_duplicate=False))


def vocabulary_size(folder: Path) -> int | None:
    """Tokens that the model in a folder has by its config.json, of models of more than text too.

    Raises CheckpointError.
    """
    if plain := known_class(folder):
        return plain.vocabulary
    size: int | None = getattr(model_config(folder).get_text_config(), "vocab_size", None)
    return size


def room(folder: Path) -> tuple[int, int | None]:
    """Tokens that the input embedding has a row for, and places that it learns a position for; None where positions
    are computed. Raises CheckpointError."""
    source = _source(folder)
    _require_readable(source)
    plain = _plain(source)
    rows, places = (plain.vocabulary, None) if plain else remembered("room", source.text, lambda: _room(source))
    return rows, places


def _room(source: _Source) -> tuple[int, int | None]:
    network = _skeleton(source)
    embedding: Any = network.get_input_embeddings()
    places = int(getattr(_config(source), "max_position_embeddings", None) or 0)
    learnt = places > 0 and any(
        getattr(module, "num_embeddings", None) in (places, places + 2)  # OPT keeps two more
        for module in network.modules()
        if module is not embedding
    )
    return int(embedding.num_embeddings), places if learnt else None


def stored_transposed(folder: Path, module: str) -> bool | None:
    """Whether a module's weight is [inputs, outputs], not [outputs, inputs]; None for what is no matrix product or is
    not there. Its class decides: a linear layer of GPT-2 may be either."""
    source = _source(folder)
    _require_readable(source)
    return _products(source).get(module)


@lru_cache(maxsize=16)
def _products(source: _Source) -> dict[str, bool]:
    """`stored_transposed` of every matrix product by its module's name."""
    if plain := _plain(source):
        return plain.transposed
    transposed: dict[str, bool] = remembered(
        "stored transposed", source.text, lambda: _stored_transposed(_skeleton(source))
    )
    return transposed


def _stored_transposed(network: PreTrainedModel) -> dict[str, bool]:
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = {torch.nn.Linear: False, Conv1D: True, torch.nn.Embedding: True}
    return {
        name: transposed
        for name, module in network.named_modules(remove_duplicate=False)
        for kind, transposed in kinds.items()
        if isinstance(module, kind)
    }


def known_class(folder: Path) -> PlainClass | None:
    """What is known of the class of the model in a folder without asking it. Raises CheckpointError."""
    return _plain(_source(folder))


def _plain(source: _Source) -> PlainClass | None:
    return plain_class(source.text)


def config_text(folder: Path) -> str:
    """config.json in one form for all files that say the same. Raises CheckpointError."""
    return _source(folder).text


def _source(folder: Path) -> _Source:
    try:
        config = read_object(folder / CONFIG, MODEL_CONFIG)
    except OSError as error:
        problem = Problem(CONFIG, f"cannot be read ({type(error).__name__}: {error})", "restore the file")
        raise CheckpointError(f"model {folder}", [problem]) from error
    except UnreadableError as error:
        raise CheckpointError(f"model {folder}", [error.problem(CONFIG)]) from error
    return _Source(json.dumps(config), folder)


@lru_cache(maxsize=16)
def _config(source: _Source) -> PreTrainedConfig:
    try:
        return load_config(source.folder)
    except Exception as error:  # whatever a configuration's class raises for values that it does not take
        raise _unusable(source, error) from error


@lru_cache(maxsize=16)
def _class(source: _Source) -> type[PreTrainedModel]:
    return class_of(_config(source))


@lru_cache(maxsize=4)
def _code(source: _Source) -> str:
    """The source text of all modules that the classes of a model's parts are written in."""
    names = {type(module).__module__ for module in _skeleton(source).modules()}
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(names) if name.startswith("transformers."))


@lru_cache(maxsize=4)
def _skeleton(source: _Source) -> PreTrainedModel:
    import torch

    _require_readable(source)
    config, network = _config(source), _class(source)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = network(config).eval()
            return skeleton
    except Exception as error:  # a class may ask for anything of its configuration
        raise _unusable(source, error) from error


def _require_readable(source: _Source) -> None:
    if problems := folder_problems(source.folder, str(source.folder)):
        raise CheckpointError(f"model {source.folder}", problems)


def _unusable(source: _Source, error: Exception) -> CheckpointError:
    import transformers

    kind = json.loads(source.text).get("model_type")
    what = f"makes no model of type {kind!r} in transformers {transformers.__version__} ({named_line(error)})"
    remedy = "mend it, or upgrade transformers; code that comes with a checkpoint is never run"
    return CheckpointError(f"model {source.folder}", [Problem(CONFIG, what, remedy)])

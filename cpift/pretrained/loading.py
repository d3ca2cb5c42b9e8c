"""Other people's models, tokenizers and rows: the only place that has transformers, peft, datasets or lm-eval load any.

Code that comes with them is never run and nobody is asked whether it may: each loader is told so, and a folder that
cannot be used without its code is refused by name before anything is loaded from it (`code_problems`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpift.disk.facts import remembered
from cpift.errors import CheckpointError, DataError, Problem
from cpift.formats.sizes import folder_problems
from cpift.pretrained.gguf import read_once
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_CLASS = re.compile(r"(?!Auto)\w+(Tokenizer|TokenizerFast|Backend)")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_GENERATION = "custom_generate"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEVER = "code that comes with a model is never run"


def code_problems(folder: Path, where: str) -> list[Problem]:
    """Why a local model or adapter folder cannot be used without running code of its own; empty if it can be.

    Architectures and tokenizers of the installed transformers need none, whatever else the folder refers to. Files
    that are missing are left to those who read them; where one cannot be read, that is all that is said.
    """
    unreadable = folder_problems(folder, where)
    if unreadable:
        return unreadable
    config = _object(folder / "config.json")
    problems = [*_architecture(config, where), *_kernels(config, where), *tokenizer_problems(folder, where)]
    for name in _PROCESSORS:
        if "auto_map" in _object(folder / name):
            remedy = f"{_NEVER}: remove auto_map from {name} if text is all that the model is used for"
            problems.append(Problem(f"{where}, {name}", "names a processor that is code (auto_map)", remedy))
    if (folder / _GENERATION).exists():
        remedy = f"{_NEVER}: move the folder {_GENERATION} away, then the model generates as transformers has it"
        problems.append(Problem(f"{where}, {_GENERATION}", "holds code that generates in the model's place", remedy))
    return problems


def tokenizer_problems(folder: Path, where: str) -> list[Problem]:
    """Those of `code_problems` that concern the tokenizer: all that is asked of a GGUF file's folder."""
    return [*_tokenizer(_object(folder / "config.json"), _object(folder / "tokenizer_config.json"), where)]


def require_no_code(folder: Path) -> None:
    """Raise CheckpointError with all `code_problems`."""
    problems = code_problems(folder, str(folder))
    if problems:
        raise CheckpointError(f"model {folder}", problems)


def load_network(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **arguments: Any) -> Any:
    """`from_pretrained` of a local folder of safetensors, by `class_of` its config; `arguments` are passed on.

    tensors: by the names of files, in the place of those that the folder has. They become the network's own.

    Raises CheckpointError where the folder needs its own code, or is an adapter's.
    """
    require_no_code(folder)
    if (folder / "adapter_config.json").exists():  # transformers would load another model, and the adapter into it
        problem = Problem(str(folder), "holds an adapter's config beside the model", "move adapter_config.json away")
        raise CheckpointError(f"model {folder}", [problem])
    config = load_config(folder)
    kind: Any = class_of(config)
    if tensors is not None:
        given = {"config": config, "state_dict": dict(tensors), "generation_config": _generation_config(folder)}
        return kind.from_pretrained(None, trust_remote_code=False, **given, **arguments)
    return kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **arguments
    )


def _generation_config(folder: Path) -> Any:
    """What `from_pretrained` gives the model in a folder: how it generates, and where that ends."""
    known: Any = _transformers().GenerationConfig
    try:
        return known.from_pretrained(folder, local_files_only=True)
    except OSError:  # older models have it in config.json
        return known.from_pretrained(folder, "config.json", local_files_only=True, _from_model_config=True)


def loading_info(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """What `from_pretrained` says of these tensors in the place of the folder's: its missing, unexpected and mismatched
    keys, and errors. Tensors on `meta` will do, and nothing is put anywhere else. Nothing is logged."""
    require_no_code(folder)
    kind: Any = class_of(load_config(folder))
    with no_progress_bars(), _errors_only():
        loaded = kind.from_pretrained(
            None,
            config=load_config(folder),
            state_dict=dict(tensors),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    info: Mapping[str, Any] = loaded[1]
    return info


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a local folder, of a class of transformers."""
    config: PreTrainedConfig = _transformers().AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return config


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a config names; where it names none, or one without a head, the one that writes
    text.

    Raises CheckpointError.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    text, more = generating_classes()
    bare = MODEL_MAPPING.get(type(config), None)
    named = [getattr(_transformers(), str(name), None) for name in config.architectures or ()]
    known = [table[type(config)] for table in (more, text) if type(config) in table]
    for class_name in (*(candidate for candidate in named if candidate is not bare), *known):
        if isinstance(class_name, type) and issubclass(class_name, _transformers().PreTrainedModel):
            return class_name
    what = f"{config.architectures}, model_type {config.model_type!r}: transformers has no class that generates text"
    raise CheckpointError("model", [Problem("config.json, architectures", what, "use another model")])


def empty_network(folder: Path, **arguments: Any) -> Any:
    """The network that a local folder's config.json describes, with whatever weights it is born with."""
    require_no_code(folder)
    library = _transformers()
    return library.AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=False, **arguments)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, of a class of transformers."""
    require_no_code(folder)
    tokenizer: PreTrainedTokenizerBase = _transformers().AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """The network of a GGUF file, dequantised, with its loading info; and its tokenizer."""
    library = _transformers()
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if hasattr(library, "GgufConfig"):  # releases that can keep the blocks packed have to be told not to
        arguments["quantization_config"] = library.GgufConfig(dequantize=True)
    if problems := tokenizer_problems(file.parent, str(file.parent)):
        raise CheckpointError(f"model {file}", problems)
    safely: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with read_once():
        loaded = library.AutoModelForCausalLM.from_pretrained(file.parent, **safely, **arguments)
        return loaded, load_gguf_tokenizer(file)


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file. Raises CheckpointError where its folder says that it is code."""
    if problems := tokenizer_problems(file.parent, str(file.parent)):
        raise CheckpointError(f"model {file}", problems)
    tokenizer: PreTrainedTokenizerBase = _transformers().AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def load_adapter(model: PreTrainedModel, folder: Path, config: Any) -> PreTrainedModel:
    """`model` with the weights of an adapter's folder to train on; its own config file is not read."""
    import peft

    if not (folder / "adapter_model.safetensors").is_file():
        problem = Problem(str(folder), "holds no adapter_model.safetensors", "pickled adapters are never read")
        raise CheckpointError(f"adapter {folder}", [problem])
    adapted: Any = peft.PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
    return cast("PreTrainedModel", adapted)


def lm_eval_arguments(folder: Path) -> dict[str, Any]:
    """What lm-eval is to load a model with."""
    require_no_code(folder)
    return {"pretrained": str(folder), "dtype": "auto", "trust_remote_code": False}


def hub_rows(repository: str, subset: str | None, **arguments: Any) -> Any:
    """`datasets.load_dataset` of a repository on the hub, and of nothing else that such a name could mean.

    Raises DataError for a name that means a local folder or one of the readers of datasets.
    """
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    what = None
    if _HUB_ID.fullmatch(repository) is None:
        what = "is no data set id such as org/name"
    elif repository in _PACKAGED_DATASETS_MODULES:
        what = "is the name of a reader of files"
    elif Path(repository).exists():
        what = "is also a file or folder here, which would be read instead"
    if what is not None:
        problem = Problem("hub", f"{repository!r} {what}", "give an id on the hub; local rows are JSON lines in `file`")
        raise DataError(f"hub data set {repository}", [problem])
    return load_dataset(repository, subset, trust_remote_code=False, **arguments)


def _architecture(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = config.get("model_type")
    if not config or (isinstance(kind, str) and (_declared(kind) or _known(kind))):
        return
    where = f"{where}, config.json"
    if "auto_map" in config:
        what = f"describes a model that is code of its own (model_type {kind!r}, auto_map)"
        yield Problem(where, what, f"{_NEVER}: use a model that transformers has, or convert this one to such a model")
    else:
        what = f"model_type {kind!r} is no language model of the installed transformers"
        yield Problem(where, what, "use a causal language model that transformers has, or install a newer release")


def _declared(kind: str) -> bool:
    """Whether transformers has a text model of this name, as its files say: to import it takes far longer."""
    spec = importlib.util.find_spec("transformers")
    name = kind.replace("-", "_").lower()
    if spec is None or not spec.submodule_search_locations or not name.isidentifier():
        return False
    folder = Path(next(iter(spec.submodule_search_locations))) / "models" / name
    config, model = folder / f"configuration_{name}.py", folder / f"modeling_{name}.py"
    if not (config.is_file() and model.is_file()):
        return False
    declares = f'model_type = "{kind}"' in config.read_text(encoding="utf-8")
    return (
        declares and re.search(r"^class \w+ForCausalLM\(", model.read_text(encoding="utf-8"), re.MULTILINE) is not None
    )


def _known(kind: str) -> bool:
    """The same, asked of transformers; and models that read more than text."""
    return bool(remembered("model type known", kind, lambda: _asked(kind)))


def _asked(kind: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return kind in CONFIG_MAPPING and any(CONFIG_MAPPING[kind] in table for table in generating_classes())


def generating_classes() -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """transformers' tables of the classes that write text, by class of configuration: those that read text alone, and
    those that read images, sound and the like too."""
    from transformers.models.auto import modeling_auto

    return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING


def _tokenizer(config: Mapping[str, Any], tokenizer: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for name, fields in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        kind = fields.get("tokenizer_class")
        if kind is not None and not (isinstance(kind, str) and _TOKENIZER_CLASS.fullmatch(kind)):
            remedy = "name a tokenizer class of transformers, such as TokenizersBackend"
            yield Problem(f"{where}, {name}", f"tokenizer_class {kind!r} is no tokenizer", remedy)
    stated = tokenizer.get("auto_map")
    if stated and (not isinstance(stated, dict) or "AutoTokenizer" in stated):
        remedy = f"{_NEVER}: remove auto_map if tokenizer.json says all, or convert the tokenizer to a tokenizer.json"
        yield Problem(f"{where}, tokenizer_config.json", "names a tokenizer that is code of its own (auto_map)", remedy)


def _kernels(fields: Any, where: str) -> Iterator[Problem]:
    """Implementations of layers (attn_implementation and the like) that are repositories of compiled code."""
    for key, value in fields.items() if isinstance(fields, dict) else ():
        names = value.values() if isinstance(value, dict) else [value]
        if key.endswith(("_implementation", "_implementation_internal")):
            for name in (name for name in names if isinstance(name, str) and "/" in name):
                remedy = f"{_NEVER}: remove the field, then transformers' own layers are used"
                yield Problem(f"{where}, config.json, {key}", f"{name!r} is compiled code from the hub", remedy)
        yield from _kernels(value, where)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, MODEL_CONFIG)
    except (OSError, UnreadableError):  # said where the file is checked
        return {}


def _transformers() -> Any:
    """The library, which has been told to refuse where a loader inside a loader would ask on the terminal."""
    import transformers
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    return transformers


@contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars while it loads and saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

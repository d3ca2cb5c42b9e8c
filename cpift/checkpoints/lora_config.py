"""Every field of an adapter's `adapter_config.json`: what it means for the weights, or why the adapter is refused.

The fields are those of PEFT's `LoraConfig`. One that is not in the table is refused unless it is empty: a newer PEFT
may mean by it something that is no product B·A.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.errors import CheckpointError, Problem
from cpift.untrusted.json import ADAPTER, UnreadableError, read_object

ADAPTER_CONFIG = "adapter_config.json"
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
MERGE_FIRST = (
    "merge it with PEFT (merge_and_unload) on the model that it was trained on (untied before, if the adapter changes "
    "an embedding or output layer that are tied), save the result and give that"
)
_CONVERT = (
    "save it as plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), where "
    "FOLDER holds the adapter as it was before training; or merge it with PEFT and give the result"
)
_NO_WEIGHTS = "none: it is no change of weights, and PEFT cannot merge it either; train plain LoRA, or a full model"
_UNKNOWN = "save the adapter with a PEFT of which this cpift knows every field, or merge it with PEFT first"
# Methods that leave weights as they are: prompts, prefixes and added layers. PEFT merges none of them.
_PROMPTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
)


@dataclass(frozen=True)
class Used:
    """A field that enters the weights."""

    how: str


@dataclass(frozen=True)
class Silent:
    """A field that does not change what the file's tensors mean."""

    why: str


@dataclass(frozen=True)
class Neutral:
    """A field that has to be at one of these values; `otherwise` says what another one makes of the adapter."""

    otherwise: str
    remedy: str = MERGE_FIRST
    values: tuple[Any, ...] = _EMPTY


_RECIPE = "how a start is computed; `init_lora_weights` says whether θ0's weights were changed by it"
_MUTATES = "the start takes a part out of θ0's weights, so the adapter belongs to a residual that is not θ0"
_NAMES = "which modules were adapted: the names of the file's tensors say it"

FIELDS: Mapping[str, Used | Silent | Neutral] = {
    "peft_type": Used("has to be `LORA`"),
    "r": Used("rank; has to be the file's"),
    "lora_alpha": Used("scaling = lora_alpha ÷ r"),
    "use_rslora": Used("scaling = lora_alpha ÷ √r"),
    "rank_pattern": Used("rank of the modules that match, as PEFT matches them"),
    "alpha_pattern": Used("lora_alpha of the modules that match"),
    "bias": Used("trained biases are in the file and replace θ0's"),
    "modules_to_save": Used("modules trained whole are in the file and replace θ0's"),
    "ensure_weight_tying": Used("both of a tied pair are in the file; each is applied to its own"),
    "init_lora_weights": Neutral(
        _MUTATES, _CONVERT, (None, True, False, "gaussian", "orthogonal", "eva", "mica")
    ),
    "fan_in_fan_out": Silent("PEFT keeps one flag for all modules; the class of each module in θ0 decides"),
    "target_modules": Silent(_NAMES),
    "exclude_modules": Silent(_NAMES),
    "layers_to_transform": Silent(_NAMES),
    "layers_pattern": Silent(_NAMES),
    "eva_config": Silent(_RECIPE),
    "corda_config": Silent(_RECIPE),
    "lora_ga_config": Silent(_RECIPE),
    "loftq_config": Silent(_RECIPE),
    "lora_dropout": Silent("while training only"),
    "velora_config": Silent("while training only: how activations are kept for the backward pass"),
    "inference_mode": Silent("while training only"),
    "runtime_config": Silent("where PEFT computes"),
    "megatron_core": Silent("the name of a package"),
    "qalora_group_size": Silent("belongs to `use_qalora`"),
    "task_type": Silent("a label"),
    "auto_mapping": Silent("a label"),
    "peft_version": Silent("a label"),
    "base_model_name_or_path": Silent("a label: shapes and modules are compared with the θ0 that is given"),
    "revision": Silent("a label"),
    "use_dora": Neutral("DoRA scales every row of the sum to a trained length"),
    "lora_bias": Neutral("the factor B has a bias of its own"),
    "use_qalora": Neutral("QALoRA pools the inputs of a quantised layer", _NO_WEIGHTS),
    "use_bdlora": Neutral("BD-LoRA's factors are block-diagonal"),
    "arrow_config": Neutral("Arrow chooses among several adapters for every token", _NO_WEIGHTS),
    "monteclora_config": Neutral("MonteCLoRA adds a trained distribution to the factor A"),
    "kasa_config": Neutral("KaSA takes the smallest singular values out of θ0's weights"),
    "alora_invocation_tokens": Neutral("aLoRA acts from a token on, not on every one", _NO_WEIGHTS),
    "layer_replication": Neutral("its model has other layers than θ0", _NO_WEIGHTS),
    "megatron_config": Neutral("its modules are Megatron's, cut over devices"),
    "target_parameters": Neutral("factors of bare parameters, such as experts kept as one tensor"),
    "trainable_token_indices": Neutral("single rows of the embedding were trained"),
}  # fmt: skip


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The adapter's settings; of plain LoRA, those that are used have the form that PEFT gives them.

    Raises CheckpointError.
    """
    try:
        settings = read_object(folder / ADAPTER_CONFIG, ADAPTER)
    except UnreadableError as error:
        raise CheckpointError(f"adapter {folder}", [error.problem(ADAPTER_CONFIG)]) from error
    except OSError as error:
        problem = Problem(ADAPTER_CONFIG, f"cannot be read ({type(error).__name__}: {error})", "restore the file")
        raise CheckpointError(f"adapter {folder}", [problem]) from error
    problems = list(_malformed(settings)) if settings.get("peft_type", "LORA") == "LORA" else []
    if problems:
        raise CheckpointError(f"adapter {folder}", problems)
    return settings


def _malformed(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for name, (form, fits) in _FORMS.items():
        if not fits(settings.get(name)):
            what = f"is {_short(settings[name])}, not {form}" if name in settings else f"is not there: {form}"
            yield Problem(f"{ADAPTER_CONFIG}, {name}", what, "restore the file, or save the adapter again with PEFT")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 31


def _by_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# Fields that enter the weights, and the values that PEFT gives them.
_FORMS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number from 1 on", _is_rank),
    "lora_alpha": ("a number", _is_alpha),
    "use_rslora": ("true or false", lambda value: value is None or isinstance(value, bool)),
    "rank_pattern": ("whole numbers from 1 on by pattern", _by_pattern(_is_rank)),
    "alpha_pattern": ("numbers by pattern", _by_pattern(_is_alpha)),
    "modules_to_save": ("a list of names", _are_names),
}


def setting_problems(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Every field for which the adapter is not θ0 + scaling · B·A, and what would make it that."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        remedy = _NO_WEIGHTS if kind in _PROMPTS else MERGE_FIRST
        yield Problem(f"{ADAPTER_CONFIG}, peft_type", f"is {kind!r}, not LORA", remedy)
        return  # another method's fields mean other things
    for name, value in sorted(settings.items()):
        field = FIELDS.get(name)
        if field is None and value not in _EMPTY:
            yield Problem(f"{ADAPTER_CONFIG}, {name}", f"is {_short(value)}, and not known to cpift", _UNKNOWN)
        if isinstance(field, Neutral) and not _at(value, field.values):
            yield Problem(f"{ADAPTER_CONFIG}, {name}", f"is {_short(value)}: {field.otherwise}", field.remedy)


def fields_table() -> str:
    """The table of docs/supported.md."""
    rows = ["| field | what happens |", "|---|---|"]
    for name, field in sorted(FIELDS.items()):
        if isinstance(field, Used):
            rows.append(f"| `{name}` | understood: {field.how} |")
        elif isinstance(field, Silent):
            rows.append(f"| `{name}` | no influence on the weights: {field.why} |")
        else:
            values = ", ".join(f"`{json.dumps(value)}`" for value in field.values)
            rows.append(f"| `{name}` | refused unless {values}: {field.otherwise} → {field.remedy} |")
    rows.append(f"| any other | refused unless empty → {_UNKNOWN} |")
    return "\n".join(rows)


def _at(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; 0 and 1 are not False and True."""
    return any(type(value) is type(choice) and value == choice for choice in allowed)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

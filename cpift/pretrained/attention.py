"""What computes a model's attention, and which models keep the examples of one row apart: they build their mask from
`position_ids` that begin again at 0, or take the examples' lengths where a kernel has no mask (flash attention).

Not all do. Recurrent layers carry their state from one example into the next, distances that are added to scores
(ALiBi) are counted through, and some classes make their mask without positions: each trains on, and what it learns of
an example depends on which others are in its row. So classes are listed, and a test compares every one of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.disk.facts import remembered
from cpift.errors import Problem, entry
from cpift.pretrained.architecture import CONFIG, config_text, skeleton
from cpift.untrusted.json import MODEL_CONFIG, read_object

if TYPE_CHECKING:
    from cpift.config.training import TrainingConfig
    from cpift.devices import Device

# By `model_type`, classes of attention alone.
_APART = (
    "apertus arcee cohere cohere2 cwm deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone4 flex_olmo "
    "gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium "
    "hunyuan_v1_dense hunyuan_v1_moe llama ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe "
    "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma"
)
APART = frozenset(_APART.split())
# Those whose attention tells a flash kernel all that their mask says; the layers of phimoe leave out the window.
FLASH = APART - {"phimoe"}
_ATTENTION = {"full_attention", "sliding_attention"}


def keeps_apart(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json gives each example of a row what it would give it alone."""
    layers = config.get("layer_types")
    return config.get("model_type") in APART and (layers is None or set(layers) <= _ATTENTION)


def mixing(folder: Path, where: str) -> list[Problem]:
    """Why rows of several examples cannot be given to the model in a folder; empty if they can. `where`: the field."""
    config = read_object(folder / CONFIG, MODEL_CONFIG)
    if keeps_apart(config):
        return []
    what = f"is true, and with model_type {config.get('model_type')!r} examples in one row are not known to stay apart"
    return [Problem(where, what, "write false: each example then has a row of its own")]


@dataclass(frozen=True)
class Attention:
    """One of transformers' implementations of attention.

    name: transformers' own; None: what it takes by itself. mark: the attribute of classes that have it. module: what
    has to be installed. gpu: whether it trains on GPUs alone. widths: of a head, least and most. drops: whether it
    knows dropout.
    """

    name: str | None
    mark: str = ""
    module: str = ""
    gpu: bool = False
    widths: tuple[int, int] = (1, 1 << 16)
    drops: bool = True


# `attention` → what it is. flash-attn's kernels know heads of up to 256, torch's flex_attention of 16 and more.
IMPLEMENTATIONS = {
    "auto": Attention(None),
    "eager": Attention("eager"),
    "sdpa": Attention("sdpa", "_supports_sdpa"),
    "flash_attention_2": Attention("flash_attention_2", "_supports_flash_attn", "flash_attn", True, (1, 256)),
    "flex": Attention("flex_attention", "_supports_flex_attn", "", True, (16, 1 << 16), drops=False),
}
_ANOTHER = "write auto, or name another"


def implementation(name: str) -> Attention:
    """What a config's `attention` is."""
    return entry(IMPLEMENTATIONS, name, "attention")


def takes_lengths(config: Any) -> bool:
    """Whether a network of this configuration computes attention without a mask, example by example, as their lengths
    say."""
    return str(getattr(config, "_attn_implementation", "")).startswith("flash_attention")


def check_attention(trainings: Sequence[TrainingConfig], device: Device) -> list[Problem]:
    """What is missing on this machine for the attention that fine-tunes ask for."""
    problems = []
    for name in dict.fromkeys(training.attention for training in trainings):
        asked = implementation(name)
        if asked.gpu and device == "cpu":
            what = f"{name} trains on GPUs alone, and fine-tunes have none"
            problems.append(Problem("attention", what, "set resources.gpus_per_worker, or write auto, sdpa or eager"))
        if asked.module and importlib.util.find_spec(asked.module) is None:
            what = f"{name} needs {asked.module.replace('_', '-')}, which is not installed"
            problems.append(Problem("attention", what, f"pip install flash-attn, or {_ANOTHER}"))
    return problems


def not_attending(folder: Path, training: TrainingConfig, where: str) -> list[Problem]:
    """Why the class of the model in a folder cannot be trained with the attention that is asked for; empty if it can.
    `where`: the field.

    Raises CheckpointError.
    """
    name = training.attention
    if implementation(name).name in (None, "eager"):
        return []
    asked = [config_text(folder), name]
    reasons = remembered("no such attention", asked, lambda: list(_not_attending(folder, name)))
    return [Problem(where, f"{name}: {reason}", _ANOTHER) for reason in reasons]


def _not_attending(folder: Path, name: str) -> Iterator[str]:
    asked, network = implementation(name), skeleton(folder)
    config, kind = network.config.get_text_config(), type(network).__name__
    kernels = getattr(network, "_compatible_flash_implementations", None) if asked.module else None
    if not getattr(network, asked.mark) or (kernels is not None and asked.name not in kernels):
        yield f"transformers' {kind} has no such attention"
        return
    if asked.module and config.model_type not in FLASH:
        yield f"with model_type {config.model_type!r} it is not known to compute what the other kinds do"
        return
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    least, most = asked.widths
    if width and not least <= width <= most:
        yield f"the model's heads are {width} wide, and it takes {least} to {most}"
    dropped = float(getattr(config, "attention_dropout", 0.0) or 0.0)
    if dropped and not asked.drops:
        yield f"the model drops a share of its attention (attention_dropout {dropped:g}), and it does not"

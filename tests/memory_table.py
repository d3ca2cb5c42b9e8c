"""The table of docs/training.md: what fine-tunes of the paper's configs hold on a GPU, by the code that a plan counts
with. `python -m tests.memory_table` writes it anew."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from cpift.config.loading import read_yaml
from cpift.config.training import TrainingConfig
from cpift.pretrained.architecture import skeleton
from cpift.training.memory import training_memory

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "training.md"
_BEGIN, _END = "<!-- table: memory -->\n", "<!-- end -->"
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}

# Config of the paper → class of its model, its parameters, and what of its config.json decides their shapes
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama2-7b": ("Llama", 6_738_415_616, _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008}),
    "qwen1.5-7b": ("Qwen2", 7_721_324_544, _LLAMA | {"vocab_size": 151936, "intermediate_size": 11008}),
    "mistral-8b": (
        "Mistral",
        8_019_808_256,
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128, "vocab_size": 131072, "intermediate_size": 12288},
    ),
    "gemma-9b": (
        "Gemma2",
        9_241_705_984,
        {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 256, "vocab_size": 256000, "intermediate_size": 14336, "tie_word_embeddings": True},
    ),
}
_ALONE = {"batch_size": 1}
# Which config, what is said of the fine-tune, GPUs (several: FSDP2), and fields that are not the config's
ROWS: list[tuple[str, str, int, dict[str, Any]]] = [
    *((name, "the paper's config", 8, {}) for name in SHAPES),
    ("llama2-7b", "without `gradient_checkpointing`", 8, {"gradient_checkpointing": False}),
    ("llama2-7b", "`optimizer: muon`", 8, {"optimizer": "muon"}),
    ("llama2-7b", "1 row", 1, _ALONE),
    ("llama2-7b", "1 row, `optimizer: adamw_8bit`", 1, _ALONE | {"optimizer": "adamw_8bit"}),
    ("llama2-7b", "1 row, `optimizer: adafactor`", 1, _ALONE | {"optimizer": "adafactor"}),
    ("llama2-7b", "1 row, `lora: {rank: 16}`", 1, _ALONE | {"lora": {"rank": 16}}),
    ("llama2-7b", "1 row, `lora: {rank: 16, base: nf4}`", 1, _ALONE | {"lora": {"rank": 16, "base": "nf4"}}),
]


def table() -> str:
    """As markdown, in GB a GPU."""
    head = ["| GPUs | config | fine-tune | weights | gradients | optimizer | activations | all |"]
    return "\n".join([*head, "|--:|---|---|" + 5 * "--:|", *map(line, ROWS)])


def line(row: tuple[str, str, int, dict[str, Any]]) -> str:
    """Of one fine-tune."""
    name, what, gpus, fields = row
    config = read_yaml(ROOT / "configs" / "paper" / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        training = TrainingConfig(**(config["probe"] | fields))
        memory = training_memory(_folder(Path(temporary), name), training, gpus, narrow=True)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
    return f"| {gpus} | {name} | {what} | {' | '.join(f'{part / 1e9:.1f}' for part in parts)} |"


def _folder(place: Path, name: str) -> Path:
    """The config of a model in bfloat16, without its weights."""
    kind, parameters, fields = SHAPES[name]
    stated = {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"], "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(stated | {"tie_word_embeddings": False} | fields))
    assert sum(parameter.numel() for parameter in skeleton(place).parameters()) == parameters
    return place


def written(text: str) -> str:
    """The document with the table as the code has it."""
    marked = re.compile(f"({re.escape(_BEGIN)}).*?({_END})", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", text)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

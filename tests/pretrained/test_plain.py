"""What is said of common classes without asking them is what they say: parameters, ties, what a class takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import unloadable, unwritable
from cpift.errors import CheckpointError
from cpift.pretrained import architecture, plain
from cpift.pretrained import fields as model_fields
from cpift.pretrained.fields import config_differences, generation_differences
from cpift.pretrained.kinds import FIELDS, KINDS
from cpift.pretrained.plain import plain_class
from cpift.pretrained.release import CHECKED
from tests.helpers.kinds import config_of

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT = {"rope_theta": 10_000.0, "rope_type": "default"}
MODULES = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm", "none")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    {"tie_word_embeddings": False, "head_dim": 6, "num_hidden_layers": 1, "bos_token_id": 1},
)
# Of every field, what is tried; what a class does not take must not be taken here.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 3, 0.5, 1.0, 2.5, float("nan"), "x", "silu", "gelu_pytorch_tanh", "bfloat16", "hybrid"),
    *([], [1], [1, 2], [1, 0], [None, 1], ["full_attention"] * 2, ["sliding_attention"] * 2, ["other"] * 2),
    *(DEFAULT, DEFAULT | {"rope_type": "linear"}, {"rope_type": "llama3"} | LLAMA3, DEFAULT | {"rope_type": "llama3"}),
    DEFAULT | LLAMA3 | {"rope_type": "llama3"},
    {"full_attention": DEFAULT, "sliding_attention": DEFAULT},
    DEFAULT | {"partial_rotary_factor": 1.0},
)


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    return {
        "tied": architecture.tied_names(folder),
        "untrainable": architecture.untrainable(folder, "model"),
        "embeddings": architecture.embedding_names(folder),
        "vocabulary": architecture.vocabulary_size(folder),
        "room": tuple(architecture.room(folder)),
        "transposed": {name: architecture.stored_transposed(folder, name) for name in MODULES},
    }


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, classes are asked themselves."""

    def ask() -> None:
        monkeypatch.setattr(architecture, "plain_class", lambda text: None)
        architecture._products.cache_clear()

    return ask


def test_the_release_that_the_tests_run_with_is_one_of_those_that_are_known() -> None:
    assert version("transformers") in CHECKED, "compare, by the tests of this file, and add it"


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_says_the_same_itself(kind: str, tmp_path: Path, asking: Callable[[], None]) -> None:
    folders = [folder_of(tmp_path / str(place), config_of(kind, **more)) for place, more in enumerate(CHANGES)]
    found = [plain_class(architecture.config_text(folder)) for folder in folders]
    said = [facts_of(folder) for folder in folders]
    asking()
    for one, folder, facts in zip(found, folders, said, strict=True):
        network = architecture.skeleton(folder)
        assert one is not None
        assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == one.shapes
        assert facts_of(folder) == facts
        assert architecture._products(architecture._source(folder)) == one.transposed


SILENT = {"use_cache": False, "dtype": "float16", "transformers_version": "4.30.0", "attention_dropout": 0.5}
SILENT |= {"tie_word_embeddings": True, "_name_or_path": "x", "initializer_range": 0.5, "vocab_size": 48}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_what_differs_silently_differs_silently_for_the_class(
    kind: str, tmp_path: Path, asking: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"bos_token_id": 1, "tie_word_embeddings": False}
    base, tune = (
        folder_of(tmp_path / name, config_of(kind, **{**said, **more})) for name, more in (("a", {}), ("b", SILENT))
    )
    other = folder_of(tmp_path / "other", config_of(kind, **said, rope_theta=2.0))
    for folder, changes in ((base, {}), (tune, {"use_cache": False, "transformers_version": "4.30.0"})):
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 0.5} | changes))
    with monkeypatch.context() as patch:
        patch.setattr("cpift.pretrained.fields.effective_config", None)  # nobody asks
        patch.setattr("cpift.pretrained.fields.remembered", None)
        assert config_differences(base, tune) == generation_differences(base, tune) == []
    assert config_differences(base, other) != []
    asking()
    assert config_differences(base, tune) == []


def alike(base: dict[str, Any], tune: dict[str, Any], folder: Path) -> bool:
    """Whether two configs are known to mean the same; then their class says so."""
    folders = [folder_of(folder / name, config) for name, config in (("base", base), ("tune", tune))]
    if not model_fields._known_alike(*folders):
        return False
    mine, theirs = (architecture.load_config(one).to_dict() for one in folders)
    assert list(model_fields._differences(mine, theirs, lambda name: model_fields._effect(folders[0], name))) == []
    return True


AS_ON_THE_HUB: dict[str, Any] = {  # by releases of transformers before 5
    "rope_theta": 1000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 2,
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_to_mean_the_same_does(kind: str, tmp_path: Path) -> None:
    gemma = kind.startswith("gemma")
    base = config_of(kind, **AS_ON_THE_HUB | ({"hidden_act": "gelu_pytorch_tanh"} if gemma else {}))
    for value in VALUES:
        for name in {**FIELDS, **KINDS[kind].fields}:
            if plain_class(json.dumps(base | {name: value})) is not None:
                alike(base, base | {name: value}, tmp_path)
    architecture.load_config(folder_of(tmp_path, base)).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert alike(base, saved | {"use_cache": False}, tmp_path) is not (gemma or kind == "phi3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_values_that_the_class_takes_are_known(kind: str, tmp_path: Path) -> None:
    fields = {**FIELDS, **KINDS[kind].fields}
    for name in fields:
        others = ("rope_scaling", "rope_theta") if name == "rope_parameters" else ()
        base = {key: value for key, value in config_of(kind).items() if key not in others}
        for value in VALUES:
            text = json.dumps(base | {name: value})
            if plain_class(text) is not None:
                folder = folder_of(tmp_path, json.loads(text))
                assert architecture.load_config(folder).model_type == kind, (name, value)


def test_what_is_saved_again_is_known_too(tmp_path: Path) -> None:
    """As transformers writes it: cpift's own outputs."""
    for kind in KINDS:
        config = architecture.load_config(
            folder_of(tmp_path, config_of(kind, dtype="bfloat16", bos_token_id=1, eos_token_id=2))
        )
        config.save_pretrained(tmp_path / kind)
        assert plain_class((tmp_path / kind / "config.json").read_text()) is not None, kind


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"hidden_act": "relu6"},
        {"hidden_size": "16"},
        {"vocab_size": True},
        {"pad_token_id": 40},
        {"pad_token_id": -1},
        {"num_hidden_layers": 10**9},
        {"rope_parameters": DEFAULT, "rope_theta": 5.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoConfig": "x.X"}},
        {"never_heard_of": 1},
    ],
)
def test_whatever_is_unusual_is_asked(changes: dict[str, Any]) -> None:
    assert plain_class(json.dumps(config_of("llama"))) is not None
    assert plain_class(json.dumps(config_of("llama") | changes)) is None


def test_another_release_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "checked_release", lambda: None)
    plain_class.cache_clear()
    assert plain_class(json.dumps(config_of("llama"))) is None
    plain_class.cache_clear()


# ---- files -----------------------------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _with(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: value}


NORM = "model.layers.1.input_layernorm.weight"
FILES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "whole": dict,
    "lacks one": _without(NORM),
    "of another shape": _with(NORM, torch.ones(15)),
    "one too much": _with("model.layers.2.input_layernorm.weight", torch.ones(16)),
    "a buffer of before": _with("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "whole numbers": _with("model.layers.0.steps", torch.ones(4, dtype=torch.int64)),
    "tied and there twice": lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    "under the tied name": lambda tensors: {
        ("lm_head.weight" if name == "model.embed_tokens.weight" else name): value for name, value in tensors.items()
    },
    "wrapped": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    "of a bare model": lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()},
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_judged_as_their_class_does(name: str, tmp_path: Path, asking: Callable[[], None]) -> None:
    config = config_of("llama", tie_word_embeddings=True)
    known = plain_class(json.dumps(config))
    assert known is not None
    tensors = {key: torch.ones(shape) for key, shape in known.own.items()}
    save_file(FILES[name](tensors), folder_of(tmp_path, config) / "model.safetensors", metadata={"format": "pt"})

    def judged() -> list[Any]:
        try:
            model = Checkpoint(tmp_path)
        except CheckpointError as error:
            return [str(error)]
        return [model.prefix, model.ties, model.names, unloadable(model, "model"), unwritable(model, "model")]

    found = judged()
    asking()
    assert judged() == found
    assert (found[-2:] == [[], []]) is (name not in ("lacks one", "of another shape"))

"""Classes whose layers stand in any place: asked of transformers, and the config.json of models made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.config.settings import layer_of
from cpift.errors import CheckpointError
from cpift.pretrained.architecture import effective_config
from cpift.pretrained.stacking import COUNTS, UNIFORM, apart_beside_layers, require_uniform, stacked_config
from tests.helpers.classes import SIZES
from tests.helpers.kinds import config_of

LAYERS = 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNIFORM)
def test_a_class_has_the_same_parameters_in_every_layer_and_these_lists(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(kind)
    fields = {name: value for name, value in SIZES.items() if hasattr(known, name) and name != "num_hidden_layers"}
    config = AutoConfig.for_model(kind, num_hidden_layers=LAYERS, **fields)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    layers: dict[tuple[str, int], list[Any]] = {}
    for name, tensor in state.items():
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, []).append((name[len(f"{layer[0]}{layer[1]}") :], tensor.shape))
    assert len(layers) == LAYERS
    assert len({stack for stack, _ in layers}) == 1
    assert all(parts == next(iter(layers.values())) for parts in layers.values())
    lists = {name for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == LAYERS}
    assert lists == set(UNIFORM[kind])
    assert known.attribute_map.get("num_hidden_layers", "num_hidden_layers") in COUNTS


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_lists_of_layers_are_put_together(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    base = config_of("gemma2", layer_types=types, sliding_window=8)
    folder = write(tmp_path / "base", base)
    made = stacked_config(base, [[(folder, 0)], [(folder, 1)], [(folder, 1)]])
    assert made["num_hidden_layers"] == 3
    assert made["layer_types"] == [*types, "full_attention"]
    assert effective_config(write(tmp_path / "made", made))["layer_types"] == made["layer_types"]
    with pytest.raises(CheckpointError, match="layers of several kinds into layer 0"):
        stacked_config(base, [[(folder, 0), (folder, 1)]])

    silent = {name: value for name, value in base.items() if name != "layer_types"}  # its class alternates them
    folder = write(tmp_path / "silent", silent)
    assert "layer_types" not in stacked_config(silent, [[(folder, 0)], [(folder, 1)], [(folder, 0)]])
    assert stacked_config(silent, [[(folder, 1)], [(folder, 1)]])["layer_types"] == ["full_attention"] * 2


def test_what_may_not_stand_in_any_place_is_refused_by_name(tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"model_type": "bert"})
    with pytest.raises(CheckpointError, match="model_type: is 'bert', and it is not known"):
        require_uniform(other)
    experts = write(tmp_path / "experts", {"model_type": "qwen3_moe", "mlp_only_layers": [0], "decoder_sparse_step": 1})
    with pytest.raises(
        CheckpointError, match=r"mlp_only_layers: is \[0\]: what a layer computes depends on its number"
    ):
        require_uniform(experts)
    one, two = (
        write(tmp_path / "one", config_of("llama")),
        write(tmp_path / "two", config_of("llama", rms_norm_eps=0.5)),
    )
    require_uniform(one)
    (problem,) = apart_beside_layers(one, two)
    assert problem.where == "config.json, rms_norm_eps"
    assert not apart_beside_layers(one, write(tmp_path / "deep", config_of("llama", num_hidden_layers=5)))

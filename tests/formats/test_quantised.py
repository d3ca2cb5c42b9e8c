"""Quantised checkpoints are told by what they hold; the command that makes them dense does so."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift.checkpoints.checkpoint import Checkpoint, differences
from cpift.errors import CheckpointError
from cpift.formats.quantised import METHODS, dense_remedy
from tests.helpers.checkpoints import save_checkpoint


def test_the_table_has_the_methods_of_transformers_and_what_each_can_do() -> None:
    from transformers.quantizers import auto, base
    from transformers.utils.quantization_config import QuantizationMethod

    assert set(METHODS) == {method.value for method in QuantizationMethod} | {"fp8"}
    for method, how in METHODS.items():
        if method == "gguf":
            continue  # read as `model.gguf`
        keys = [key for key in auto.AUTO_QUANTIZER_MAPPING if key.removesuffix("_4bit").removesuffix("_8bit") == method]
        for key in keys:
            quantizer: Any = auto.AUTO_QUANTIZER_MAPPING[key]
            after = quantizer._dequantize is not base.HfQuantizer._dequantize
            loading = "dequantize" in inspect.signature(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[key]).parameters
            assert (how is not None) is (after or loading), method
            assert not loading or how == auto.AUTO_QUANTIZATION_CONFIG_MAPPING[key].__name__


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None, "m.dequantize()"),
        ({"quantization_config": {"load_in_8bit": True}}, None, "(bitsandbytes)"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, None, "Mxfp4Config(dequantize=True)"),
        ({"quantization_config": {"quant_method": "gptq"}}, None, "give the unquantised checkpoint"),
        ({"quantization_config": {"quant_method": "of_2030"}}, None, "(of_2030)"),
        ({}, ("layers.0.q.weight.absmax", torch.uint8), "(bitsandbytes)"),
        ({}, ("layers.0.q.SCB", torch.float32), "(bitsandbytes)"),
        ({}, ("layers.0.q.weight_scale_inv", torch.float32), "FineGrainedFP8Config"),
        ({}, ("layers.0.q.qweight", torch.int32), "(gptq or awq)"),
        ({}, ("layers.0.q.weight", torch.float8_e4m3fn), "FineGrainedFP8Config"),
    ],
)
def test_what_is_quantised_is_named(tmp_path: Path, config: Any, tensor: Any, said: str) -> None:
    tensors = {"a.weight": torch.zeros(3)}
    if tensor:
        tensors[tensor[0]] = torch.zeros(4).to(tensor[1])
    save_checkpoint(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_whole_numbers_under_the_names_of_floats(tmp_path: Path) -> None:
    base = Checkpoint(save_checkpoint(tmp_path / "base", {"a.scale": torch.zeros(3)}))
    tune = Checkpoint(save_checkpoint(tmp_path / "tune", {"a.scale": torch.zeros(3, dtype=torch.int8)}))
    (problem,) = differences(base, tune)
    assert "quantised" in problem.what


def test_the_command_for_fp8_gives_dense_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from cpift.config.inputs import ScratchModel
    from cpift.config.run import ModelConfig
    from cpift.models.sources import materialise

    materialise(ModelConfig(scratch=ScratchModel()), tmp_path / "f")  # for its tokenizer
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, **size)).bfloat16().save_pretrained(tmp_path / "f")
    dense = load_file(tmp_path / "f" / "model.safetensors")
    packed = {}
    for name, tensor in dense.items():
        if "_proj" in name:
            scale = tensor.float().abs().max() / 448
            packed[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            packed[name] = tensor
    save_file(packed, tmp_path / "f" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "f" / "config.json").write_text(json.dumps(config))
    command = re.search(r'python -c "(.*)"', dense_remedy(tmp_path / "f", "fp8"))
    assert command
    exec(command[1], {})
    made = Checkpoint(tmp_path / "f-dense")
    assert set(made.names) == set(dense)
    for name, tensor in dense.items():
        torch.testing.assert_close(made.tensor(name), tensor, rtol=2**-3, atol=1e-4)

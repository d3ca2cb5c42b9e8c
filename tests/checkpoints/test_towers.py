"""Text-only fine-tunes of the language model of a vision-language model, merged into it, loaded by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.towers import open_tower
from cpift.errors import CheckpointError
from cpift.merging.gpu.choice import AutoMerging
from cpift.merging.on_device import DEVICES, DeviceMerging
from tests.helpers.toys import write_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
INTO = "model.language_model"


def llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    eyes, text = CLIPVisionConfig(**EYES, projection_dim=16), LlamaConfig(**TEXT)
    config = LlavaConfig(text_config=text.to_dict(), vision_config=eyes.to_dict(), image_token_index=79)
    return LlavaForConditionalGeneration(config), LlamaForCausalLM(text)


def gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    numbers = {"image_token_index": 79, "boi_token_index": 77, "eoi_token_index": 78}
    config = Gemma3Config(text_config=TEXT | {"head_dim": 8}, vision_config=EYES, mm_tokens_per_image=4, **numbers)
    return Gemma3ForConditionalGeneration(config), Gemma3ForCausalLM(config.text_config)


def qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rotary = {"rope_theta": 1e6, "rope_type": "default"}
    eyes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 1}
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rotary | {"mrope_section": [1, 1, 2]}},
        vision_config=eyes,
        image_token_id=79,
        video_token_id=78,
        vision_start_token_id=77,
        vision_end_token_id=76,
    )
    text = Qwen2Config(**TEXT, rms_norm_eps=1e-5, max_window_layers=80, rope_parameters=rotary)
    return Qwen2VLForConditionalGeneration(config), Qwen2ForCausalLM(text)


KINDS = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl}


def made(kind: str, root: Path) -> tuple[Path, dict[str, Path], list[Any]]:
    """θ0 and two text models: its language model, moved."""
    torch.manual_seed(0)
    whole, text = KINDS[kind]()
    whole.eval().save_pretrained(root / "base")
    write_tokenizer(root / "base", [])
    (root / "base" / "preprocessor_config.json").write_text('{"size": 8}')
    text.get_decoder().load_state_dict(whole.model.language_model.state_dict())
    text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
    texts = []
    for number in (1, 2):
        state = {name: values + 0.05 * torch.randn_like(values) for name, values in text.state_dict().items()}
        if text.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        text.load_state_dict(state)
        text.eval().save_pretrained(root / f"text-{number}")
        write_tokenizer(root / f"text-{number}", [])
        texts.append(state)
    return root / "base", {"one": root / "text-1", "two": root / "text-2"}, [whole, text, texts]


def merged(base: Path, models: dict[str, Path], out: Path, **fields: Any) -> Any:
    into = dict.fromkeys(models, INTO)
    return cpift.merge(base, models, out, **({"method": "linear", "into": into} | fields))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_text_models_are_merged_into_the_language_model(kind: str, tmp_path: Path) -> None:
    """Of a text it computes what the mean of the text models does; all else is θ0's, bit for bit."""
    base, models, (whole, text, states) = made(kind, tmp_path)
    result = merged(base, models, tmp_path / "merged")
    assert all(check["passed"] in (True, None) for check in result.checks)
    loaded = type(whole).from_pretrained(result.path).eval()
    text.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, text(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(loaded(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.path))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    seeing = {name for name in before if any(part in name for part in ("vision", "visual", "projector"))}
    assert same == seeing
    assert (result.path / "preprocessor_config.json").is_file()


def test_what_is_not_the_text_models_stays_whatever_the_weights_are(tmp_path: Path) -> None:
    """A mean that is not normalised scales what it merges, and nothing else."""
    base, models, _ = made("llava", tmp_path)
    result = merged(base, models, tmp_path / "merged", normalize=False, weight=0.7)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.path))
    texts = [load_file(folder / "model.safetensors") for folder in models.values()]
    for name in before:
        if name.startswith("language_model."):
            wanted = sum(0.7 * state[name.removeprefix("language_model.")] for state in texts)
            assert torch.allclose(after[name], wanted, atol=1e-6), name
        else:
            assert torch.equal(after[name], before[name]), name


def test_where_a_gpu_may_be_chosen_text_models_are_merged_on_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models, _ = made("llava", tmp_path)
    plain = merged(base, models, tmp_path / "cpu")
    nothing = DeviceMerging(torch.device("meta"), place=lambda device: pytest.fail("a GPU was used"))
    monkeypatch.setitem(DEVICES, "auto", lambda: AutoMerging(nothing))
    chosen = merged(base, models, tmp_path / "auto", device="auto")
    one, other = (load_file(result.path / "model.safetensors") for result in (plain, chosen))
    assert all(torch.equal(other[name], values) for name, values in one.items())


def test_a_whole_model_goes_beside_a_text_model(tmp_path: Path) -> None:
    base, models, (whole, *_) = made("llava", tmp_path)
    for parameter in whole.parameters():
        parameter.data.add_(0.01)
    whole.save_pretrained(tmp_path / "seeing")
    write_tokenizer(tmp_path / "seeing", [])
    tuned = {"one": models["one"], "seeing": tmp_path / "seeing"}
    fields: dict[str, Any] = {"method": "task_arithmetic", "weight": 0.5, "into": {"one": INTO}}
    result = cpift.merge(base, tuned, tmp_path / "merged", **fields)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.path))
    name = "multi_modal_projector.linear_1.weight"
    assert torch.allclose(after[name], before[name] + 0.005, atol=1e-6)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    base, models, (_, text, _) = made("llava", tmp_path)

    def refused(said: str, **fields: Any) -> None:
        with pytest.raises(cpift.ConfigError, match=said):
            merged(base, models, tmp_path / "merged", **fields)

    refused(
        r"language: is no module of LlavaForConditionalGeneration → give model\.language_model",
        into={"one": "language"},
    )
    refused("fusion.into: is of tasks that share a part", method="cpift")
    refused("fusion.into: goes with no slices", vocabulary="base")
    refused(r"fusion\.into\.three: is no task", into={"three": INTO})
    refused("tasks.two.checkpoint", into={"one": INTO})  # a text model that is said to be all of θ0
    text.config.rms_norm_eps = 0.1
    text.resize_token_embeddings(90)
    text.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        open_tower(tmp_path / "other", Checkpoint(base), INTO)
    assert "config.json, rms_norm_eps: of the text model" in str(caught.value)
    assert "language_model.lm_head.weight: has shape [90, 16], in θ0 [80, 16]" in str(caught.value)
    shutil.rmtree(tmp_path / "other")
    text.model.layers = text.model.layers[:1]
    text.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="that the text model lacks"):
        open_tower(tmp_path / "other", Checkpoint(base), INTO)

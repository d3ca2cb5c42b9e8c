"""One tensor under two names: by the class, in every layout of the files, and apart where a tune has it apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.config.loading import load_config
from cpift.errors import CheckpointError, ConfigError
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX = {"tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, Any]] = {  # the first two are tied by their class's default
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": NEOX,
    "llama": NEOX,
}


def some(fast: str) -> list[Any]:
    """All families, one of them in every run of the tests."""
    return [fast, *(pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES if kind != fast)]


def family(root: Path, kind: str) -> Path:
    """θ0 and two tunes in `base`, `one`, `two`; config.json says nothing of ties where the class's default is meant."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({"vocab_size": 40} if kind == "gpt2" else SIZE), **FAMILIES[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("base", "one", "two"):
        model.save_pretrained(root / name)
        (root / name / "tokenizer.json").write_text("{}")
        said = json.loads((root / name / "config.json").read_text())
        if not FAMILIES[kind].get("tie_word_embeddings"):
            said.pop("tie_word_embeddings", None)
        (root / name / "config.json").write_text(json.dumps(said))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return root


def pair(folder: Path) -> tuple[str, str]:
    """The tied name and the tensor of a saved model."""
    ((target, source),) = Checkpoint(folder).ties.items()
    return target, source


def copy_head(folder: Path, drop: bool = False) -> None:
    """The tied tensor a second time in the file; or, `drop`, under the tied name alone."""
    target, source = pair(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[target] = tensors[source].clone()
    if drop:
        del tensors[source]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def fused(root: Path, tmp_path: Path, **changes: Any) -> Pipeline:
    raw = {
        "name": "merge",
        "output": str(tmp_path / "run"),
        "model": {"path": str(root / "base")},
        "tasks": [{"name": name, "checkpoint": {"path": str(root / name)}} for name in ("one", "two")],
        "regions": {"p": 0.1},
        "backbone": {"source": "pretrained"},
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(raw | changes))
    config = load_config(tmp_path / "merge.yaml")
    preflight(config, stage="fuse")
    pipeline = Pipeline(config, NoEngine())
    pipeline.fuse()
    return pipeline


def weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    return load_file(pipeline.fuse().path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", some("gemma2"))
def test_a_copied_head_changes_nothing(tmp_path: Path, kind: str) -> None:
    plain = family(tmp_path / "plain", kind)
    shutil.copytree(plain, tmp_path / "copied")
    copy_head(tmp_path / "copied" / "base")
    copy_head(tmp_path / "copied" / "one", drop=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = fused(plain, tmp_path / "a"), fused(tmp_path / "copied", tmp_path / "b")
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert pair(plain / "base")[0] not in mine
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    masks = [sorted(run.artifacts.regions.path.rglob("*.safetensors")) for run in (one, other)]
    assert masks[0]
    assert [file.read_bytes() for file in masks[0]] == [file.read_bytes() for file in masks[1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", some("llama"))
def test_a_tune_that_unties_makes_two_tensors_of_every_model(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    root = family(tmp_path / "models", kind)
    target, source = pair(root / "base")
    copy_head(root / "one")
    tensors = load_file(root / "one" / "model.safetensors")
    head = tensors[target] + 0.5 * torch.randn(tensors[target].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {target: head}, root / "one" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="tie_word_embeddings: false"):  # both are there and only one can be meant
        fused(root, tmp_path)
    edit_config(root / "one", tie_word_embeddings=False)
    out = fused(root, tmp_path).fuse().path
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.tie_word_embeddings is False
    theta = load_file(root / "base" / "model.safetensors")
    tunes = [load_file(root / name / "model.safetensors") for name in ("one", "two")]
    for name in (target, source):  # one of the three models alone has moved every element of the head by so much
        trio = [model.get(name, model[source]) for model in (theta, *tunes)]
        got = loaded.get_parameter(name)
        assert bool((got >= torch.stack(trio).amin(0) - 0.02).all() & (got <= torch.stack(trio).amax(0) + 0.02).all())
    assert not torch.equal(loaded.get_parameter(target), loaded.get_parameter(source))
    pretrained, _ = open_models(root / "base", {"one": root / "one"})
    assert torch.equal(pretrained.tensor(target), theta[source])


def test_a_tied_tune_of_an_untied_base_is_read_as_two_equal_tensors(tmp_path: Path) -> None:
    root = family(tmp_path / "models", "llama")
    target, source = pair(root / "base")
    copy_head(root / "base")
    edit_config(root / "base", tie_word_embeddings=False)
    pretrained, models = open_models(root / "base", {name: root / name for name in ("one", "two")})
    assert pretrained.names == models["one"].names
    assert torch.equal(models["one"].tensor(target), models["one"].tensor(source))
    assert weights(fused(root, tmp_path))[target].shape == (40, 16)


def test_a_backbone_that_alone_unties_is_refused(tmp_path: Path) -> None:
    root = family(tmp_path / "models", "llama")
    shutil.copytree(root / "base", root / "backbone")
    copy_head(root / "backbone")
    edit_config(root / "backbone", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="has its embedding and output layer apart"):
        fused(root, tmp_path, backbone={"source": str(root / "backbone")})


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    root = family(tmp_path / "models", "llama")
    edit_config(root / "one", tie_word_embeddings=False)
    with pytest.raises((ConfigError, CheckpointError), match=r"lm_head\.weight"):
        fused(root, tmp_path)

"""Files against classes: transformers' conversion traced, merges that are larger than the budget, other layouts."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.checkpoints.checkpoint import Checkpoint, differences
from cpift.checkpoints.layout import ParameterMasks, checkpoint_layout, unloadable, unwritable
from cpift.checkpoints.opening import open_checkpoint
from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config
from cpift.disk.files import read_json
from cpift.errors import StageError
from cpift.merging.checks import failures
from cpift.merging.verify import check_loads
from cpift.models.scratch import make_scratch_tokenizer
from cpift.models.sources import load_model
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import fuse as fusion_stage
from cpift.pretrained import conversion
from cpift.pretrained.architecture import untrainable
from cpift.pretrained.conversion import Traced, Untraceable

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"shared_expert_intermediate_size": 12, **_EXPERTS},
    "qwen3_moe": {"head_dim": 8, **_EXPERTS},
    "olmoe": _EXPERTS,
    "minimax": {"num_local_experts": 3, "head_dim": 8, "block_size": 8},
    "glm4_moe": {"n_routed_experts": 3, "first_k_dense_replace": 1, "head_dim": 8, **_EXPERTS},
}
LAYOUTS = [(family, original) for family in MIXTURES for original in (True, False)]


def saved(folder: Path, family: str, original: bool = True, seed: int = 1, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SMALL | MIXTURES.get(family, {}) | fields)
    )
    network.save_pretrained(folder, save_original_format=original)
    return folder


@pytest.mark.parametrize(("family", "original"), LAYOUTS)
def test_parameters_and_tensors_are_those_of_transformers(tmp_path: Path, family: str, original: bool) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(saved(tmp_path / "model", family, original))
    state = AutoModelForCausalLM.from_pretrained(checkpoint.folder).state_dict()
    layout = checkpoint_layout(checkpoint)
    assert set(layout.blocks) == set(state)
    assert (layout.unloaded, layout.missing) == ((), ())
    stacked = [name for name in state if layout.same(name) is None]
    assert bool(stacked) is original
    for name, value in state.items():
        assert torch.equal(layout.parameter(name, checkpoint.tensor), value), name
    for name in checkpoint.names:
        assert torch.equal(layout.tensor(name, state.__getitem__), checkpoint.tensor(name)), name


def test_masks_of_experts_are_stacked_as_their_values_are(tmp_path: Path) -> None:
    """Every element of a file has its own value; what transformers loads at a masked place is a masked value."""
    from cpift_kernels import pack_mask, unpack_mask
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "model", "qwen3_moe")
    tensors, at = load_file(folder / "model.safetensors"), 0
    for name, value in tensors.items():
        tensors[name] = torch.arange(at, at + value.numel(), dtype=torch.float32).reshape(value.shape)
        at += value.numel()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    chosen = torch.rand(at, generator=torch.Generator().manual_seed(2)) < 0.2
    inside = {name: value for name, value in tensors.items() if ".experts.1." not in name}  # part of a stack
    masks = ParameterMasks(
        checkpoint_layout(Checkpoint(folder)),
        {name: pack_mask(chosen[value.flatten().long()]) for name, value in inside.items()},
    )
    kept = torch.cat([value.flatten() for value in inside.values()]).long()
    assert set(masks) == set(state)
    for name, words in masks.items():
        values = state[name].flatten().long()
        wanted = chosen[values] & torch.isin(values, kept)
        assert torch.equal(unpack_mask(words, values.numel()), wanted), name


OPERATIONS = {
    "merged and joined": lambda a, b: torch.cat([torch.stack([a, b], dim=0), torch.stack([b, a], dim=0)], dim=1),
    "chunked": lambda a, b: torch.chunk(torch.cat([a, b], dim=0), 3, dim=0)[1],
    "split": lambda a, b: torch.split(torch.cat([a, b], dim=1), [1, 6, 3], dim=1)[1],
    "transposed": lambda a, b: torch.transpose(torch.stack([a, b], dim=-1), dim0=0, dim1=2).contiguous(),
    "unbound": lambda a, b: torch.chunk(torch.stack([a, b], dim=1), 2, dim=1)[1].squeeze(1),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_traced_operations_move_what_torch_moves(operation: Any) -> None:
    values = {"a": torch.arange(20.0).reshape(4, 5), "b": torch.arange(20.0, 40.0).reshape(4, 5)}
    wanted = operation(values["a"], values["b"])
    traced = operation(*(Traced.of(name, value.shape) for name, value in values.items()))
    out = torch.full(tuple(traced.shape), torch.nan)
    for block in traced.blocks:
        block.of_parameter(out).copy_(block.of_tensor(values[block.tensor].flatten()))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    "operation",
    [lambda a: torch.flip(a, [0]), lambda a: a + 1, lambda a: a.view(-1), lambda a: a[0], lambda a: a.mean()],
)
def test_an_operation_that_is_not_in_the_table_is_refused(operation: Any) -> None:
    with pytest.raises((Untraceable, TypeError)):
        operation(Traced.of("a", (4, 5)))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_experts_count_as_there_whatever_the_budget(tmp_path: Path, original: bool, memory: int) -> None:
    folder = saved(tmp_path / "model", "mixtral", original)
    check = check_loads(folder, memory)
    assert check["passed"] is True, check
    tensors = load_file(folder / "model.safetensors")
    name = max(name for name in tensors if "experts" in name)
    save_file({n: x for n, x in tensors.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
    assert failures([check_loads(folder, memory)])


def other_layout(folder: Path, kind: str) -> Path:
    """The model of a folder, written by another program."""
    tensors = load_file(folder / "model.safetensors")
    if kind == "wrapped":
        tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    elif kind == "without the base model's prefix":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    elif kind == "old buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.1.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors["model.layers.1.self_attn.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


OTHER_LAYOUTS = [
    ("llama", True, "wrapped"),
    ("llama", True, "without the base model's prefix"),
    ("llama", True, "old buffers"),
    ("mixtral", True, "stacked"),
    ("qwen3_moe", True, "stacked"),
    ("qwen3_moe", False, "one tensor for each expert"),
    ("glm4_moe", False, "wrapped"),
]


@pytest.mark.parametrize(("family", "original", "kind"), OTHER_LAYOUTS, ids=lambda value: str(value))
def test_a_tune_in_another_layout_reads_as_one_in_its_own(
    tmp_path: Path, family: str, original: bool, kind: str
) -> None:
    base = Checkpoint(saved(tmp_path / "base", family, original))
    plain = Checkpoint(saved(tmp_path / "plain", family, original, seed=2))
    turned = original if kind not in ("stacked", "one tensor for each expert") else not original
    other = open_checkpoint(other_layout(saved(tmp_path / "other", family, turned, seed=2), kind), base)
    assert other.names == base.names
    assert differences(base, other) == []
    for name in base.names:
        assert torch.equal(other.tensor(name), plain.tensor(name)), name
        numel = base.tensors[name].numel
        start, stop = numel // 3, numel - numel // 5
        assert torch.equal(other.slice(name, start, stop), plain.slice(name, start, stop))
        starts = np.arange(0, numel, 37)
        assert torch.equal(other.gather(name, starts, 32), plain.gather(name, starts, 32))
        other.prefetch(name, start, stop)
        other.release(name, start, stop)
    again = pickle.loads(pickle.dumps(other))
    assert torch.equal(again.tensor(base.names[0]), plain.tensor(base.names[0]))


@pytest.mark.parametrize(
    ("family", "prefix", "tied"),
    [
        ("llama", "module.", False),
        ("llama", "_orig_mod.module.", True),
        ("gpt2", "_fsdp_wrapped_module.", True),
        ("glm4_moe", "language_model.", False),
        ("mixtral", "module.", False),
    ],
)
def test_names_are_read_without_what_wraps_them(tmp_path: Path, family: str, prefix: str, tied: bool) -> None:
    plain = Checkpoint(saved(tmp_path / "plain", family, tie_word_embeddings=tied))
    tensors = {f"{prefix}{name}": value for name, value in load_file(plain.folder / "model.safetensors").items()}
    (folder := tmp_path / "wrapped").mkdir()
    (folder / "config.json").write_bytes((plain.folder / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wrapped = Checkpoint(folder)
    for one in (wrapped, pickle.loads(pickle.dumps(wrapped)), open_checkpoint(folder, plain)):
        assert (one.names, one.ties) == (plain.names, plain.ties)
        assert all(torch.equal(one.tensor(name), plain.tensor(name)) for name in plain.names)
    assert wrapped.apart().names == plain.apart().names
    assert [*unloadable(wrapped, "model.path"), *unwritable(wrapped, "model.path")] == []
    mine, theirs = load_model(folder).state_dict(), load_model(plain.folder).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_class_that_builds_no_cache_is_checked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", "recurrent_gemma", lru_width=16, attention_window_size=8)
    assert not failures([check_loads(folder, 1 << 30)])


def test_a_wrapped_tune_is_loaded_to_be_scored(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain", "qwen3_moe")
    wrapped = other_layout(saved(tmp_path / "wrapped", "qwen3_moe"), "wrapped")
    one, two = load_model(plain).state_dict(), load_model(wrapped).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_buffers_of_the_base_alone_are_its_own(tmp_path: Path) -> None:
    base = Checkpoint(other_layout(saved(tmp_path / "base", "llama"), "old buffers"))
    other = open_checkpoint(saved(tmp_path / "other", "llama", seed=2), base)
    assert differences(base, other) == []
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.bias"):
        assert torch.equal(other.tensor(name), base.tensor(name))


def test_another_model_is_told_in_a_sentence(tmp_path: Path) -> None:
    base = Checkpoint(saved(tmp_path / "base", "llama"))
    deeper = open_checkpoint(saved(tmp_path / "deeper", "llama", num_hidden_layers=3), base)
    (problem,) = differences(base, deeper)
    assert re.fullmatch(r"it has 9 that θ0 lacks \((model\.layers\.2\.[\w.]+, ){3}…\)", problem.what), problem.what
    shallow = open_checkpoint(saved(tmp_path / "shallow", "qwen3", num_hidden_layers=1, head_dim=8), base)
    (problem,) = differences(base, shallow)
    assert re.match(r"θ0 has 9 that it lacks \(.*…\); it has 2 that θ0 lacks \(.*q_norm\.weight\)", problem.what)
    fewer = open_checkpoint(
        saved(tmp_path / "fewer", "qwen3_moe", num_experts=2), Checkpoint(saved(tmp_path / "m", "qwen3_moe"))
    )
    (problem, *_) = differences(Checkpoint(tmp_path / "m"), fewer)
    assert "θ0 has 6 that it lacks (model.layers.0.mlp.experts.2.down_proj.weight, " in problem.what


def test_only_buffers_are_left_out(tmp_path: Path) -> None:
    base, name = Checkpoint(saved(tmp_path / "base", "llama")), "model.layers.0.self_attn.q_proj.bias"
    other = saved(tmp_path / "other", "llama", seed=2)
    tensors = load_file(other / "model.safetensors") | {name: torch.zeros(16), "extra.weight": torch.zeros(2)}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (problem,) = differences(base, open_checkpoint(other, base))
    assert problem.what == f"it has 2 that θ0 lacks (extra.weight, {name})"


@pytest.mark.slow
def test_a_vision_language_model_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}')
    (problem,) = untrainable(tmp_path, "model.path")
    assert "LlavaForConditionalGeneration (vision_config), and only models of text alone are trained" in problem.what
    assert untrainable(saved(tmp_path / "text", "mixtral"), "model.path") == []


@pytest.mark.slow
def test_a_class_with_a_loss_of_its_own_is_not_trained(tmp_path: Path) -> None:
    """Its loss would be of each token at that token, so that copying is learnt."""
    (tmp_path / "config.json").write_text('{"model_type": "mbart", "architectures": ["MBartForCausalLM"]}')
    (problem,) = untrainable(tmp_path, "model.path")
    assert "is a MBartForCausalLM, and its class does not use transformers' loss" in problem.what


def fusion_of(tmp_path: Path, **resources: Any) -> Pipeline:
    """A fusion of two tunes of a mixture of experts, larger than 2 MiB."""
    if not (tmp_path / "base").exists():
        for seed, name in enumerate(("base", "one", "two")):
            saved(tmp_path / name, "qwen3_moe", seed=seed, num_experts=16, hidden_size=64, moe_intermediate_size=96)
            make_scratch_tokenizer(ScratchModel()).save_pretrained(tmp_path / name)
    raw = {
        "name": "experts",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "base")},
        "tasks": [{"name": name, "checkpoint": {"path": str(tmp_path / name)}} for name in ("one", "two")],
        "regions": {"p": 0.1},
        "backbone": {"source": "pretrained"},
        "resources": resources,
    }
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(raw))
    return Pipeline(load_config(tmp_path / "experts.yaml"), NoEngine())


@pytest.mark.slow
def test_a_mixture_larger_than_the_budget_is_merged_and_one_that_fails_a_check_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"name": "it answers", "passed": False, "detail": "not a word"}
    monkeypatch.setattr(fusion_stage, "check_loads", lambda folder, memory: failing)
    for attempt in ("", "-2"):
        with pytest.raises(StageError, match="it answers: not a word") as said:
            fusion_of(tmp_path, memory_budget="2MiB").fuse()
        (aside,) = (tmp_path / "run" / "fuse").glob(f"*.failed-checks{attempt}")
        assert f"it is kept as {aside}, with the checks in fusion.json" in str(said.value)
        assert read_json(aside / "fusion.json")["checks"][-1] == failing
        assert set(Checkpoint(aside).names) == set(Checkpoint(tmp_path / "base").names)
    monkeypatch.undo()
    fused = fusion_of(tmp_path, memory_budget="2MiB").fuse()
    check = read_json(fused.path / "fusion.json")["checks"][-1]
    assert check["passed"] is True
    assert check["detail"].endswith("not loaded, for it is larger than the memory budget (2.1 MB)")
    assert torch.equal(Checkpoint(aside).tensor("lm_head.weight"), Checkpoint(fused.path).tensor("lm_head.weight"))


def test_plan_refuses_to_train_what_could_not_be_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of today's text models are in the table; here one of them is not."""
    base = Checkpoint(saved(tmp_path / "base", "mixtral"))
    assert unwritable(base, "model.path") == []
    known = {name: move for name, move in conversion.MOVES.items() if name != "cat"}
    monkeypatch.setattr(conversion, "MOVES", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # what is kept there is known by the code's text
    (problem,) = unwritable(base, "model.path")
    assert problem.where == "model.path: model.layers.0.mlp.experts.gate_up_proj"
    assert "MergeModulelist(dim=0), Concatenate(dim=1) when it is loaded, which uses cat" in problem.what
    assert "save_original_format=False" in problem.remedy
    assert unwritable(Checkpoint(saved(tmp_path / "stacked", "mixtral", original=False)), "model.path") == []

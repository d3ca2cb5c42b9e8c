"""Files against classes: transformers' conversion traced, merges that are larger than the budget, other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift.checkpoints import Checkpoint
from cpift.conversion import Traced, Untraceable
from cpift.layout import ParameterMasks, checkpoint_layout
from cpift.verify import check_loads, failures

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


def saved(folder: Path, family: str, original: bool = True, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
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

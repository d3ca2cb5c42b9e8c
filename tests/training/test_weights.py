"""Weights of several workers, who are played one after the other: a process group whose collectives do nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, checkpoint_layout
from cpift.disk.files import file_sha256
from cpift.models.loading import load_model
from cpift.training.weights import writing
from cpift.training.weights.reading import load_sharded, load_whole
from cpift.training.weights.units import layers_of
from cpift.training.weights.workers import own_rows
from tests.helpers.families import make_family

WORKERS = 3  # no size of the models divides evenly
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"num_key_value_heads": 2}),
    "experts, and a buffer that is kept": (
        "glm4_moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, fields = KINDS[request.param]
    folder = make_family(family, tmp_path_factory.mktemp("base"), fields)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(1)
    save_file({name: torch.randn_like(values).bfloat16() for name, values in tensors.items()}, file)
    return folder


@contextmanager
def worker(rank: int) -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORKERS)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_is_read_as_transformers_reads_it(base: Path) -> None:
    read, wanted = load_whole(base, torch.float32, "cpu"), load_model(base, torch.float32)
    assert not read.training
    assert set(dict(read.named_buffers())) == set(dict(wanted.named_buffers()))
    assert set(read.state_dict()) == set(wanted.state_dict())
    for held in ("state_dict", "named_buffers"):
        for name, values in dict(getattr(wanted, held)()).items():
            assert torch.equal(dict(getattr(read, held)())[name], values), name


def test_every_worker_has_its_rows_and_asks_for_no_others(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_whole(base, torch.float32, "cpu").state_dict()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in whole}
    asked: list[int] = []
    parameter = Layout.parameter

    def counted(self: Layout, *what: Any) -> torch.Tensor:
        values = parameter(self, *what)
        asked.append(values.numel())
        return values

    monkeypatch.setattr(Layout, "parameter", counted)
    for rank in range(WORKERS):
        with worker(rank):
            for name, held in load_sharded(base, torch.float32, "cpu").state_dict().items():
                parts[name].append(held.to_local().clone() if isinstance(held, DTensor) else held)
                if not isinstance(held, DTensor):
                    assert torch.equal(held, whole[name]), name
    sharded = {name: held for name, held in parts.items() if torch.cat(held).numel() == whole[name].numel()}
    assert {name for name in whole if name not in sharded} <= {name for name in whole if "bias" in name}
    for name, held in sharded.items():
        assert torch.equal(torch.cat(held), whole[name]), name
    assert sum(asked) == sum(values.numel() * (1 if name in sharded else WORKERS) for name, values in whole.items())


def test_gathered_narrow_layers_see_bf16_and_weights_stay_wide(base: Path) -> None:
    """In the group's place each worker gathers what nobody sent: only dtypes count."""
    seen: dict[str, torch.dtype] = {}

    def look(module: torch.nn.Module, *_: Any) -> None:
        seen.update({f"{id(module)} {name}": held.dtype for name, held in module.named_parameters(recurse=False)})

    for narrow in (False, True):
        with worker(1):
            model = load_sharded(base, torch.float32, "cpu", narrow)
            assert {held.dtype for held in model.parameters()} == {torch.float32}
            for module in model.modules():
                module.register_forward_pre_hook(look)
            logits = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
        wanted = torch.bfloat16 if narrow else torch.float32
        assert set(seen.values()) == {wanted} == {logits.dtype}
        seen.clear()


@pytest.mark.parametrize(("kind", "together"), [(None, True), ("F32", True), (None, False)])
def test_workers_write_one_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, together: bool
) -> None:
    """Together: what the file has in another layout is gathered, in its dtype; where they see no folder: everything."""
    origin = Checkpoint(base)
    layout = checkpoint_layout(origin)
    network = load_whole(base, torch.float32, "cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.001)
    writing.write_trained(network, layout, origin, tmp_path / "one", True, kind)
    trained, gathered = dict(network.state_dict()), Counter[torch.dtype]()
    monkeypatch.setattr(writing, "_seen_by_all", lambda *_: together)

    def full(tensor: DTensor) -> torch.Tensor:
        gathered[tensor.dtype] += 1
        alike: list[torch.Tensor] = [held.to(tensor.dtype) for held in trained.values() if held.shape == tensor.shape]
        return next(held for held in alike if torch.equal(mine(held, tensor), tensor.to_local()))

    monkeypatch.setattr(writing, "full_tensor", full)
    for rank in range(WORKERS):
        with worker(rank):
            model = load_sharded(base, torch.float32, "cpu")
            shared = {name: held for name, held in model.state_dict().items() if isinstance(held, DTensor)}
            for name, held in shared.items():
                held.to_local().copy_(mine(trained[name], held))
            writing.write_trained(model, layout, origin, tmp_path / "three", rank == 0, kind)
    one, three = (file_sha256(tmp_path / name / "model.safetensors") for name in ("one", "three"))
    assert three == one
    assert {info.kind for info in Checkpoint(tmp_path / "three").tensors.values()} == {kind or "BF16"}
    moved = [name for name in shared if layout.same(name) is None or not together]
    assert gathered == Counter([torch.float32 if kind else torch.bfloat16] * WORKERS * len(moved))


def mine(whole: torch.Tensor, shared: DTensor) -> torch.Tensor:
    rows = own_rows(shared)
    return whole[rows.start : rows.stop]


@pytest.mark.parametrize(
    ("family", "fields", "units"),
    [
        ("mamba", {}, ["backbone.layers.0", "backbone.layers.1"]),
        (
            "zamba2",
            {"layers_block_type": ["hybrid", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1},
            ["model.layers.0.mamba_decoder", "model.layers.1.mamba_decoder"],
        ),
    ],
)
def test_layers_in_layers_and_what_layers_share_are_sharded_once(
    tmp_path: Path, family: str, fields: dict[str, Any], units: list[str]
) -> None:
    folder = make_family(family, tmp_path, fields)
    whole = load_whole(folder, torch.float32, "cpu")
    assert len(layers_of(whole)) == 2
    with worker(1):
        model = load_sharded(folder, torch.float32, "cpu")
        sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert sharded == ["", *units]
        for name, held in model.named_parameters():
            assert isinstance(held, DTensor)
            assert torch.equal(held.to_local(), mine(whole.get_parameter(name), held)), name

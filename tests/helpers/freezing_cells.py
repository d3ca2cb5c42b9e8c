"""The cells of test_freezing_engines.py: what runs in each process, and the slow way that it is compared with."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cpift_kernels import pack_mask
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cpift.method.freezing import ElementFreezer, count_moved_everywhere, snapshot
from cpift.training.optimizers import muon

STEPS, BATCH, LENGTH, VOCABULARY, WIDTH = 4, 8, 5, 23, 6
Make = Callable[[Any], torch.optim.Optimizer]


def _adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1)


def _adamw_8bit(parameters: Any) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=1
    )
    return optimizer


def _muon(parameters: Any) -> torch.optim.Optimizer:
    """Of matrices and of all else, as of a model whose embeddings nobody names."""
    return muon(nn.Module(), [{"params": list(parameters), "lr": 1e-2, "weight_decay": 0.1}])


OPTIMIZERS: dict[str, Make] = {
    "adamw plain": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": _adafactor,
    "adamw 8-bit": _adamw_8bit,
    "torch adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "muon": _muon,
}
# None knows DTensors: factored and quantised moments are made as plain tensors, or changed as no share can be.
NOT_SHARDED = {"adafactor", "torch adafactor", "adamw 8-bit"}
ENGINES = ("single", "ddp", "ddp bucket view", "fsdp2")


@dataclass(frozen=True)
class Option:
    accumulate: int = 1
    clip: float | None = None
    autocast: bool = False
    recompute: bool = False
    tied: bool = False
    resume: bool = False
    narrow: bool = False  # gathered and computed with as bf16


OPTIONS = {
    "plain": Option(),
    "accumulation": Option(accumulate=2),
    "clipping": Option(clip=0.05),
    "autocast": Option(autocast=True, clip=0.05),
    "recompute": Option(recompute=True),
    "tied": Option(tied=True, clip=0.05),
    "resume": Option(resume=True),
    "narrow": Option(narrow=True, accumulate=2, clip=0.05, resume=True),
    "all": Option(accumulate=2, clip=0.05, autocast=True, recompute=True, tied=True, resume=True),
}
Cell = tuple[str, str, str]


def cells() -> Iterator[Cell]:
    for engine, optimizer, option in itertools.product(ENGINES, OPTIMIZERS, OPTIONS):
        unsharded = engine == "fsdp2" and optimizer in NOT_SHARDED
        # How DDP lays out its buckets matters to gradients alone.
        known = engine == "ddp bucket view" and (option not in ("plain", "all") or optimizer in NOT_SHARDED)
        # AdamW's other implementations and Adafactor differ in the step, not in what happens before it.
        step_only = optimizer in (
            "adamw plain",
            "adamw fused",
            "adafactor",
            "muon",
            "torch adafactor",
        ) and option not in ("clipping", "all")
        gathers = option != "narrow" or engine == "fsdp2"
        if gathers and not unsharded and not known and not step_only:
            yield engine, optimizer, option


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more: torch.Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + more


class Network(nn.Module):
    """A language model in miniature; no size divides evenly among workers."""

    def __init__(self, option: Option):
        super().__init__()
        self.recompute = option.recompute
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        if option.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = self.head(x * self.scale)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def network(option: Option) -> Network:
    torch.manual_seed(0)
    return Network(option)


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Bool by name: 30 % of each parameter, all of one and none of another."""
    torch.manual_seed(1)
    share = {"blocks.0.down.weight": 1.0, "blocks.1.up.weight": 0.0}
    return {name: torch.rand(p.shape) < share.get(name, 0.3) for name, p in model.named_parameters()}


def batches(option: Option, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator) for _ in range(option.accumulate)]


def forward_backward(model: nn.Module, option: Option, ids: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=option.autocast):
        narrow = option.narrow and not isinstance(model, FSDPModule)  # which does it itself
        copies = {name: value.bfloat16() for name, value in model.named_parameters()} if narrow else {}
        loss = torch.func.functional_call(model, copies, (ids,)) if narrow else model(ids)
    (loss / option.accumulate).backward()


def slow_way(option: Option, make: Make) -> dict[str, torch.Tensor]:
    """One process: mask gradients and put values back by boolean indexing, step the optimizer in between."""
    model = network(option)
    masks = masks_of(model)
    start = copy.deepcopy(dict(model.named_parameters()))
    optimizer = make(model.parameters())
    for step in range(STEPS):
        for ids in batches(option, step):
            forward_backward(model, option, ids)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad[masks[name]] = 0
        if option.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), option.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter[masks[name]] = start[name][masks[name]]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Run:
    """One training under an engine with the freezer attached."""

    def __init__(self, engine: str, option: Option, make: Make):
        self.engine, self.option = engine, option
        self.model = network(option)
        self.masks = {name: pack_mask(mask) for name, mask in masks_of(self.model).items()}
        if engine == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            policy = narrow if option.narrow else MixedPrecisionPolicy()
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(self.model, mesh=mesh, mp_policy=policy)
        view = engine == "ddp bucket view"
        ddp = engine.startswith("ddp")
        self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=view) if ddp else self.model
        self.optimizer = make(self.model.parameters())

    def train(self, first: int, last: int) -> None:
        with ElementFreezer(self.model, self.masks) as freezer:
            freezer.attach(self.optimizer)
            for step in range(first, last):
                for ids in batches(self.option, step):
                    forward_backward(self.wrapped, self.option, self._mine(ids))
                if self.option.clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.option.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def _mine(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.engine == "single" else ids.chunk(dist.get_world_size())[dist.get_rank()]

    def save(self, folder: Path) -> None:
        if self.engine == "fsdp2":
            model, optimizer = get_state_dict(self.model, self.optimizer)
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        else:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / f"{dist.get_rank()}.pt")

    def load(self, folder: Path) -> None:
        if self.engine == "fsdp2":
            model, optimizer = get_state_dict(self.model, self.optimizer)
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        else:
            state = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=False)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def values(self) -> dict[str, torch.Tensor]:
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in parameters.items()
        }


def measure(cell: Cell, folder: Path) -> dict[str, float]:
    """moved: frozen elements that changed by any bit; worst: the largest difference from the slow way."""
    engine, option, make = cell[0], OPTIONS[cell[2]], OPTIMIZERS[cell[1]]
    run = Run(engine, option, make)
    before = snapshot(run.model, run.masks)
    if option.resume:
        run.train(0, STEPS // 2)
        run.save(folder)
        run = Run(engine, option, make)
        run.load(folder)
        run.train(STEPS // 2, STEPS)
    else:
        run.train(0, STEPS)
    moved = count_moved_everywhere(run.model, before, snapshot(run.model, run.masks))
    wanted, start = slow_way(option, make), dict(network(option).named_parameters())
    values = run.values()
    worst = max(float((values[name] - wanted[name]).abs().max()) for name in wanted)
    trained = sum(int((values[name] != start[name]).sum()) for name in wanted)
    return {"moved": moved, "worst": worst, "trained": trained}


def work(rank: int, world: int, folder: str, chosen: list[Cell]) -> None:
    """Run all cells in this process; rank 0 writes what each gave, or its error, to results.json."""
    torch.set_num_threads(1)
    out = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for number, cell in enumerate(chosen):
        try:
            results["/".join(cell)] = measure(cell, out / f"cell-{number}")
        except Exception as error:  # the other cells still run; the test of this one shows it
            results["/".join(cell)] = {"error": f"{type(error).__name__}: {error}"}
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":  # python -m tests.helpers.freezing_cells FOLDER: the table, without pytest
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work, (2, sys.argv[1], list(cells())), nprocs=2)
    for name, found in json.loads((Path(sys.argv[1]) / "results.json").read_text()).items():
        print(name, found)

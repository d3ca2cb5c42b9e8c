"""The workers that train together, and which rows of a sharded tensor each has."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def workers_here() -> int:
    """How many workers train together: the size of the process group, 1 without one."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if group else 1


def rank_here() -> int:
    """This worker's number among those that train together."""
    return torch.distributed.get_rank() if workers_here() > 1 else 0


def in_step() -> None:
    """Wait until all workers of the fine-tune are here."""
    if workers_here() > 1:
        torch.distributed.barrier()


def rows_of(rows: int, worker: int, workers: int) -> range:
    """Which of so many rows FSDP2 gives a worker: all as many, rounded up, and the last ones what is left."""
    each = -(-rows // workers)
    return range(min(worker * each, rows), min((worker + 1) * each, rows))


def own_rows(tensor: DTensor) -> range:
    """The rows of a tensor that FSDP2 shards which this worker holds, as its local tensor has them."""
    mesh = tensor.device_mesh
    rows = rows_of(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    assert (mesh.ndim, [place.is_shard(0) for place in tensor.placements], len(tensor.to_local())) == (
        1,
        [True],
        len(rows),
    )
    return rows


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a parameter on this worker, if it is sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

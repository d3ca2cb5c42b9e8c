"""Products of a given rank: of a matrix, and of a product of factors that is never multiplied out.

The closest matrix of rank r to U·S·Vᵀ is the one of its r largest singular values (Eckart and Young, 1936). Factors are
U·√S and √S·Vᵀ, so that both are of one size. Large matrices are decomposed by random projection with power iterations
(Halko, Martinsson and Tropp, 2011), as `torch.svd_lowrank` does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WHOLE_UP_TO = 1024  # rows or columns of a matrix that is decomposed exactly
_MORE, _ROUNDS = 16, 6  # of the random projection: columns beside the rank, and power iterations
_SEED = 0


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [rows, rank] and right [rank, columns], whose product is the closest to `change` [rows, columns], float32.

    Columns beyond a matrix's own rank are zero. The same for the same matrix on the same machine.
    """
    import torch

    rows, columns = change.shape
    most = min(rows, columns)
    if most <= max(_WHOLE_UP_TO, 2 * (rank + _MORE)):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            u, s, v = torch.svd_lowrank(change, rank + _MORE, niter=_ROUNDS)
    return _balanced(u, s, v, rank, (rows, columns))


def shortened(
    left: torch.Tensor, right: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The closest product of `rank` to left [rows, K] · right [K, columns], float32, by the factors alone; and the
    Frobenius norms of the product and of what is lost. In float64: QR of both factors, SVD of the [K, K] between."""
    import torch

    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(one.double()) for one in (left, right.T))
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    shape = (left.shape[0], right.shape[1])
    made = _balanced(q_left @ u, s, q_right @ v.T, rank, shape)
    return *made, (float(s.norm()), float(s[rank:].norm()))


def _balanced(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the `rank` first of singular values [M] and vectors u [rows, M], v [columns, M], in float32."""
    import torch

    count = min(rank, len(s))
    root = s[:count].sqrt()
    left, right = torch.zeros(shape[0], rank), torch.zeros(rank, shape[1])
    left[:, :count] = u[:, :count] * root
    right[:count] = root[:, None] * v[:, :count].T
    return left, right

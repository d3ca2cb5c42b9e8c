"""Where the k-th largest |Δ| lies: cut points from a stratified sample, so that one pass can settle a region.

Everything here is ordered like the selection: magnitude descending, then linear index ascending. A cut point is
(key bits, linear index), the key being the bits of |Δ| in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 1 << 20
SPREADS = (6.0, 48.0, math.inf)  # half widths to try, in standard deviations of a sample rank
NOTHING = (0x7FFFFFFF, 0)  # no element lies before this cut
EVERYTHING = (0, 0)  # every element that moved lies before this one


@dataclass(frozen=True)
class Bracket:
    """Cut points of one region: (key bits, linear index) with everything before `upper` certainly selected."""

    upper: tuple[int, int]
    lower: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """|Δ| at sampled positions as key bits, in selection order; total: elements it stands for."""

    keys: Tensor
    indices: Tensor
    total: int

    def bracket(self, count: int, spread: float) -> Bracket:
        """Cut points around rank `count`, `spread` standard deviations of the sampled rank to either side.

        The upper cut stays clear of the smallest moved elements, so that even a region of all that moved ends among
        its candidates and its threshold is known.
        """
        if count == 0 or self.total == 0:
            return Bracket(NOTHING, NOTHING)
        drawn, moved = self.keys.numel(), int((self.keys > 0).sum())
        share = count / self.total
        rank, margin = share * drawn, spread * (1 + math.sqrt(drawn * share * (1 - share)))
        above = min(rank - margin, moved - 1 - spread * (1 + math.sqrt(moved)))
        below = rank + margin
        upper, lower = NOTHING, EVERYTHING
        if above >= 0:
            upper = (int(self.keys[int(above)]), int(self.indices[int(above)]))
        if below < moved:
            lower = (int(self.keys[int(below)]), int(self.indices[int(below)]) + 1)
        return Bracket(upper, lower)


def cut_tables(brackets: Sequence[Sequence[Bracket]]) -> tuple[Tensor, Tensor]:
    """int32 and int64 [N * K, 2] on the host: key bits and linear indices of upper and lower cuts."""
    cuts = [(cut.upper, cut.lower) for row in brackets for cut in row]
    keys, edges = ([[side[at] for side in cut] for cut in cuts] for at in (0, 1))
    return torch.tensor(keys, dtype=torch.int32), torch.tensor(edges, dtype=torch.int64)


def draw_samples(pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], attempt: int) -> list[Sample]:
    """One stratified sample per model, at the same positions, which depend on nothing but the sizes and `attempt`."""
    sizes = torch.tensor([tensor.numel() for tensor in pretrained])
    total = int(sizes.sum())
    drawn = min(total, SAMPLE)
    stratum = torch.arange(drawn + 1) * total // max(drawn, 1)
    jitter = (torch.arange(drawn) + 1) * (2654435761 + 2 * attempt) % (1 << 32)
    positions = stratum[:-1] + ((stratum[1:] - stratum[:-1]) * jitter >> 32)
    ends = sizes.cumsum(0)
    parts = positions.tensor_split(torch.searchsorted(positions, ends)[:-1]) if len(sizes) else []
    keys: list[list[Tensor]] = [[] for _ in tuned]
    for t, (part, end) in enumerate(zip(parts, ends.tolist(), strict=True)):
        local = (part - (end - pretrained[t].numel())).to(pretrained[t].device)
        origin = pretrained[t].view(-1)[local].float()
        for i, model in enumerate(tuned):
            keys[i].append((model[t].view(-1)[local].float() - origin).abs().view(torch.int32))
    samples = []
    for parts_of_task in keys:
        joined = torch.cat(parts_of_task) if parts_of_task else torch.zeros(0, dtype=torch.int32)
        ordered, order = joined.sort(descending=True, stable=True)
        samples.append(Sample(ordered, positions.to(order.device)[order], total))
    return samples

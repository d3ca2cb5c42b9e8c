"""Task groups: Jaccard overlap of core regions → connected components → stage order (docs/method.md, stage 3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cpift.config.run import GroupsConfig
from cpift.errors import entry


@dataclass(frozen=True)
class Grouping:
    """The groups in stage order, and what led to them."""

    tasks: tuple[str, ...]
    jaccard: np.ndarray  # (N, N) float64, in the order of `tasks`
    chance: float  # expected Jaccard of two random regions
    tau: float  # the absolute threshold that was applied
    groups: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]


def jaccard_matrix(overlaps: np.ndarray) -> np.ndarray:
    """S(i,j) = |Ci∩Cj| / |Ci∪Cj| from the (N, N) int64 intersections; two empty regions have S = 0, S(i,i) = 1."""
    sizes = np.diag(overlaps).astype(np.float64)
    unions = sizes[:, None] + sizes[None, :] - overlaps
    jaccard: np.ndarray = np.divide(overlaps, unions, out=np.zeros_like(unions), where=unions > 0)
    np.fill_diagonal(jaccard, 1.0)
    return jaccard


def chance_level(p: float) -> float:
    """Jaccard of two independent random regions of core fraction p: p² / (2p − p²) = p / (2 − p)."""
    return p / (2 - p)


def connected_components(adjacent: np.ndarray) -> list[list[int]]:
    """Components of an undirected graph (N, N) bool; members ascending, components by their first member."""
    unseen = set(range(len(adjacent)))
    components = []
    while unseen:
        frontier, members = [min(unseen)], set()
        while frontier:
            node = frontier.pop()
            if node not in members:
                members.add(node)
                frontier.extend(np.flatnonzero(adjacent[node]).tolist())
        unseen -= members
        components.append(sorted(members))
    return components


def group_tasks(tasks: Sequence[str], overlaps: np.ndarray, p: float, config: GroupsConfig, seed: int) -> Grouping:
    """Group and order N tasks from their regions' intersections (N, N) int64."""
    jaccard = jaccard_matrix(overlaps)
    chance = chance_level(p)
    tau = config.tau if config.tau is not None else (config.tau_chance or 0.0) * chance
    components = connected_components(jaccard >= tau)
    ordered = _ordered(components, jaccard, config.order, seed)
    groups = tuple(tuple(tasks[i] for i in members) for members in ordered)
    warnings = (*_unmoved(tasks, overlaps), *_warnings(components, len(tasks), tau, chance))
    return Grouping(tuple(tasks), jaccard, chance, tau, groups, warnings)


def _unmoved(tasks: Sequence[str], overlaps: np.ndarray) -> list[str]:
    empty = [task for task, count in zip(tasks, overlaps.diagonal(), strict=True) if not count]
    what = "no element differs from θ0 by regions.measure, so its core is empty: is it θ0 itself?"
    return [f"{task}: {what}" for task in empty]


def _ordered(components: list[list[int]], jaccard: np.ndarray, order: str, seed: int) -> list[list[int]]:
    return entry(ORDERS, order, "groups.order")(components, jaccard, seed)


def _as_given(components: list[list[int]], jaccard: np.ndarray, seed: int) -> list[list[int]]:
    return components


def _shuffled(components: list[list[int]], jaccard: np.ndarray, seed: int) -> list[list[int]]:
    return random.Random(seed).sample(components, len(components))


def _by_similarity(components: list[list[int]], jaccard: np.ndarray, seed: int) -> list[list[int]]:
    """Start with a random group; then always the group with the highest mean overlap with the last one."""
    shuffled = _shuffled(components, jaccard, seed)
    ordered, rest = shuffled[:1], shuffled[1:]
    while rest:
        last = ordered[-1]
        nearest = max(rest, key=lambda members: float(jaccard[np.ix_(last, members)].mean()))
        rest.remove(nearest)
        ordered.append(nearest)
    return ordered


Order = Callable[[list[list[int]], np.ndarray, int], list[list[int]]]  # components, jaccard, seed → in stage order
ORDERS: dict[str, Order] = {"given": _as_given, "random": _shuffled, "similarity": _by_similarity}


def _warnings(components: list[list[int]], tasks: int, tau: float, chance: float) -> list[str]:
    texts = []
    if tau <= chance:
        texts.append(f"τ = {tau:.4g} is not above the chance level p/(2−p) = {chance:.4g}: unrelated tasks get grouped")
    if tasks > 1 and len(components) == 1:
        texts.append(
            f"τ = {tau:.4g} merges all {tasks} tasks into one group: integration has one stage and freezes nothing"
        )
    if tasks > 1 and len(components) == tasks:
        texts.append(f"τ = {tau:.4g} isolates every task: no two regions overlap that much")
    return texts

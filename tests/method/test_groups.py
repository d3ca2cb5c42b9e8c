from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpift.config.run import GroupsConfig
from cpift.method.groups import chance_level, connected_components, group_tasks, jaccard_matrix


def overlaps_of(masks: np.ndarray) -> np.ndarray:
    return masks.astype(np.int64) @ masks.T.astype(np.int64)


@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_jaccard_is_intersection_over_union(tasks: int, elements: int, seed: int) -> None:
    masks = np.random.default_rng(seed).random((tasks, elements)) < 0.3
    jaccard = jaccard_matrix(overlaps_of(masks))
    for i in range(tasks):
        for j in range(tasks):
            union = (masks[i] | masks[j]).sum()
            expected = 1.0 if i == j else (masks[i] & masks[j]).sum() / union if union else 0.0
            assert jaccard[i, j] == expected


def test_chance_is_what_random_regions_show() -> None:
    p, generator = 0.05, np.random.default_rng(0)
    masks = generator.random((2, 2_000_000)) < p
    assert jaccard_matrix(overlaps_of(masks))[0, 1] == pytest.approx(chance_level(p), rel=0.02)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_components_partition_the_tasks_and_have_no_edge_between_them(tasks: int, seed: int) -> None:
    upper = np.triu(np.random.default_rng(seed).random((tasks, tasks)) < 0.2, 1)
    adjacent = upper | upper.T
    components = connected_components(adjacent)
    assert sorted(node for members in components for node in members) == list(range(tasks))
    for members in components:
        outside = [node for node in range(tasks) if node not in members]
        assert not adjacent[np.ix_(members, outside)].any()
        reached = {members[0]}
        for _ in members:
            reached |= {int(b) for a in reached for b in np.flatnonzero(adjacent[a])}
        assert set(members) <= reached


OVERLAPS = np.array([[100, 60, 0, 5], [60, 100, 0, 0], [0, 0, 100, 40], [5, 0, 40, 100]])
TASKS = ("a", "b", "c", "d")


def test_tau_cuts_the_graph() -> None:
    grouping = group_tasks(TASKS, OVERLAPS, 0.01, GroupsConfig(tau=0.2, order="given"), seed=0)
    assert grouping.groups == (("a", "b"), ("c", "d"))
    assert grouping.warnings == ()
    chained = group_tasks(TASKS, OVERLAPS, 0.01, GroupsConfig(tau=0.02, order="given"), seed=0)
    assert chained.groups == (TASKS,)
    assert "merges all 4 tasks" in chained.warnings[0]
    apart = group_tasks(TASKS, OVERLAPS, 0.01, GroupsConfig(tau=0.9, order="given"), seed=0)
    assert apart.groups == (("a",), ("b",), ("c",), ("d",))
    assert "isolates every task" in apart.warnings[0]


def test_tau_as_a_multiple_of_chance() -> None:
    grouping = group_tasks(TASKS, OVERLAPS, 0.2, GroupsConfig(tau_chance=1.5), seed=0)
    assert grouping.tau == pytest.approx(1.5 * 0.2 / 1.8)


def test_a_core_without_elements_is_told() -> None:
    overlaps = np.array([[0, 0], [0, 100]])
    found = group_tasks(("same", "other"), overlaps, 0.01, GroupsConfig(tau=0.2), seed=0)
    assert (
        found.warnings[0]
        == "same: no element differs from θ0 by regions.measure, so its core is empty: is it θ0 itself?"
    )


def test_tau_at_or_below_chance_warns() -> None:
    grouping = group_tasks(TASKS, OVERLAPS, 0.3, GroupsConfig(tau=0.1), seed=0)
    assert "not above the chance level" in grouping.warnings[0]


def test_the_random_order_is_seeded() -> None:
    config = GroupsConfig(tau=1.0)
    orders = {group_tasks(TASKS, OVERLAPS, 0.01, config, seed).groups for seed in range(50)}
    assert len(orders) > 5
    assert group_tasks(TASKS, OVERLAPS, 0.01, config, 3).groups == group_tasks(TASKS, OVERLAPS, 0.01, config, 3).groups


def test_the_similarity_order_goes_to_the_nearest_group() -> None:
    for seed in range(10):
        groups = group_tasks(TASKS, OVERLAPS, 0.01, GroupsConfig(tau=1.0, order="similarity"), seed).groups
        order = "".join(group[0] for group in groups)
        assert order in {"abcd", "abdc", "badc", "cdab", "dcab", "dcba"}  # ties at zero overlap


def test_one_task_is_one_group() -> None:
    grouping = group_tasks(("a",), np.array([[5]]), 0.01, GroupsConfig(tau=0.1), 0)
    assert grouping.groups == (("a",),)
    assert grouping.warnings == ()

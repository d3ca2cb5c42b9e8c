"""ΔA at equal ΔB: straight lines between the points of a method, and no value beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from cpift.compare.frontier import between


def test_between_points_is_a_straight_line_in_any_order_and_nothing_beyond() -> None:
    x, y = np.array([[0.0, 3.0], [2.0, 1.0], [1.0, 2.0]]), np.array([[0.0, 30.0], [4.0, 0.0], [1.0, 10.0]])
    assert between(x, y, np.array([1.5, 1.25])) == pytest.approx([2.5, 2.5])
    assert between(x, y, np.array([2.0, 3.0])) == pytest.approx([4.0, 30.0])
    assert np.isnan(between(x, y, np.array([2.1, 0.9]))).all()
    assert between(x[:1], y[:1], np.array([0.0, 3.0])) == pytest.approx([0.0, 30.0])
    assert np.isnan(between(x[:1], y[:1], np.array([0.5, 0.5]))).all()
    same = np.array([[1.0], [1.0]])
    assert between(same, np.array([[3.0], [5.0]]), np.array([1.0])) == pytest.approx([3.0])

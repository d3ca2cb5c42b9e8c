"""Breadcrumbs, then the election of TIES."""

from __future__ import annotations

from cpift.merging.selected.breadcrumbs import outliers, with_outliers
from cpift.merging.selected.ties import Ties


class BreadcrumbsTies(Ties):
    """What Breadcrumbs keeps takes the place of what TIES trims."""

    formula = "θ0 + λ·mean of the updates that Breadcrumbs keeps and that agree in sign"
    source = "arXiv 2312.06795, 2306.01708"
    fields = ("weight", "weights", "density", "densities", "gamma", "trim", "normalize", "scale")
    contender = None
    shares = (with_outliers, outliers)

from __future__ import annotations

import pytest

from cpift.cluster import choice
from cpift.cluster.choice import merging_for
from cpift.cluster.merging import RayMerging
from cpift.config.run import ResourcesConfig


def test_where_a_merge_runs_follows_the_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert merging_for(ResourcesConfig()) is None
    assert isinstance(merging_for(ResourcesConfig(distributed=True)), RayMerging)
    assert isinstance(merging_for(ResourcesConfig(address="127.0.0.1:6379")), RayMerging)
    monkeypatch.setattr(choice, "device_merging", lambda resources: resources.device)
    assert merging_for(ResourcesConfig(device="cuda")) == "cuda"

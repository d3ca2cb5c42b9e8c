from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpift.cluster.storage import RUN, FitStorage
from cpift.config.run import ResourcesConfig
from tests.helpers.fits import spec


@pytest.fixture(params=["", "file://"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> FitStorage:
    resources = ResourcesConfig(storage=f"{request.param}{tmp_path}")
    return FitStorage.of(replace(spec(tmp_path, tmp_path / "out"), resources=resources))


def run_folder(storage: FitStorage) -> Path:
    folder = Path(storage.place.removeprefix("file://")) / RUN
    folder.mkdir(parents=True)
    return folder


def test_each_fine_tune_has_a_place_of_its_own(storage: FitStorage, tmp_path: Path) -> None:
    assert storage.place.endswith(f"{tmp_path}/scratch")
    assert FitStorage.of(spec(tmp_path, tmp_path / "out")).place == str(tmp_path / "out" / "scratch" / "ray")


def test_the_options_of_a_uri_stay_at_its_end(tmp_path: Path) -> None:
    resources = ResourcesConfig(storage="s3://bucket/fits/?endpoint_override=127.0.0.1:9000&scheme=http")
    place = FitStorage.of(replace(spec(tmp_path, tmp_path / "out"), resources=resources)).place
    assert place == "s3://bucket/fits/scratch?endpoint_override=127.0.0.1:9000&scheme=http"


@pytest.mark.parametrize(("text", "kept"), [('{"a": 1}', True), ('{"a": ', False), (None, True)])
def test_only_a_run_with_a_damaged_snapshot_is_forgotten(storage: FitStorage, text: str | None, kept: bool) -> None:
    folder = run_folder(storage)
    if text is not None:
        (folder / "checkpoint_manager_snapshot.json").write_text(text)
    storage.drop_damaged_state()
    assert folder.exists() is kept


def test_dropping_is_safe_when_nothing_is_there(storage: FitStorage) -> None:
    folder = run_folder(storage)
    storage.drop()
    storage.drop()
    assert not folder.parent.exists()

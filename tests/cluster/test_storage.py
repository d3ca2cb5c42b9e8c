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


def test_a_checkpoint_in_a_local_storage_is_not_written_again(tmp_path: Path) -> None:
    storage = FitStorage.of(spec(tmp_path, tmp_path / "out"))
    saved = tmp_path / "stage-0" / "checkpoint-2"
    (saved / "deep").mkdir(parents=True)
    (saved / "deep" / "weights").write_bytes(b"w")
    for _ in range(2):  # the second time over what a crash left
        kept = storage.keep(saved, "checkpoint_1")
        assert kept == Path(storage.place) / RUN / "checkpoint_1"
        assert (kept / "deep" / "weights").samefile(saved / "deep" / "weights")
    assert [path.name for path in kept.parent.iterdir()] == ["checkpoint_1"]

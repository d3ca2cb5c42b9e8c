"""A damaged output folder: told by `plan`, set aside by name and never deleted, made again with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpift.cli.main import main
from cpift.config.loading import load_config
from cpift.disk.files import file_sha256, read_json
from cpift.errors import CpiftError
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.plan import plan
from tests.helpers.merges import config_file

STAGES = ("regions", "group", "fuse")


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `merge.yaml` and the finished run `run`."""
    folder = tmp_path_factory.mktemp("finished")
    Pipeline(load_config(config_file(folder, models)), NoEngine()).fuse()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with all times kept."""
    shutil.copytree(finished / "run", tmp_path / "run", copy_function=shutil.copy2)
    shutil.copy(finished / "merge.yaml", tmp_path)
    return tmp_path / "run"


def pipeline(run: Path) -> Pipeline:
    return Pipeline(load_config(run.with_name("merge.yaml"), [f"output={run}"]), NoEngine())


def states(run: Path) -> dict[str, str]:
    found = plan(StageArtifacts(load_config(run.with_name("merge.yaml"), [f"output={run}"])))
    return {step.stage: step.state for step in found.steps if step.stage in STAGES}


def everything(run: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.lstat().st_mtime_ns, file_sha256(path) if path.is_file() else "") for path in run.rglob("*")
    }


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit, with the file's time as it was."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def holding(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def without_an_output(path: Path) -> None:
    content = json.loads(path.read_text())
    content["outputs"].popitem()
    path.write_text(json.dumps(content))


def of_other_fields(path: Path) -> None:
    path.write_text(json.dumps(read_json(path) | {"fields": {}, "seal": "0" * 64}))


def as_link_to_itself(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path)


def unsealed(**fields: Any) -> Callable[[Path], None]:
    """As earlier versions wrote them, without a seal, and with fields of no form."""
    return lambda path: (
        path.write_text(json.dumps({n: v for n, v in read_json(path).items() if n != "seal"} | fields)) and None
    )


NO_RECORDS: tuple[Any, ...] = (None, [], {}, {"files": None, "remake": ""})
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "empty": holding(""),
    "gone": Path.unlink,
    "a folder": as_folder,
    "a list": holding("[]"),
    "null": holding("null"),
    "an empty object": holding("{}"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff") and None,
    "deep": holding("[" * 100_000),
    "short of an output": without_an_output,
    "of other fields": of_other_fields,
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere"))[1],
    "a link to itself": as_link_to_itself,
    **{f"dropped: {form}": unsealed(dropped=form) for form in NO_RECORDS},
    "files": unsealed(files={"config.json": [1]}),
}
OTHERS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("regions", "regions.json", truncated),
    ("regions", "regions.json", holding("{}")),
    ("regions", "one.safetensors", flipped),
    ("regions", "two.safetensors", truncated),
    ("regions", "one.safetensors", Path.unlink),
    ("group", "groups.json", truncated),
    ("group", "groups.json", holding("[]")),
    ("fuse", "config.json", Path.unlink),
    ("fuse", "tokenizer.json", flipped),
    ("fuse", "model-00001-of-*", flipped),
    ("fuse", "model-00001-of-*", truncated),
    ("fuse", "model-00002-of-*", Path.unlink),
    ("fuse", "model-00002-of-*", as_folder),
    ("fuse", "fusion.json", holding("")),
    ("fuse", "", lambda path: (shutil.rmtree(path), path.touch())[1]),
    ("group", "", lambda path: (shutil.rmtree(path), path.mkdir())[1]),
    ("regions", "", lambda path: (shutil.rmtree(path), path.symlink_to("nowhere"))[1]),
    ("group", "", as_link_to_itself),
    ("fuse", "config.json", as_link_to_itself),
]
DAMAGES = [("fuse", "manifest.json", damage) for damage in MANIFESTS.values()] + OTHERS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [pytest.param(*case, marks=() if n % 4 == 0 else pytest.mark.slow) for n, case in enumerate(DAMAGES)],
)
def test_what_is_damaged_is_set_aside_and_made_again(
    stage: str, name: str, damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (run / stage).iterdir()
    wanted = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
    damage(next(folder.glob(name)) if name else folder)
    before = everything(run)
    assert states(run) == dict.fromkeys(STAGES, "cached") | {stage: "damaged"} | (
        {"fuse": "after group"} if stage == "group" else {}
    )
    assert everything(run) == before, "a plan touches nothing"
    again = pipeline(run)
    again.fuse()
    assert again.worked
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("damaged (") == 1, said
    assert f"set aside as {folder.name}.damaged, made again" in said
    assert os.path.lexists(folder.with_name(f"{folder.name}.damaged")), "nothing is deleted"
    assert {path.name: file_sha256(path) for path in folder.glob("*.safetensors")} == wanted
    assert states(run) == dict.fromkeys(STAGES, "cached")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regions", "fuse", ".work"])
@pytest.mark.parametrize("kind", ["a file", "a dead link", "a link to itself"])
def test_a_stray_file_in_the_place_of_a_folder_is_set_aside(name: str, kind: str, run: Path) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    shutil.rmtree(run / "group")
    if kind == "a file":
        (run / name).write_text("mine")
    else:
        (run / name).symlink_to("nowhere" if kind == "a dead link" else name)
    assert states(run)["regions"] in ("damaged", "cached")
    pipeline(run).fuse()
    assert os.path.lexists(run / f"{name}.damaged")
    assert kind != "a file" or (run / f"{name}.damaged").read_text() == "mine"
    assert states(run) == dict.fromkeys(STAGES, "cached")


def test_what_stands_in_the_way_of_work_is_set_aside(run: Path) -> None:
    (fused,) = (run / "fuse").iterdir()
    shutil.rmtree(fused)
    work = run / ".work" / f"fuse-{fused.name}"
    work.write_text("mine")
    work.with_name(f"{work.name}.lock").unlink(missing_ok=True)
    work.with_name(f"{work.name}.lock").mkdir()
    pipeline(run).fuse()
    assert states(run) == dict.fromkeys(STAGES, "cached")
    assert work.with_name(f"{work.name}.damaged").read_text() == "mine"
    assert work.with_name(f"{work.name}.lock.damaged").is_dir()


def test_a_second_damage_gets_a_name_of_its_own(run: Path) -> None:
    (folder,) = (run / "group").iterdir()
    for number in ("", "-2", "-3"):
        (folder / "manifest.json").write_text("")
        pipeline(run).group()
        assert (folder.parent / f"{folder.name}.damaged{number}").is_dir()


def test_a_copy_with_other_times_and_files_of_earlier_versions_stay_cached(run: Path) -> None:
    for path in run.rglob("*"):
        os.utime(path, ns=(1, 1))
    for path in run.rglob("manifest.json"):
        content = read_json(path)
        path.write_text(json.dumps({name: value for name, value in content.items() if name not in ("files", "seal")}))
    assert states(run) == dict.fromkeys(STAGES, "cached")
    again = pipeline(run)
    again.fuse()
    assert not again.worked


def test_a_copy_is_hashed_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpift.disk.artifact_state.SMALL", 0)  # every file is a large one
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("cpift.disk.artifact_state.file_sha256", sha256)
    copy = run.with_name("copy")
    shutil.copytree(run, copy, copy_function=shutil.copyfile)
    assert states(copy) == dict.fromkeys(STAGES, "cached")
    assert len(hashed) > 10
    again = pipeline(copy)
    again.fuse()
    assert not again.worked
    hashed.clear()
    assert states(copy) == dict.fromkeys(STAGES, "cached")
    assert hashed == []
    (fused,) = (copy / "fuse").iterdir()
    truncated(fused / "config.json")
    assert states(copy)["fuse"] == "damaged"


def checked(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["cpift", "check", str(run)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out + shown.err


def test_check_reads_everything_and_says_what_to_make_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(run)
    code, said = checked(run, capsys, monkeypatch)
    assert (code, everything(run)) == (0, before)
    assert "3 outputs, all as they were written" in said
    flipped(next((run / "fuse").glob("*/model-00002-of-*")))
    (run / "group").rename(run / "away")
    (run / "group").touch()
    code, said = checked(run, capsys, monkeypatch)
    assert code == 1
    assert "model-00002-of" in said
    assert "2 damaged" in said
    for other in (run / "nowhere", run / "away", run / "group"):
        assert checked(other, capsys, monkeypatch)[0] == 2


def test_a_damaged_model_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    (fused,) = (run / "fuse").iterdir()
    flipped(next(fused.glob("model-00001-of-*")))
    path = run.with_name("merge.yaml")
    path.write_text(path.read_text().replace(str(read_given(path)), str(fused)))
    with pytest.raises(CpiftError, match=r"is damaged .*cpift check"):
        Pipeline(load_config(path, [f"output={tmp_path / 'other'}"]), NoEngine()).fuse()


def read_given(path: Path) -> Path:
    given = load_config(path).tasks[0].checkpoint
    assert given is not None
    assert given.path is not None
    return given.path

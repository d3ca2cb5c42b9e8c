"""The Python functions and `cpift merge`: lazy, quiet, right against plain torch; nothing of the user's is lost."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from typer.main import get_command

import cpift
from cpift import merge_folder
from cpift.cli.main import app, main
from cpift.config.inputs import ScratchModel
from cpift.config.run import FusionConfig, GroupsConfig, ModelConfig, RegionsConfig, RunConfig
from cpift.console import ending
from cpift.merging.options import OPTIONS, MergeFields, MethodFields, RegionFields
from cpift.merging.state_dicts import KEYWORDS
from cpift.models.sources import materialise

NAMES = {"maths": "ft-maths", "code": "ft-code"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, `base`, and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("api")
    materialise(
        ModelConfig(scratch=ScratchModel(hidden_size=32, intermediate_size=64), dtype="bfloat16"), root / "base"
    )
    tensors = load_file(root / "base" / "model.safetensors")
    for seed, name in enumerate(NAMES.values()):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(root / "base", root / name)
        moved = {
            n: (x.float() + 0.02 * torch.randn(x.shape, generator=generator)).bfloat16() for n, x in tensors.items()
        }
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models in it."""
    for name in ("base", *NAMES.values()):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    loaded = {name: load_file(folder / name / "model.safetensors") for name in ("base", *NAMES.values())}
    return loaded["base"], {task: loaded[name] for task, name in NAMES.items()}


# ---- the surface -----------------------------------------------------------------------------------------------------


def test_the_import_is_lazy_and_names_are_public() -> None:
    heavy = ["torch", "transformers", "ray", "pydantic", "rich", "typer", "numpy", "importlib.metadata"]
    code = f"import sys, cpift; print([one for one in {heavy} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=_env())
    assert done.stdout.strip() == "[]"
    package = Path(cpift.__file__).parent
    for name in cpift.__all__:
        assert getattr(cpift, name) is not None
        assert not (package / f"{name}.py").exists(), "the module would take the function's place"
    assert set(cpift.__all__) <= set(dir(cpift))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cpift.nothing  # type: ignore[attr-defined]


def _env() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(cpift.__file__).parents[1] / at) for at in (".", "kernels"))
    }


def _annotation(field: str) -> Any:
    model: Any = RunConfig
    *parents, last = field.split(".")
    for part in parents:
        kinds = (model.model_fields[part].annotation, *get_args(model.model_fields[part].annotation))
        model = next(one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel))
    return model.model_fields[last].annotation


def test_every_field_of_a_merge_is_a_keyword_and_an_option_of_the_same_type() -> None:
    by_field = {option.field: name for name, option in OPTIONS.items()}
    for section, model in (("fusion", FusionConfig), ("regions", RegionsConfig), ("groups", GroupsConfig)):
        assert {f"{section}.{name}" for name in model.model_fields} <= set(by_field)
    hints = get_type_hints(MergeFields)
    assert set(hints) == set(OPTIONS)
    assert set(get_type_hints(RegionFields)) <= set(OPTIONS)
    assert set(get_type_hints(MethodFields)) == KEYWORDS
    for name, option in OPTIONS.items():
        wanted = _annotation(option.field)
        if get_origin(wanted) is Literal:
            assert hints[name] == wanted, name
        assert (option.kind == "switch") == (wanted is bool), name


def test_signal_handlers_are_given_back_to_a_program_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_pipe", [])
    before = signal.getsignal(signal.SIGTERM)
    with ending.handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- core regions ----------------------------------------------------------------------------------------------------


def test_cores_are_the_largest_updates_and_survive_the_disk(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cores = cpift.regions("base", NAMES, p=0.02)
    base, tuned = states(here)
    flat = {
        t: torch.cat([(x[n].float() - base[n].float()).abs().flatten() for n in sorted(base)]) for t, x in tuned.items()
    }
    masks = {}
    for task, core in cores.items():
        k = int(0.02 * len(flat[task]))
        chosen = torch.zeros(len(flat[task]), dtype=torch.bool)
        chosen[torch.sort(flat[task], descending=True, stable=True).indices[:k]] = True
        masks[task] = torch.cat([core[name].flatten() for name in sorted(core)])
        assert torch.equal(masks[task], chosen)
        assert core.count == k
        assert all(core[name].shape == base[name].shape for name in core)
    both = int((masks["maths"] & masks["code"]).sum())
    assert cores.overlaps[0, 1] == both
    assert cores.jaccard[0, 1] == pytest.approx(both / (2 * k - both))
    assert cores.chance == pytest.approx(0.02 / 1.98)
    assert cores.groups(tau=0.9).groups == (("maths",), ("code",))
    assert cores.groups(tau_chance=0.1).groups == (("maths", "code"),)
    with pytest.raises(cpift.ConfigError, match="tau"):
        cores.groups(tau=3)
    kept = cpift.Cores.load(cores.save(here / "cores"))
    streamed = cpift.regions("base", NAMES, p=0.02, out="streamed")
    for other in (kept, streamed):
        assert repr(other) == repr(cores)
        assert all(torch.equal(other[task][name], cores[task][name]) for task in cores for name in cores[task])
    for make in (lambda: cores.save("cores"), lambda: cpift.regions("base", NAMES, out="cores")):
        with pytest.raises(cpift.ConfigError, match="exists already"):
            make()
    with pytest.raises(cpift.CpiftError, match=r"no cores\.json"):
        cpift.Cores.load("base")
    assert capfd.readouterr() == ("", "")


def test_a_merge_takes_cores_that_were_selected_before(here: Path, models: Path) -> None:
    cores = cpift.regions("base", {**NAMES, "third": "ft-code"}, p=0.05, scope="tensor")
    with_cores = cpift.merge("base", NAMES, "one", cores=cores, verify=False)
    without = cpift.merge("base", NAMES, "two", p=0.05, scope="tensor", verify=False)
    assert (with_cores.path / "model.safetensors").read_bytes() == (without.path / "model.safetensors").read_bytes()
    for wrong, words in (({"p": 0.1}, "selected with 0.05"), ({"method": "ties"}, "not used by method ties")):
        with pytest.raises(cpift.ConfigError, match=words):
            cpift.merge("base", NAMES, "three", cores=cores, **wrong)  # type: ignore[arg-type]
    shutil.copytree(models / "ft-code", here / "another")
    for tunes, words in (({"maths": "another"}, "other files"), ({"new": "ft-code"}, "new: is not there")):
        with pytest.raises(cpift.CheckpointError, match=words):
            cpift.merge("base", tunes, "three", cores=cores)
    assert not list(here.glob("*three*"))


def test_one_model_under_two_names_is_refused(here: Path) -> None:
    (here / "again").symlink_to("ft-code")
    with pytest.raises(cpift.ConfigError, match=r"again\.checkpoint: is the same model as code .* each model once"):
        cpift.merge("base", {**NAMES, "again": "again"}, "out")
    assert not list(here.glob("*out*"))


# ---- in memory -------------------------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {"p": 0.05},
    {"p": 0.05, "conflict": "last", "tau": 0.0, "order": "random", "seed": 3},
    {"granularity": "model", "space": "delta", "transplant": False},
    {"granularity": "row", "omega": 0.3, "exclude": ["*embed*"], "conflict": "agree"},
    {"method": "ties", "density": 0.3, "trim": "global"},
    {"method": "dare", "seed": 3, "weights": {"maths": 0.5}},
    {"method": "slerp", "t": 0.2},
    {"method": "task_arithmetic", "weight": 0.4},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_merge_in_memory_has_the_bytes_of_one_on_disk(here: Path, fields: dict[str, Any]) -> None:
    made = cpift.merge("base", NAMES, "merged", verify=False, **fields)
    base, tuned = states(here)
    want, found = load_file(made.path / "model.safetensors"), cpift.merge_state_dicts(base, tuned, **fields)
    assert list(found) == list(base)
    assert all(torch.equal(found[name], want[name]) and found[name].dtype == want[name].dtype for name in want)


def test_tied_tensors_of_state_dicts_stay_one(here: Path) -> None:
    base, tuned = states(here)
    tied = base | {"lm_head.weight": base["model.embed_tokens.weight"]}
    found = cpift.merge_state_dicts(tied, tuned, method="linear")
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    apart = {task: x | {"lm_head.weight": x["model.embed_tokens.weight"] + 1} for task, x in tuned.items()}
    found = cpift.merge_state_dicts(tied, apart, method="linear")
    mean = sum(x["lm_head.weight"].double() for x in apart.values()) / 2
    assert torch.equal(found["lm_head.weight"], mean.bfloat16())


WRONG_STATES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("shape", lambda x: x | {"model.norm.weight": torch.zeros(3)}, "has shape"),
    ("missing", lambda x: {name: one for name, one in x.items() if "norm" not in name}, "lacks"),
    ("lora", lambda x: x | {"q.lora_A.weight": torch.zeros(3)}, "LoRA"),
    ("float64", lambda x: {name: one.double() for name, one in x.items()}, "float64"),
    ("nan", lambda x: {name: one * float("nan") for name, one in x.items()}, "NaN"),
    ("meta", lambda x: {name: one.to("meta") for name, one in x.items()}, "meta"),
    ("numpy", lambda x: {name: one.float().numpy() for name, one in x.items()}, "ndarray"),
]


@pytest.mark.parametrize(
    ("broken", "words"), [case[1:] for case in WRONG_STATES], ids=[case[0] for case in WRONG_STATES]
)
def test_state_dicts_that_do_not_fit_are_named(here: Path, broken: Callable[[Any], Any], words: str) -> None:
    base, tuned = states(here)
    with pytest.raises(cpift.CheckpointError, match=words):
        cpift.merge_state_dicts(base, tuned | {"code": broken(tuned["code"])}, p=0.1)
    with pytest.raises(cpift.ConfigError, match="memory_budget"):
        cpift.merge_state_dicts(base, tuned, memory_budget=3)  # type: ignore[call-arg]


# ---- a folder at a path ----------------------------------------------------------------------------------------------


def test_a_merge_is_made_once_and_replaces_nothing(here: Path) -> None:
    made = cpift.merge("base", NAMES, "deep/er/merged", method="linear")
    assert all(check["passed"] is not False for check in made.checks)
    names = {path.name for path in made.path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert [path.name for path in made.path.parent.iterdir()] == ["merged"]
    card = (made.path / "README.md").read_text()
    assert "# merged (fused)" in card
    assert "merged by linear" in card
    assert "| 1 | maths |" in card
    assert cpift.merge("base", NAMES, "deep/er/merged", method="linear").cached
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    assert cpift.merge("base", NAMES, "link", method="linear", verify=False).path == here / "empty"
    (here / "file").touch()
    (here / "own").mkdir()
    (here / "own" / "notes.txt").touch()
    (here / ".taken.merge").mkdir()
    (here / ".taken.merge" / "notes.txt").touch()
    before = sorted(here.rglob("*"))
    for out, words in {
        "file": "is a file",
        "own": "no merge made",
        "taken": "no merge's work",
        "deep/er/merged": "holds another merge",
        "/": "mount point",
    }.items():
        with pytest.raises(cpift.ConfigError, match=words):
            cpift.merge("base", NAMES, out, method="ties")
    assert sorted(here.rglob("*")) == before
    with (made.path / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(cpift.ConfigError, match="was changed since"):
        cpift.merge("base", NAMES, "deep/er/merged", method="linear")


def test_a_killed_merge_goes_on_and_leaves_nothing_half_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = merge_folder.Pipeline.fuse

    def killed(pipeline: Any) -> Any:
        calls.append(real(pipeline))
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_folder.Pipeline, "fuse", killed)
    with pytest.raises(KeyboardInterrupt):
        cpift.merge("base", NAMES, "merged", method="linear", verify=False)
    assert not (here / "merged").exists()
    inode = (calls[0].path / "model.safetensors").stat().st_ino
    monkeypatch.setattr(merge_folder.Pipeline, "fuse", real)
    made = cpift.merge("base", NAMES, "merged", method="linear", verify=False)
    assert (made.path / "model.safetensors").stat().st_ino == inode
    assert not (here / ".merged.merge").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cpift", "merge", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_takes_every_field(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["base", "maths=ft-maths", "ft-code", "--method", "ties", "--density=0.3", "--weights", "ft-code=0.5"]
    told += ["--shard-size", "20kB", "--no-verify", "--set", "resources.threads_per_worker=1", "--out", "merged"]
    before = sorted(here.iterdir())
    assert command(monkeypatch, *told, "--dry-run") == 0
    assert sorted(here.iterdir()) == before
    assert "ties: weight 1, ft-code 0.5, density 0.3" in capsys.readouterr().out
    assert command(monkeypatch, *told) == 0
    assert "Merged model" in capsys.readouterr().out
    assert len(list((here / "merged").glob("*.safetensors"))) > 1
    assert command(monkeypatch, *told) == 0
    assert "nothing to do" in capsys.readouterr().out
    options = {option for one in get_command(app).commands["merge"].params for option in one.opts}  # type: ignore[attr-defined]
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= options


WRONG = [
    (["nowhere/x", "ft-code"], "hub: no answer for model 'nowhere/x'"),
    (["base", "./ft-none"], "ft-none: './ft-none' is no model folder"),
    (["base", "a=ft-code", "a=ft-maths"], "is the name of two models"),
    (["base", "ft-code", "--method", "ties", "--density", "3"], "a fraction: 3 % is 0.03"),
    (["base", "ft-code", "--weights", "ft-code"], "has no '='"),
    (["base", "ft-code", "--method", "ties", "--p", "0.1"], "p: is not used by ties"),
    (["base", "ft-code", "--method", "linear", "--weights", "other=1"], "'other' is no task"),
    (["base", "ft-code", "--set", "fusion.tt=1"], "did you mean 't'"),
    (["base", "ft-code", "--backbone", "staged"], "has to be trained"),
    (["base", "base/config.json"], "is a file"),
    (
        ["base", "a=ft-code", "--method", "linear", "--weights", "a=1", "--weights", "a=2"],
        "--weights: a is given twice",
    ),
    (["base", "a=ft-code", "--method", "fisher", "--moments", "a=v #2"], "v #2"),
    (["base", "a=ft-code", "--moments", "a=v", "--set", "regions.measure=curvature"], "tasks.0.moments: there is"),
    (["base", "a=ft-code", "--moments", "a=v", "--set", "fusion.method=fisher"], "tasks.0.moments: there is no"),
    (["base", "a=ft-code", "--moments", "a=v", "--set", "fusion.method=ties"], "are read by nothing"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_named_and_nothing_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = sorted(here.iterdir())
    assert command(monkeypatch, *arguments, "--out", "merged") == 2
    assert words in capsys.readouterr().err
    assert sorted(here.iterdir()) == before
    with pytest.raises(cpift.ConfigError, match="did you mean 'density'"):
        cpift.merge("base", NAMES, "merged", densty=0.1)  # type: ignore[call-arg]


NO_INPUTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: cpift.merge("base", ["ft-code"], "out"), "models: is a list, not a mapping"),  # type: ignore[arg-type]
    (lambda: cpift.merge("base", {"a": 3}, "out"), "a: is a int, not a path"),  # type: ignore[dict-item]
    (lambda: cpift.regions("base", {}), "at least 1 element"),
    (lambda: cpift.merge("base", NAMES, "out", cores={"a": 1}), "cores: is a dict"),  # type: ignore[arg-type]
    (lambda: cpift.merge("base", NAMES, "out", settings={"output": "x"}), "output: is decided by"),
    (lambda: cpift.merge("base", NAMES, "out", settings={"tasks.0.name": "x"}), r"tasks\.0\.name: is decided by"),
    (lambda: cpift.run(3), "config: is a int, not a path"),  # type: ignore[arg-type]
    (lambda: cpift.plan("nowhere.yaml"), "No such file"),
    (lambda: cpift.load_config("base"), "is a folder"),
]


@pytest.mark.parametrize(("call", "words"), NO_INPUTS, ids=[words for _, words in NO_INPUTS])
def test_what_is_no_input_is_said_to_be_none(here: Path, call: Callable[[], Any], words: str) -> None:
    with pytest.raises(cpift.ConfigError, match=words):
        call()
    assert not list(here.glob("*out*"))


def test_signatures_say_every_argument() -> None:
    for name in ("regions", "merge", "merge_state_dicts", "run", "plan", "load_config"):
        function = getattr(cpift, name)
        assert function.__doc__
        assert all(
            one.annotation is not inspect.Parameter.empty for one in inspect.signature(function).parameters.values()
        )

"""No code that comes with a model, a package or rows is run, whatever the command; and one module loads them all."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from cpift.cli.main import main
from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource, ModelConfig
from cpift.data.tasks import read_examples
from cpift.errors import CheckpointError, CpiftError, DataError
from cpift.models.sources import materialise
from cpift.pretrained import loading as pretrained
from cpift.pretrained.gguf import package_folder
from tests.helpers.sources import sources

SIZE = ScratchModel(hidden_size=16, intermediate_size=16, layers=1, heads=2, max_length=64, seed=1)
LOADERS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "simple_evaluate", "for_model"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLED = {
    "cpift/pretrained/sharded_state.py": {
        "pickle"
    },  # torch's index of a sharded checkpoint, by one closed list of classes
    "cpift/cluster/work.py": {"cloudpickle"},  # a run's own work on its way through Ray, which pickles everything
    "cpift/data/token_workers.py": {"pickle"},  # between this process and those that it began, over pipes
}


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(one.value) for one in call.keywords if one.arg == name), None)


def faults(path: Path, tree: ast.Module) -> Iterator[str]:
    here = path == Path("cpift/pretrained/loading.py")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            allowed = PICKLED.get(path.as_posix(), set())
            yield from (f"{path}:{node.lineno} imports {name}" for name in names & PICKLES - allowed)
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        piped = path == Path("cpift/data/token_workers.py")
        if owner == "pickle" and name in ("load", "loads") and not piped:
            yield f"{path}:{node.lineno} unpickles"
        where = f"{path}:{node.lineno} calls {name}"
        # lm-eval loads what `pretrained.lm_eval_arguments` says.
        if name in LOADERS and not here and path != Path("cpift/evaluation/standard.py"):
            yield where
        if any(one.arg == "trust_remote_code" and ast.unparse(one.value) != "False" for one in node.keywords):
            yield f"{where} and trusts"
        if owner == "torch" and name == "load" and keyword(node, "weights_only") is not True:
            yield f"{where} without weights_only"
        if owner in ("np", "numpy") and name == "load" and keyword(node, "allow_pickle") is not False:
            yield f"{where} without allow_pickle=False"
        if (owner == "yaml" and name in ("load", "load_all", "unsafe_load")) or (
            not owner and name in ("eval", "exec") and path != Path("cpift/extensions.py")  # what a config names
        ):
            yield where


@pytest.mark.slow
def test_one_module_loads_everything_and_no_pickle_is_read() -> None:
    assert [fault for path, tree in sources() for fault in faults(path, tree)] == []


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "model"
    materialise(ModelConfig(scratch=SIZE, path=None, hub=None, gguf=None), out)
    return out


def plant(file: Path, body: str = "") -> None:
    """A Python file whose import leaves `ran` beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"open({str(file.parent / 'ran')!r}, 'w').close()\n{body}", encoding="utf-8")


def set_fields(file: Path, **fields: object) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(found | fields), encoding="utf-8")


CONFIGURATION = """from transformers import PretrainedConfig
class Own(PretrainedConfig):
    model_type = "own"
"""


def own_model(folder: Path) -> None:
    plant(folder / "configuration_own.py", CONFIGURATION)
    plant(folder / "modeling_own.py", "from transformers import LlamaForCausalLM as Own")
    places = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    set_fields(folder / "config.json", model_type="own", auto_map=places)


def own_tokenizer(folder: Path) -> None:
    plant(folder / "tokenization_own.py", "from transformers import PreTrainedTokenizerFast as Own")
    stated = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    set_fields(folder / "tokenizer_config.json", auto_map=stated, tokenizer_class="OwnTokenizer")


def own_tokenizer_in_a_list(folder: Path) -> None:
    plant(folder / "tokenization_own.py", "from transformers import PreTrainedTokenizerFast as Own")
    set_fields(folder / "tokenizer_config.json", auto_map=["tokenization_own.Own", None])


def another_loader(folder: Path) -> None:
    own_model(folder)
    set_fields(folder / "config.json", model_type="llama")
    set_fields(folder / "tokenizer_config.json", tokenizer_class="AutoModelForCausalLM")


def generation(folder: Path) -> None:
    plant(folder / "custom_generate" / "generate.py", "def generate(**rest): return rest['input_ids']")


def processor(folder: Path) -> None:
    plant(folder / "processing_own.py")
    set_fields(folder / "processor_config.json", auto_map={"AutoProcessor": "processing_own.Own"})


PLANTED: dict[Callable[[Path], None], str] = {
    own_model: "config.json: describes a model that is code of its own",
    own_tokenizer: "tokenizer_config.json: names a tokenizer that is code",
    own_tokenizer_in_a_list: "tokenizer_config.json: names a tokenizer that is code",
    another_loader: "tokenizer_class 'AutoModelForCausalLM' is no tokenizer",
    generation: "custom_generate: holds code that generates",
    processor: "processor_config.json: names a processor that is code",
    lambda folder: set_fields(folder / "config.json", model_type="bert-of-mine"): "'bert-of-mine' is no language model",
    lambda folder: set_fields(folder / "config.json", model_type="t5"): "'t5' is no language model",
    lambda folder: set_fields(folder / "config.json", model_type="../llama"): "'../llama' is no language model",
    lambda folder: set_fields(folder / "config.json", model_type=["llama"]): "['llama'] is no language model",
    lambda folder: set_fields(
        folder / "config.json", transformers_weights="b.safetensors"
    ): "transformers_weights: has transformers read other files",
    lambda folder: set_fields(
        folder / "config.json", configuration_files=["config.4.0.0.json"]
    ): "configuration_files: has transformers read other files",
    lambda folder: set_fields(
        folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"]
    ): "fast_tokenizer_files: has transformers read other files",
    lambda folder: set_fields(folder / "config.json", attn_implementation="a/b"): "'a/b' is compiled code from the hub",
    lambda folder: set_fields(
        folder / "config.json", text_config={"_experts_implementation": {"": "a/b@v1"}}
    ): "'a/b@v1' is compiled code from the hub",
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_folders_that_need_code_are_refused_by_name(
    clean: Path, tmp_path: Path, planted: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(clean, tmp_path / "model")
    assert pretrained.code_problems(folder, "model.path") == []
    planted(folder)
    (problem,) = [str(one) for one in pretrained.code_problems(folder, "model.path")]
    assert PLANTED[planted] in problem
    assert problem.startswith("model.path, ")
    assert " → " in problem


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3_moe", "gpt_neox", "gpt-sw3", "bert", "bloom", "mamba2", "whisper", "llava", "vit"]
)
def test_architectures_are_told_as_transformers_tells_them(clean: Path, tmp_path: Path, kind: str) -> None:
    from transformers.models.auto import modeling_auto as tables

    known = tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    folder = shutil.copytree(clean, tmp_path / "model")
    set_fields(folder / "config.json", model_type=kind, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert (pretrained.code_problems(folder, "") == []) == (kind in known)


def run_file(root: Path, model: Path, given: Path) -> Path:
    other = shutil.copytree(given, root / f"{given.name}-again", dirs_exist_ok=True)  # one model twice is refused
    tasks = [
        {"name": name, "checkpoint": {"path": str(path)}, "metric": "choice"}
        | {split: {"procedural": "ending", "size": 4, "split": split} for split in ("train", "test")}
        for name, path in (("one", given), ("two", other))
    ]
    config = {"name": "x", "model": {"path": str(model)}, "tasks": tasks, "output": str(root / "out")}
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "max_length": 32}
    config |= {"backbone": {"source": "pretrained"}, "integration": training, "probe": training}
    (root / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return root / "run.yaml"


def answer(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit code of a command at a terminal where someone answers yes to everything."""
    monkeypatch.setattr(sys, "argv", ["cpift", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.slow
def test_no_command_runs_what_is_planted(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In θ0's folder, and in a given fine-tune's."""
    folder = shutil.copytree(clean, tmp_path / "planted")
    for planted in (own_model, own_tokenizer, generation, processor):
        planted(folder)
    commands = ["plan", "fuse", "probe", "evaluate", "run", "report"]
    for model, given in ((folder, clean), (clean, folder)):
        config = run_file(tmp_path, model, given)
        for command in (*([name] for name in commands), ["data", "preview"]):
            assert answer(monkeypatch, *command, config) == 2, command
            said = capsys.readouterr().err
            assert all(text in said for text in list(PLANTED.values())[:2]), said
    assert answer(monkeypatch, "standard", folder, "--tasks", "gsm8k") == 2
    first = "code of its own" if importlib.util.find_spec("lm_eval") else "needs lm_eval"  # what is missing comes first
    assert first in capsys.readouterr().err
    assert not list(tmp_path.rglob("ran"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("planted", [own_model, own_tokenizer, another_loader, generation])
def test_loaders_refuse_even_what_no_check_saw(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: Callable[[Path], None]
) -> None:
    """The second line: transformers itself is told never to run code, and never to ask."""
    folder = shutil.copytree(clean, tmp_path / "model")
    planted(folder)
    for name in ("code_problems", "tokenizer_problems"):
        monkeypatch.setattr(pretrained, name, lambda folder, where: [])
    answers = io.StringIO("y\n" * 50)
    monkeypatch.setattr(sys, "stdin", answers)
    for load in (pretrained.load_network, pretrained.load_tokenizer, pretrained.empty_network):
        with suppress(ValueError, OSError, CpiftError):
            load(folder)  # type: ignore[operator]
    assert answers.tell() == 0
    assert not list(folder.rglob("ran"))


def test_packages_are_located_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "inner", "inner/deep"):
        plant(tmp_path / "planted_package" / name / "__init__.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("planted_package", "planted_package.inner", "planted_package.inner.deep"):
        assert package_folder(name) == tmp_path.joinpath(*name.split("."))
    for name in (
        "planted_package.none",
        "planted_package.none.x",
        "",
        ".",
        "..x",
        "a b",
        "__main__",
        "sys",
        "json.decoder",
    ):
        assert package_folder(name) is None, name
    assert not list(tmp_path.rglob("ran"))
    assert not [name for name in sys.modules if name.startswith("planted_package")]


@pytest.mark.parametrize(
    "name", ["own_rows", "own_rows/own_rows.py", "org/own_rows", "json", "csv", "../x", "a:b", "/etc"]
)
def test_rows_come_from_the_hub_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that datasets would take for a folder, a script or one of its readers."""
    for folder in (tmp_path / "own_rows", tmp_path / "org" / "own_rows"):
        plant(folder / "own_rows.py")
    monkeypatch.chdir(tmp_path)
    source = DataSource(hub=name, revision="0" * 40, file=None, subset=None, procedural=None, size=None, limit=None)
    with pytest.raises(DataError, match="give an id on the hub"):
        list(read_examples(source))
    assert not list(tmp_path.rglob("ran"))


class Planted:
    """Pickled, it opens a file where it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


def test_pickles_in_a_sharded_checkpoint_run_nothing(tmp_path: Path) -> None:
    """Its index, and the values beside its tensors."""
    import torch
    import torch.distributed.checkpoint as dcp

    from cpift.pretrained.sharded_state import read_state

    mark = tmp_path / "ran"
    state = {"model": {"w": torch.arange(6.0)}, "optimizer": {"lr": 0.5, "betas": (0.9, 0.95), "names": ["w"]}}
    dcp.save(state, checkpoint_id=tmp_path / "kept")
    found = {"model": {"w": torch.zeros(6)}, "optimizer": {"lr": 0.0, "betas": (0.0, 0.0), "names": [""]}}
    read_state(found, tmp_path / "kept")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert found["optimizer"] == state["optimizer"]

    dcp.save(state | {"optimizer": {"lr": Planted(mark)}}, checkpoint_id=tmp_path / "values")
    index = pickle.loads((tmp_path / "kept" / ".metadata").read_bytes())
    index.planner_data = Planted(mark)
    (tmp_path / "kept" / ".metadata").write_bytes(pickle.dumps(index))
    for folder in ("values", "kept"):
        mark.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"io\.open has no place in a sharded checkpoint → delete"):
            read_state({"model": {"w": torch.zeros(6)}, "optimizer": {"lr": 0.0}}, tmp_path / folder)
        assert not mark.exists(), folder

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml

from cpift.cli.main import main
from cpift.config.run import RunConfig
from cpift.errors import CpiftError
from tests.helpers.checkpoints import random_tensors, save_checkpoint

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def cpift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: one of its own costs seconds before it does anything."""

    def run(*arguments: str | Path, cwd: Path | None = None) -> CompletedProcess[str]:
        command = ["cpift", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        if cwd is not None:
            monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return CompletedProcess(command, int(ended.value.code or 0), shown.out, shown.err)

    return run


def test_help_teaches_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['cpift', '--help']\n"
        "from cpift.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'numba', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stages = ("probe", "regions", "group", "fuse", "integrate", "evaluate", "report")
    for word in ("run", "plan", *stages, "sweep", "submit", "core region"):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["run", "plan", "probe", "evaluate"])
def test_every_command_has_help(cpift: Run, command: str) -> None:
    done = cpift(command, "--help")
    assert done.returncode == 0
    assert "CONFIG" in done.stdout
    assert "--set" in done.stdout


@pytest.mark.slow
def test_plan_touches_nothing_and_waits_for_nothing_heavy(tmp_path: Path, smoke_config: Path) -> None:
    """Importing torch or transformers alone takes as long as the whole plan of a config with a random model."""
    code = (
        "import ctypes, sys; sys.argv = ['cpift', 'plan', sys.argv[1]]\n"
        "from cpift.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "try: ctypes.CDLL('libcuda.so.1')\n"
        "except OSError: driver = set()\n"
        "else: driver = {'torch'}  # whether it finds a GPU, torch alone can tell\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'numba', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "heavy -= driver\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(smoke_config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "to do" in done.stdout
    assert "Parameters:" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bad(cpift: Run, tmp_path: Path, smoke_config: Path) -> Run:
    """A run with changes that it refuses before Ray is started."""

    def run(*changes: str) -> CompletedProcess[str]:
        arguments = [part for change in changes for part in ("--set", change)]
        done = cpift("run", smoke_config, *arguments, "--output", tmp_path / "out", cwd=tmp_path)
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        return done

    return run


def test_a_process_ends_with_one_message_and_code_2(tmp_path: Path, smoke_config: Path) -> None:
    command = [sys.executable, "-m", "cpift.cli", "run", str(smoke_config), "--set", "probe.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.count("cpift: ") == 1
    assert "did you mean 'steps'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("probe.stepz=3", "did you mean 'steps'?"),
        ("regions.p=0", "regions.p: 0"),
        ("tasks.1.name=%FIRST%", "is named twice"),
        ("tasks.0.train={file: nowhere.jsonl}", "nowhere.jsonl"),
        ("probe.learning_rate=fast", "probe.learning_rate: 'fast'"),
        ("backbone.source=./nothing", "backbone.source"),
    ],
)
def test_bad_configs_end_with_one_message_and_code_2(
    bad: Run, tmp_path: Path, smoke_config: Path, change: str, said: str
) -> None:
    first = yaml.safe_load(smoke_config.read_text())["tasks"][0]["name"]
    done = bad(change.replace("%FIRST%", first))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def checkpoint_with(folder: Path, how: str) -> Path:
    tensors = random_tensors(1)
    if how == "NaN":
        tensors["cube"][0, 0, 0] = torch.nan
    save_checkpoint(folder, tensors, shards=3)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 32,
            }
        )
    )
    if how == "missing shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing shard", "other shape"])
def test_bad_checkpoints_end_with_one_message_and_code_2(bad: Run, tmp_path: Path, how: str) -> None:
    folder = checkpoint_with(tmp_path / "model", how)
    done = bad(f"model={{path: {folder}}}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert str(folder) in done.stderr
    assert not (tmp_path / "out" / "probe").exists()


@pytest.mark.slow
def test_a_real_model_with_nan_is_refused_before_training(bad: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from cpift.config.inputs import ScratchModel
    from cpift.config.run import ModelConfig
    from cpift.models.sources import materialise

    materialise(ModelConfig(scratch=ScratchModel()), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    done = bad(f"model={{path: {tmp_path / 'model'}}}")
    assert done.returncode == 2, done.stderr
    assert "model.norm.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "probe").exists()


def test_test_rows_too_long_to_score_are_refused_before_training(bad: Run, tmp_path: Path) -> None:
    done = bad("evaluation.max_length=8")
    assert done.returncode == 2, done.stderr
    assert "tasks.addition.test 24 of 24 rows, row 1 first" in done.stderr
    assert "raise evaluation.max_length" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "probe").exists()


LITERAL = [
    "/x/x #1",
    "null",
    "${HOME}",
    "123",
    "yes",
    "a: b",
    "~",
    "~/x",
    "[a]",
    "{a: 1}",
    "'q'",
    "a=b",
    "*a",
    "-",
    "1e3",
]
COMMANDS = ["run", "plan", "probe", "regions", "group", "fuse", "integrate", "evaluate", "report", "data preview"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", ""], "the argument after plan: is empty"),
        (["plan", "x.yaml", "--output", ""], "the argument after --output: is empty"),
        (["check", "--output="], "--output: is empty"),
        (["compare", "x.yaml", "--seeds", ""], "the argument after --seeds: is empty"),
        ([""], "the argument at the start: is empty"),
        (["compare", "x.yaml", "--seeds", "1_0"], "--seeds: '1_0'"),
        (["compare", "x.yaml", "--seeds", "\u0663"], "--seeds: '\u0663'"),
    ],
)
def test_an_empty_argument_means_nothing(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above all not the current folder, which a path without a name is to Python."""
    monkeypatch.setattr(sys, "argv", ["cpift", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, "compare", "sweep"])
def test_options_are_taken_as_they_are_typed(
    command: str,
    smoke_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Seen(CpiftError):
        pass

    def look(config: RunConfig, **rest: object) -> None:
        raise Seen(f"{config.output_dir}|{config.resources.memory_budget}")

    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cpift", *command.split(), str(file), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr("cpift.pipeline.preflight.examined", look)
    monkeypatch.chdir(tmp_path)
    file = smoke_config if command != "sweep" else smoke_config.parents[1] / "sweeps" / "smoke_p_tau.yaml"
    for value in LITERAL:
        assert f"{tmp_path / value}|" in said("--output", value), value
    if command in ("regions", "fuse"):
        assert f"|{3 << 20}\n" in said("--memory-budget", "3MiB")
        for value in ("null", "3MiB #", "${HOME}", "[1]", ".", "1.2.3", "9" * 400 + "GB", "yes"):
            assert f"memory_budget: {value!r}" in said("--memory-budget", value)


@pytest.mark.parametrize("options", [[], ["--set", "seed=1"]])
@pytest.mark.parametrize(
    ("fields", "said", "then"),
    [
        ("space: {regions.p: [0.01, 0.1]}", "this is a sweep's file, over values of a run's fields", "sweep"),
        ("seeds: [0, 1]", "this is a comparison's file, of a run", "compare"),
    ],
)
def test_a_sweep_or_a_comparison_in_the_place_of_a_run_is_told(
    fields: str,
    said: str,
    then: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"run: run.yaml\n{fields}\n")
    monkeypatch.setattr(sys, "argv", ["cpift", "plan", str(file), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    answer = " ".join(capsys.readouterr().err.split())
    assert said in answer
    assert "`cpift plan run.yaml` plans its run" in answer
    assert f"`cpift {then} " in answer


def test_scores_go_into_no_models_folder(cpift: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    done = cpift("evaluate", "org/a", "--test", "a.jsonl", "--output", tmp_path / "model")
    assert done.returncode == 2
    assert "is a model's folder, which holds nothing else" in " ".join(done.stderr.split())

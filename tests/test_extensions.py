"""What users bring: where it is looked for, what of it is run and when, and what it is known by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.cluster.submit import package
from cpift.config.code import code_lines, code_of
from cpift.config.loading import dump_config, load_config, with_fields
from cpift.config.run import RunConfig
from cpift.errors import ConfigError
from cpift.evaluation.metrics import Metric, load_metric
from cpift.extensions import Extension, find, load, loaded
from cpift.pipeline.identity import ModelRef, StageArtifacts
from cpift.sweep.config import load_sweep

ROOT = Path(__file__).parents[1]
MODULE = """
from pathlib import Path
from cpift import Metric

Path(__file__).with_suffix(".ran").touch()
length = Metric("length", lambda replies: [min(1, len(reply.text) / 10) for reply in replies])
a_function = print
"""


@pytest.fixture
def run(tmp_path: Path, smoke_config: Path) -> Path:
    """A run whose first task is scored by a metric of a module beside it."""
    fields = yaml.safe_load(smoke_config.read_text())
    fields["tasks"][0]["metric"] = "my_metrics:length"
    (tmp_path / "my_metrics.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "run.yaml"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `brought` 1.2 that declares its metric as `brevity`."""
    site = tmp_path / "site"
    (site / "brought").mkdir(parents=True)
    (site / "brought" / "__init__.py").write_text("")
    (site / "brought" / "scores.py").write_text(MODULE)
    about = site / "brought-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[cpift.metrics]\nbrevity = brought.scores:length\n")
    (about / "top_level.txt").write_text("brought\n")
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.partition(".")[0] == "brought"]:
        monkeypatch.delitem(sys.modules, name)
    return site / "brought" / "scores.py"


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def evaluation(config: RunConfig) -> str:
    return StageArtifacts(config).evaluate(ModelRef("base", Path("x"), "f")).fingerprint


def test_a_module_beside_the_run_is_found_without_running_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_config(run)
    assert config.tasks[0].metric == f"{run.with_name('my_metrics.py')}:length"
    assert config.tasks[0].metric_name == "my_metrics:length"
    assert code_lines(config) == [f"Runs code of {run.with_name('my_metrics.py')}: metric my_metrics:length"]
    assert "metric: my_metrics:length\n" in dump_config(config)
    assert with_fields(config, {"regions.p": 0.1}, "x").tasks[0] == config.tasks[0]
    assert evaluation(config) == evaluation(config)
    assert not run.with_name("my_metrics.ran").exists()
    assert load_metric(config.tasks[0].metric).title == "length"
    assert run.with_name("my_metrics.ran").exists()


def test_its_bytes_are_part_of_what_they_score_and_of_nothing_else(run: Path, smoke_config: Path) -> None:
    config = load_config(run)
    before, probes = evaluation(config), StageArtifacts(config).probes
    first = load_metric(config.tasks[0].metric)
    run.with_name("my_metrics.py").write_text(MODULE.replace("/ 10", "/ 20"))
    assert evaluation(config) != before
    assert load_metric(config.tasks[0].metric) is not first
    assert {name: one.fingerprint for name, one in StageArtifacts(config).probes.items()} == {
        name: one.fingerprint for name, one in probes.items()
    }
    run.with_name("my_metrics.py").write_text(MODULE)
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("run.yaml", "my_metrics.py"):
        (elsewhere / name).write_bytes((run.parent / name).read_bytes())
    moved = load_config(elsewhere / "run.yaml")
    assert evaluation(moved) == before, "the same code in another place is the same"
    assert not code_of(load_config(smoke_config))


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_an_installed_one_by_its_module_or_its_entry_point(run: Path, installed: Path) -> None:
    for word in ("brought.scores:length", "brevity"):
        config = load_config(run, [f"tasks.0.metric={word}"])
        assert config.tasks[0].metric == config.tasks[0].metric_name == word
        found = find("metrics", word)
        assert (found.file, found.module, found.package) == (installed, "brought.scores", "brought 1.2")
        assert "brought.scores" not in sys.modules
        assert code_lines(config) == [f"Runs code of brought 1.2, {installed}: metric {word}"]
    assert find("metrics", "brevity").fingerprint == find("metrics", "brought.scores:length").fingerprint
    assert load_metric("brevity").title == "length"
    assert load_metric("brevity") is load_metric("brought.scores:length")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("numbr", "'numbr': is no metric → did you mean 'number'?"),
        ("brevty", "did you mean 'brevity'?"),
        ("my_metric:length", "there is no module my_metric in {folder}, nor among installed packages → did you mean"),
        ("my metrics:length", "write module:attribute, with my_metrics.py beside the run's file"),
        ("{folder}/my_metrics.py:length", "names a file by its path"),
        ("os:system", "there is no module os in {folder}, nor among installed packages"),
        ("7", "7: is no name of a metric"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_wrong_name_is_refused_with_the_remedy(run: Path, word: str, said: str) -> None:
    assert said.format(folder=run.parent) in problems(run, f"tasks.0.metric={word.format(folder=run.parent)}")
    assert not run.with_name("my_metrics.ran").exists()


@pytest.mark.parametrize(
    ("source", "attribute", "said"),
    [
        (MODULE, "lenght", "has no lenght → did you mean 'length'?"),
        (MODULE, "a_function", "a_function is no Metric in "),
        ("x = 1\n", "length", "has no length → docs/extending says how a metric is written"),
        (
            "import my_helpers\n",
            "length",
            "line 1: ModuleNotFoundError: No module named 'my_helpers') → mend it; beside",
        ),
        ("x = 1\nraise SystemExit(3)\n", "length", "line 2: SystemExit: 3) → mend it"),
        ("def f(:\n", "length", "line 1: SyntaxError: "),
    ],
)
def test_what_its_module_lacks_is_said_when_it_is_loaded(run: Path, source: str, attribute: str, said: str) -> None:
    run.with_name("my_metrics.py").write_text(source)
    run.with_name("my_helpers.py").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_metric(load_config(run, [f"tasks.0.metric=my_metrics:{attribute}"]).tasks[0].metric)
    assert said in str(caught.value)


def test_code_of_the_working_directory_is_not_taken(run: Path, tmp_path: Path) -> None:
    """Python looks there first, if it is started with -m or -c."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "somewhere.py").write_text(MODULE)
    line = f"from cpift.config.loading import load_config; load_config(__import__('pathlib').Path({str(run)!r}), "
    done = subprocess.run(
        [sys.executable, "-c", f"{line}['tasks.0.metric=somewhere:length'])"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "there is no module somewhere in" in done.stderr
    assert not (work / "somewhere.ran").exists()


def test_a_file_that_went_is_missed_by_name(run: Path) -> None:
    config = load_config(run)
    run.with_name("my_metrics.py").unlink()
    with pytest.raises(ConfigError, match=r"there is no file .*my_metrics.py → put it back"):
        code_lines(config)


@pytest.mark.usefixtures("installed")
def test_two_packages_that_declare_one_name_are_refused(installed: Path) -> None:
    about = installed.parents[1] / "other-3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 3\n")
    (about / "entry_points.txt").write_text("[cpift.metrics]\nbrevity = other:x\n")
    with pytest.raises(ConfigError, match=r"brevity: is declared by brought 1.2 and other 3 → uninstall one"):
        find("metrics", "brevity")


def test_a_sweeps_file_names_modules_beside_itself(run: Path) -> None:
    sweep = run.with_name("sweep.yaml")
    space = {"tasks.0.metric": ["number", "my_metrics:length"]}
    sweep.write_text(yaml.safe_dump({"run": run.name, "space": space, "objectives": ["mean_loss"]}))
    loaded_sweep = load_sweep(sweep)
    assert loaded_sweep.config.space["tasks.0.metric"] == ("number", f"{run.with_name('my_metrics.py')}:length")
    assert code_of(loaded_sweep.config).keys() == {"space.tasks.0.metric.1"}
    sweep.write_text(yaml.safe_dump({"run": run.name, "space": {"tasks.0.metric": ["theirs:length", "number"]}}))
    with pytest.raises(ConfigError, match="there is no module theirs"):
        load_sweep(sweep)


def test_plan_says_whose_code_it_runs_and_other_commands_run_none(run: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")]
    said = CliRunner().invoke(app, ["plan", str(run), *output])
    assert said.exit_code == 0, said.output
    assert f"Runs code of {run.with_name('my_metrics.py')}" in said.output.replace("\n", "")
    assert run.with_name("my_metrics.ran").exists()
    run.with_name("my_metrics.ran").unlink()
    for command in (["schema"], ["runs", str(tmp_path)]):
        CliRunner().invoke(app, command)
    assert not run.with_name("my_metrics.ran").exists()


def test_a_job_takes_it_along(run: Path, tmp_path: Path) -> None:
    spec = package(run, [], "/shared/out", tmp_path / "build", wheel=False)
    assert (spec.working_dir / "my_metrics.py").read_text() == MODULE
    job = load_config(spec.working_dir / "run.yaml")
    assert job.tasks[0].metric == f"{spec.working_dir / 'my_metrics.py'}:length"
    assert not run.with_name("my_metrics.ran").exists()


def test_only_what_was_made_for_it_is_handed_out(run: Path) -> None:
    file = run.with_name("my_metrics.py")
    assert isinstance(loaded("metrics", f"{file}:length", Metric), Metric)
    with pytest.raises(ConfigError, match="length is no Path"):
        load(Extension("metrics", "my_metrics:length", file, "length"), Path)

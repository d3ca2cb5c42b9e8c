"""The tree keeps its shape: imports point one way, modules stay small, nothing shadows Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "cpift").glob("*.py"), *(ROOT / "kernels" / "cpift_kernels").rglob("*.py")])

# A module imports only from its own layer or from those before it.
LAYERS = [
    {
        "ending",
        "errors",
        "fact_cache",
        "artifact_state",
        "artifacts",
        "files",
        "input_watch",
        "mapped_reads",
        "locks",
        "top_files",
        "columns",
        "config",
        "config_evaluation",
        "config_identity",
        "config_inputs",
        "config_training",
        "config_loading",
        "config_variation",
        "config_paths",
        "other_tools",
        "sweep_config",
        "compare_config",
        "devices",
        "fit_spec",
        "examples",
        "hub",
        "patterns",
        "placement",
        "work_queue",
        "redaction",
        "escaping",
        "terminal",
        "tensor_names",
        "metrics",
        "text_metrics",
        "row_kinds",
        "turns",
        "units",
        "untrusted",
        "untrusted_yaml",
        "progress_record",
        "progress_screen",
        "progress_watch",
        "run_folders",
        "view",
        "merge_fields",
    },
    {
        "direct_io",
        "object_store",
        "safetensors_files",
        "mapped_files",
        "finite",
        "architecture",
        "checkpoints",
        "checkpoint_checks",
        "checkpoint_writing",
        "lora",
        "lora_config",
        "lora_files",
        "gguf_files",
        "given",
        "vocabulary",
        "tying",
        "tokenizer_files",
        "model_fields",
        "quantised",
        "conversion",
        "layout",
        "relaid",
        "streaming",
        "adapters",
        "data",
        "task_checks",
        "data_preview",
        "packing",
        "holdout",
        "row_formats",
        "row_problems",
        "row_shapes",
        "row_tables",
        "row_texts",
        "row_use",
        "row_sources",
        "rows_on_disk",
        "tracking",
        "synthetic",
        "templates",
        "tokens",
        "scratch",
        "chat_templates",
        "model_sizes",
        "model_tokenizer",
        "models",
        "pretrained",
        "likelihood",
        "generation",
        "scored_rows",
        "judge",
        "standard_benchmarks",
        "task_files",
        "sharded_state",
        "sharding",
    },
    {
        "core_regions",
        "region_masks",
        "grouping",
        "fusion",
        "merging",
        "methods",
        "verify",
        "verify_definition",
        "freezing",
    },
    {"finetune", "stage_data", "evaluate"},
    {
        "report",
        "report_chart",
        "report_files",
        "report_index",
        "report_picture",
        "report_scores",
        "report_plots",
        "report_page",
        "report_style",
        "report_parts",
        "report_svg",
        "model_card",
        "sweep_scores",
        "sweep_files",
        "sweep_picture",
        "sweep_plots",
        "sweep_verdict",
        "sweep_report",
        "estimates",
        "measures",
        "retention",
        "verdict",
        "compare_record",
        "compare_report",
        "compare_page",
        "compare_plots",
        "compare_tables",
        "compare_verdict",
    },
    {
        "stages",
        "report_facts",
        "stage_artifacts",
        "fusion_stage",
        "engine",
        "pipeline",
        "run_session",
        "plan_costs",
        "planning",
        "needs",
        "init_files",
        "init_model",
        "init_others",
        "init_rows",
        "init_run",
        "preflight",
        "row_checks",
        "shared_rows",
        "merge_planning",
    },
    {
        "inprocess",
        "sweep_plan",
        "outcomes",
        "sweep_shared",
        "sweep_record",
        "sweep_keep",
        "sweep_learning",
        "sweep_results",
        "baselines",
        "budgets",
        "run_baselines",
        "compare",
    },
    {
        "distributed",
        "distributed_desk",
        "distributed_fits",
        "distributed_fusion",
        "distributed_group",
        "distributed_session",
        "distributed_storage",
        "distributed_store",
        "distributed_work",
        "sweep_fits",
        "sweep_trial",
        "sweep",
    },
    {"cores", "freeze_callback", "merge_folder", "state_dicts", "api", "__init__"},
    {
        "submit",
        "cli_cluster",
        "cli_benchmarks",
        "cli_check",
        "cli_compare",
        "cli_data",
        "cli_group",
        "cli_init",
        "cli_merge",
        "cli_plan",
        "cli_runs",
        "cli_schema",
        "cli",
    },
]


# Modules whose job is Ray; all others run without it.
ON_RAY = {
    "distributed",
    "distributed_desk",
    "distributed_fits",
    "distributed_fusion",
    "distributed_group",
    "distributed_session",
    "distributed_work",
    "sweep",
    "sweep_fits",
    "sweep_trial",
    "submit",
}


def imports_of(path: Path) -> set[str]:
    """First and second part of every imported name, for example `cpift.config`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "cpift" if node.level and path.parent.name == "cpift" else "." if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            found |= {module} | ({f"cpift.{alias.name}" for alias in node.names} if module == "cpift" else set())
    return found


def layer(module: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if module in names), -1)


@pytest.mark.parametrize("path", sorted((ROOT / "cpift").glob("*.py")), ids=lambda path: path.name)
def test_imports_point_one_way(path: Path) -> None:
    mine = layer(path.stem)
    assert mine >= 0, f"{path.name} has no layer: add it to LAYERS where it belongs"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "cpift" and len(parts) > 1 and layer(parts[1]) >= 0:
            assert layer(parts[1]) <= mine, f"{path.name} imports {name}, a later layer"
        if parts[0] == "ray":
            assert path.stem in ON_RAY, f"{path.name} imports Ray"


def test_kernels_import_nothing_of_the_method() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.split(".")[0] in {"cpift", "ray", "transformers"}}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330


def test_no_package_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_the_wheel_holds_both_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(list(map(str, build)), check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("cpift-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"cpift/{path.name}" for path in (ROOT / "cpift").glob("*.py")}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels" / "cpift_kernels").rglob("*.py")}
    sources |= {f"cpift/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    sources |= {f"cpift/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert sources <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)

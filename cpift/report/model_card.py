"""README.md beside a model that a run made: what it is, how it came about, and what it may be used for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpift.config.run import FusionConfig, ModelConfig, RunConfig, TaskConfig
from cpift.data.sources import rows_of
from cpift.disk.artifacts import CARD
from cpift.disk.files import write_text
from cpift.errors import entry
from cpift.merging.registry import method_named
from cpift.models.sources import source_of
from cpift.text.escaping import code, markdown
from cpift.text.redaction import redacted
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_bytes

# `integration.stages` → whether there is one stage, which has no earlier ones
ONE_STAGE = {"groups": False, "mixed": True}
_KINDS = {
    "fused": "the transplant and SLERP fusion of the fine-tunes, before integrated fine-tuning",
    "final": "the fused model after integrated fine-tuning with core regions frozen",
}


def write_model_card(
    folder: Path,
    kind: str,
    config: RunConfig,
    groups: Sequence[Sequence[str]],
    manifest: Mapping[str, Any],
    pretrained: Path | None = None,
    verdict: str = "",
) -> None:
    """Write `README.md` into `folder`, in the format of the Hugging Face hub.

    Args:
        folder: the model's directory.
        kind: "fused" or "final".
        config: the run.
        groups: the task groups in stage order.
        manifest: the model's own, for fingerprint, versions, device and commit.
        pretrained: θ0's directory, searched for a license statement.
        verdict: how good it is, once that is known (`evaluation.verdict.verdict_sentence`).
    """
    write_text(folder / CARD, model_card(kind, config, groups, manifest, license_of(pretrained), verdict))


def model_card(
    kind: str,
    config: RunConfig,
    groups: Sequence[Sequence[str]],
    manifest: Mapping[str, Any],
    license_name: str | None,
    verdict: str = "",
) -> str:
    """The card's text; `license_name` is that of θ0, None where it is unknown."""
    parts = [
        _front_matter(config.model, license_name, config.fusion.as_lora),
        f"# {markdown(config.name)} ({kind})\n\n{_what(kind, config)}",
        *([f"## Scores\n\n{markdown(verdict)}"] if verdict else []),
        f"## Made from\n\n{source_of(config.model).origin}\n\n{_license_note(license_name)}",
        f"## Tasks\n\n{_tasks(config, groups)}",
        f"## Recipe\n\n{_recipe(kind, config)}",
        f"## Provenance\n\n{_provenance(manifest)}",
        f"## Limits\n\n{_tested(config)}, and what θ0 gets wrong it may get wrong too.",
    ]
    return redacted("\n\n".join(parts) + "\n")


def _what(kind: str, config: RunConfig) -> str:
    if kind == "fused" and not config.fusion.isolates:
        kind_of = "LoRA adapter" if config.fusion.as_lora else "language model"
        return f"A {kind_of} merged by {config.fusion.method_name} from fine-tunes of one model, with cpift."
    sentence = (
        "made by Core Parameter Isolation Fine-Tuning (CPI-FT, [arXiv 2508.21741](https://arxiv.org/abs/2508.21741))"
    )
    return f"A language model {sentence}: {entry(_KINDS, kind, 'model')}."


def _tested(config: RunConfig) -> str:
    if not config.scores:
        return "The merge was checked, element by element; nothing about the model's behaviour was tested"
    report = "One run with one seed. Its scores on held-out rows are in the run's report"
    return f"{report}; nothing else about its behaviour was tested"


def license_of(folder: Path | None) -> str | None:
    """The license that a checkpoint directory states in its README's front matter; None where it states none."""
    readme = folder / CARD if folder is not None else None
    if readme is None or not readme.is_file():
        return None
    from cpift.untrusted.yaml import parse_yaml

    try:
        parts = read_bytes(readme, MODEL_CONFIG.size).decode("utf-8", "replace").split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return None
        stated = parse_yaml(parts[1])
    except UnreadableError:
        return None
    name = stated.get("license") if isinstance(stated, dict) else None
    return name if isinstance(name, str) else None


def _front_matter(model: ModelConfig, license_name: str | None, adapter: bool) -> str:
    library = "peft" if adapter else "transformers"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [cpift, merge]"]
    if (repository := source_of(model).repository) is not None:
        lines.append(f"base_model: {_quoted(repository)}")
    if license_name is not None:
        lines.append(f"license: {_quoted(license_name)}")
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    import yaml

    return yaml.safe_dump(text, default_style='"', width=1 << 30).strip()


def _license_note(license_name: str | None) -> str:
    if license_name is not None:
        return f"Its license is stated as {code(license_name)}; a derived model such as this one is bound by it."
    return (
        "Its license is not recorded in the checkpoint. A derived model such as this one is bound by it: look it up "
        "before passing this model on. The same holds for the data sets."
    )


def _tasks(config: RunConfig, groups: Sequence[Sequence[str]]) -> str:
    if config.earlier:
        groups = [[task.name for task in config.earlier], [task.name for task in config.tasks]]
    rows = [
        f"| {number} | {markdown(name)} | {markdown(task.metric_name)} | {_origin_of(task, config)} |"
        for number, group in enumerate(groups or [[task.name for task in config.tasks]], start=1)
        for name in group
        for task in [config.task(name)]
    ]
    return "\n".join(["| stage | task | metric | training data |", "|---|---|---|---|", *rows])


def _origin_of(task: TaskConfig, config: RunConfig) -> str:
    if config.parent is not None and task in config.earlier:
        return f"inside {code(config.parent.run.name)}, which this model goes on from"
    if task.checkpoint is None:
        return rows_of(task.train_data).origin
    checkpoint = task.checkpoint
    if checkpoint.hub is not None:
        return f"given: {code(checkpoint.hub)}, revision {code(checkpoint.revision or 'main')}"
    return f"given: {code(checkpoint.path.name if checkpoint.path else '')}"


_MOST = {
    "update": "moved most",
    "significance": "moved most, times their weight in the base model (measure significance)",
    "curvature": "moved most, weighed by second moments: (θi − θ0)²·vi (measure curvature)",
}


def _recipe(kind: str, config: RunConfig) -> str:
    lines = [_fusion(config.fusion), *_layers_and_tokens(config.fusion)]
    if config.fusion.isolates or kind == "final":
        lines.insert(
            0,
            f"Core regions: the {config.regions.p:.3g} of all elements that each task's probe "
            f"{_MOST[config.regions.measure]} (scope {config.regions.scope}).",
        )
        backbone = f"the final model of {config.parent.run.name}" if config.parent else config.backbone_source
        lines.insert(1, f"Backbone: {markdown(backbone if config.earlier else config.backbone_source)}.")
    if kind == "final":
        tuning = config.integration_training
        alone = entry(ONE_STAGE, tuning.stages, "integration.stages") and not config.earlier
        freeze = "none" if alone and tuning.freeze == "earlier" else tuning.freeze
        held = "frozen" if tuning.penalty is None else f"pulled back (penalty {tuning.penalty:g})"
        frozen = {"earlier": "cores of earlier stages", "all": "all cores", "none": "nothing"}[freeze]
        lines.append(f"Integration: {tuning.length} a stage, learning rate {tuning.learning_rate:g}, {frozen} {held}.")
    if config.parent is not None and config.parent.forgotten:
        lines.append(
            f"Made anew from {code(config.parent.run.name)}, without its task {code(config.parent.forgotten)}."
        )
    lines.append(f"Seed: {config.seed}.")
    return "\n".join(f"- {line}" for line in lines)


def _fusion(fusion: FusionConfig) -> str:
    settings = markdown(method_named(fusion.method).described(fusion))
    return f"Fusion: {settings}." if fusion.isolates else f"Merged by {fusion.method_name} onto θ0: {settings}."


def _layers_and_tokens(fusion: FusionConfig) -> Iterator[str]:
    """Where a merged model has others than θ0."""
    if fusion.slices:
        yield f"Layers, one slice after another: {markdown('; '.join(one.described for one in fusion.slices))}."
    if fusion.by_tokens:
        named = f", {len(fusion.tokens)} of them with a row that the run's file names" if fusion.tokens else ""
        yield f"Tokens: {markdown(fusion.vocabulary)}{named}; missing rows: {fusion.missing_tokens}."


def _provenance(manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted((manifest.get("versions") or {}).items()))
    facts = {
        "fingerprint": manifest.get("fingerprint"),
        "made": manifest.get("started"),
        "device": manifest.get("device"),
        "platform": manifest.get("platform"),
        "commit": manifest.get("commit"),
        "versions": versions,
    }
    return "\n".join(f"- {name}: {markdown(str(value))}" for name, value in facts.items() if value)

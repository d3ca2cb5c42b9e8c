"""What a merge as an adapter refuses by name: by its fields alone, and by the headers of models that are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpift.checkpoints.adapters.parts import AdapterParts
from cpift.checkpoints.checkpoint import first_problems
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.checkpoints.lora_config import adapter_settings
from cpift.checkpoints.opening import folders_at_hand, open_models
from cpift.config.needs import NEEDS
from cpift.config.run import FusionConfig, RunConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.hub import HUB_ID
from cpift.merging.adapters.inputs import adapters_of, changed_in, changed_names, room_problems
from cpift.merging.forms import WeightedMerge
from cpift.merging.registry import METHODS
from cpift.merging.settings import Settings

_WHERE = "fusion.as_lora"
_OUT = "leave it out, and extract an adapter of the merged model (`cpift extract-lora`)"


@dataclass(frozen=True)
class Asked:
    """An adapter to make: its rank (None: by concatenation), how it names θ0, bytes to hold, a folder to go on from,
    and whether it is read back and checked."""

    rank: int | None
    named: str | None
    budget: int
    work: Path
    verify: bool


def asked_of(config: RunConfig, folders: Sequence[Path], work: Path) -> Asked:
    """What a run asks for. folders: of the models that are merged."""
    resources = config.resources
    return Asked(config.fusion.rank, base_name(config, folders), resources.memory_budget, work, resources.verify)


def concatenates(method: str) -> bool:
    """Whether a method's update is a sum of multiples of whole updates, so that adapters can be concatenated."""
    kind = METHODS.get(method)
    return kind is not None and issubclass(kind, WeightedMerge) and kind.combines_updates


def field_problems(config: RunConfig, stage: str | None, names: Sequence[str]) -> Iterator[Problem]:
    """What an adapter may not be asked for with, where the config asks for one. names: of θ0's tensors, if known."""
    fusion = config.fusion
    if not fusion.as_lora:
        what = f"is {fusion.rank}, and no adapter is asked for"
        yield from [Problem("fusion.rank", what, "set fusion.as_lora, --as-lora")] if fusion.rank is not None else []
        return
    if fusion.rank is None and not concatenates(fusion.method):
        ways = ", ".join(name for name in METHODS if concatenates(name))
        what = (
            f"without a rank is by concatenation, and {fusion.method_name} is no sum of multiples of updates ({ways})"
        )
        yield Problem(_WHERE, what, "give fusion.rank, --rank: the closest product of that rank")
    if fusion.slices or fusion.vocabulary != "error":
        where = f"fusion.{'slices' if fusion.slices else 'vocabulary'}"
        yield Problem(where, "makes other layers or rows than θ0's, to which the adapter would be added", _OUT)
    if fusion.method == "passthrough":
        yield Problem("fusion.method", "passthrough copies one model", "give that model")
    if config.model.dtype != "auto":
        what = f"is {config.model.dtype}, and an adapter is added to θ0 as it is"
        yield Problem("model.dtype", what, "leave it out")
    yield from _of_stage(config, stage)
    yield from dict.fromkeys(Settings(fusion, names).problems(_scaling, [task.name for task in config.tasks]))


def _of_stage(config: RunConfig, stage: str | None) -> Iterator[Problem]:
    if config.integration is not None or NEEDS[stage].integrates == "always":
        yield Problem(_WHERE, "makes an adapter, and `integration` trains whole models", "leave one of the two out")
    if stage is not None and stage.startswith("sweep"):
        yield Problem(
            _WHERE, "makes an adapter, and a sweep judges models", "leave it out; merge its best.yaml with it"
        )
    if config.baselines is not None:
        yield Problem(_WHERE, "makes an adapter, and baselines are models", "leave one of the two out")
    if config.resources.remote_storage:
        yield Problem(_WHERE, "is made on this machine, not in an object store", "leave resources.storage out")


def _scaling(config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
    """Why a mean that is not normalised scales θ0."""
    total = sum(config.weights.get(task, config.weight) for task in tasks)
    if config.method != "linear" or config.normalize is not False or abs(total - 1.0) <= 1e-9:
        return []
    what = f"sum to {total:g}: θ0 itself is scaled, which no adapter of it holds"
    return [Problem("fusion.weights", what, "give weights that sum to 1, or leave fusion.normalize out")]


def opened_problems(config: RunConfig) -> list[Problem]:
    """Of models that are at hand and fit θ0, what no adapter can hold. Whole fine-tunes are read when it is made."""
    if (folders := folders_at_hand(config)) is None:
        return []
    try:
        base, models = open_models(*folders)
        adapters = {task: model for task, model in models.items() if isinstance(model, LoraCheckpoint)}
        problems, parts = list[Problem](), AdapterParts(base)
        changed = changed_in(parts, changed_names(base, adapters), models, config.fusion.rank, problems)
        by_factors = concatenates(config.fusion.method) and adapters_of(models) is not None
        problems += room_problems(changed, base, config.resources.memory_budget, by_factors)
    except ProblemsError as error:
        return list(error.problems)
    except (CpiftError, OSError):
        return []  # `check_given` says what is wrong with them
    return first_problems(problems, 20)


def base_name(config: RunConfig, folders: Sequence[Path]) -> str | None:
    """How an adapter calls θ0: its hub id, else what its adapters call it if that is one, else its folder's last name.

    Never a place of this machine. folders: of the models that are merged.
    """
    if config.model.hub is not None:
        return config.model.hub
    said = {adapter_settings(one).get("base_model_name_or_path") for one in folders if _is_adapter(one)}
    name = said.pop() if len(said) == 1 else None
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    return config.model.path.name if config.model.path is not None else None


def _is_adapter(folder: Path) -> bool:
    from cpift.checkpoints.lora_config import ADAPTER_CONFIG

    return (folder / ADAPTER_CONFIG).is_file()

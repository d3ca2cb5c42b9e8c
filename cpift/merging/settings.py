"""The settings of a merge tensor by tensor: what is a list or has filters in the config is a number at each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.config.settings import places_of, shown_setting, unmet, value_at, varies
from cpift.errors import Problem
from cpift.method.regions import Streaming, write_regions, write_shares

SINGLE = ("weight", "density", "t")
BY_TASK = ("weights", "densities")
Problems = Callable[[FusionConfig, Sequence[str]], list[Problem]]


def settings_of(config: FusionConfig) -> dict[str, object]:
    """Every setting by field, of those by task `weights.TASK`."""
    return {name: getattr(config, name) for name in SINGLE} | {
        f"{name}.{task}": value for name in BY_TASK for task, value in getattr(config, name).items()
    }


def no_shares(config: FusionConfig, tasks: Sequence[str], why: str) -> list[Problem]:
    """What keeps the weights of these tasks from being shares of one whole; why: none of these can be, in words."""
    weights = [config.weights.get(task, config.weight) for task in tasks]
    shares = min(weights) >= 0 and sum(weights) > 0
    return [] if shares else [Problem("fusion.weights", f"are {weights}: {why}", "give others")]


class Settings:
    """A config, and what it is at each tensor of a model of these names."""

    def __init__(self, config: FusionConfig, names: Sequence[str], first: int = 0):
        """first: the number of the first layer."""
        self._config, self._names = config, names  # none: of a model that is not at hand
        self.vary = any(varies(value) for value in settings_of(config).values())
        self._places = places_of(names, first) if self.vary else {}

    def at(self, name: str) -> FusionConfig:
        """The config with a number for every setting; fields that no case reaches are as they stand."""
        if not self.vary:
            return self._config
        place = self._places[name]
        single = {field: value_at(getattr(self._config, field), name, place) for field in SINGLE}
        by_task = {
            field: {task: value_at(value, name, place) for task, value in getattr(self._config, field).items()}
            for field in BY_TASK
        }
        return self._config.model_copy(update={**single, **by_task})

    def problems(self, of_method: Problems, tasks: Sequence[str]) -> list[Problem]:
        """What is wrong with it for this model: filters that meet no tensor, and what the method says of a tensor."""
        found = [
            Problem(f"fusion.{field}", what, remedy)
            for field, value in settings_of(self._config).items()
            for what, remedy in unmet(value, self._names)
        ]
        fusion = self._config
        if fusion.trim == "global" and any(map(varies, (fusion.density, *fusion.densities.values()))):
            what = "is `global`, and a density that differs over layers is of each tensor"
            found.append(Problem("fusion.trim", what, "set fusion.trim: tensor, or give one number a model"))
        return found or self._of_tensors(of_method, tasks)

    def _of_tensors(self, of_method: Problems, tasks: Sequence[str]) -> list[Problem]:
        if not self.vary:
            return of_method(self._config, tasks)
        seen: set[str] = set()
        for name in self._names:
            made = self.at(name)
            key = repr(settings_of(made))
            if key not in seen and (found := of_method(made, tasks)):
                return [Problem(f"{one.where} at {name}", one.what, one.remedy) for one in found]
            seen.add(key)
        return []


# The share of a tensor's elements that is wanted, by the config as it is at that tensor, and the task.
Share = Callable[[FusionConfig, str], float]


@dataclass(frozen=True)
class Largest:
    """Elements that a method needs masks of: of each model those that lie furthest from the origin, once a share."""

    origin: Checkpoint
    models: Mapping[str, Checkpoint]
    shares: Sequence[Share]


def write_trimmed(
    wanted: Largest, config: FusionConfig, folders: Sequence[Path], streaming: Streaming, first: int = 0
) -> None:
    """Fill empty folders, one a share, with the masks of the elements that are wanted, found as core regions are: in
    one pass where every task and tensor has the same shares, which differ."""
    regions = RegionsConfig(scope=config.trim)
    if not config.densities and not varies(config.density):
        by_share = {share(config, ""): folder for share, folder in zip(wanted.shares, folders, strict=True)}
        if len(by_share) == len(folders):
            write_regions(wanted.origin, wanted.models, regions, by_share, streaming)
            return
    settings = Settings(config, list(wanted.origin.tensors), first)

    def shares(task: str, name: str) -> list[float]:
        made = settings.at(name)
        return [share(made, task) for share in wanted.shares]

    write_shares(wanted.origin, wanted.models, regions, shares, folders, streaming)


# ---- in words --------------------------------------------------------------------------------------------------------


def _said(field: str, by_task: str) -> Callable[[FusionConfig], str]:
    def said(config: FusionConfig) -> str:
        own = (f", {task} {shown_setting(value)}" for task, value in getattr(config, by_task).items())
        return f"{field} {shown_setting(getattr(config, field))}{''.join(own)}"

    return said


# How a field is said; one that is not here goes without saying.
SAID: Mapping[str, Callable[[FusionConfig], str]] = {
    "weight": _said("weight", "weights"),
    "density": _said("density", "densities"),
    "normalize": lambda config: {None: "", True: "normalised", False: "not normalised"}[config.normalize],
    "scale": lambda config: "" if config.scale == 1 else f"λ {config.scale:g}",
    "t": lambda config: f"t = {shown_setting(config.t)}",
    "gamma": lambda config: f"γ {config.gamma:g}",
    "window": lambda config: f"window {config.window:g}",
    "threshold": lambda config: f"threshold {config.threshold:g}",
    "rescale": lambda config: f"rescaled by {config.rescale:g}, at most for {config.rescale_limit:g}",
    "selectivity": lambda config: f"selectivity {config.selectivity:g}",
    "agreement": lambda config: f"agreement {config.agreement}",
    "space": lambda config: f"of {config.space}",
    "epsilon": lambda config: f"LERP below {config.epsilon:g} rad",
}

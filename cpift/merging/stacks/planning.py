"""Before slices of layers are merged: everything that headers and config.json tell of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.layout import is_buffer, layout_of
from cpift.checkpoints.opening import folders_at_hand, open_merged
from cpift.config.run import RunConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.merging.registry import method_named
from cpift.merging.settings import Settings
from cpift.merging.stacks.inputs import StackInputs, stack_inputs
from cpift.pretrained.architecture import CONFIG, skeleton
from cpift.pretrained.plain import plain_class
from cpift.pretrained.tying import untied_config

_WHERE = "fusion.slices"


def open_stack(config: RunConfig) -> StackInputs | None:
    """The models of a stack; None where one of them has to be downloaded. Raises ProblemsError."""
    folders = folders_at_hand(config)
    return None if folders is None else stack_inputs(config.fusion, *open_merged(*folders, config.fusion))


def check_stack(config: RunConfig) -> list[Problem]:
    """Every problem of a stack whose models are at hand."""
    try:
        inputs = open_stack(config)
        if inputs is None:
            return []
        inputs.check()
        return [*_of_settings(inputs), *class_problems(inputs.backbone)]
    except ProblemsError as error:
        return list(error.problems)
    except (CpiftError, OSError) as error:
        return [Problem(_WHERE, str(error), "check the paths")]


def _of_settings(inputs: StackInputs) -> Iterator[Problem]:
    for part in inputs.parts:
        settings = Settings(part.config, part.inputs.pretrained.names, part.inputs.first_layer)
        for one in settings.problems(method_named(part.config.method).asked, list(part.inputs.tuned)):
            yield Problem(f"{_WHERE}.{part.number}: {one.where}", one.what, one.remedy)


def class_problems(stack: Checkpoint) -> list[Problem]:
    """Parameters that the class of the new config.json has otherwise than the layers that were put together."""
    config = untied_config(stack.config) if stack.is_apart and stack.ties else stack.config
    shapes = {info.name: info.shape for info in stack.tensors.values() if info.floating}
    plain = plain_class(json.dumps(config))
    if plain is not None:
        wrong = sorted(name for name in plain.own.keys() | shapes.keys() if plain.own.get(name) != shapes.get(name))
    else:
        with tempfile.TemporaryDirectory(prefix="cpift-config-") as folder:
            (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            network = skeleton(Path(folder))
        layout = layout_of(network, shapes)
        spare = [name for name in layout.unloaded if not is_buffer(network, name)]
        wrong = [*layout.missing, *(problem.where for problem in layout.misfits), *spare]
    what, remedy = "is not as the class of the model that is asked for has it", "take layers of models of one kind"
    return first_problems([Problem(f"{_WHERE}: {name}", what, remedy) for name in wrong], 8)


def stack_notes(config: RunConfig) -> Iterator[str]:
    """Layers and parameters of what comes out, and whose the tensors outside of layers are."""
    inputs = open_stack(config)
    if inputs is None:
        yield "Layers are counted when all models are downloaded"
        return
    slices, stack = config.fusion.slices, inputs.backbone
    yield f"Layers: {sum(one.layers for one in slices)}, of {'; '.join(one.described for one in slices)}"
    first, last = (" and ".join(source.model for source in one.sources) for one in (slices[0], slices[-1]))
    head = "as the embedding, which it is tied to" if stack.ties and not stack.is_apart else f"of {last}"
    yield f"Embedding of {first}, last norm of {last}, output layer {head}; {stack.numel:,} parameters"


def merged_numel(config: RunConfig) -> int | None:
    """Parameters of a merged model with other layers or tokens than θ0; None where a model has to be downloaded."""
    if config.fusion.slices:
        stack = open_stack(config)
        return None if stack is None else stack.backbone.numel
    folders = folders_at_hand(config)
    return None if folders is None else open_merged(*folders, config.fusion)[0].numel

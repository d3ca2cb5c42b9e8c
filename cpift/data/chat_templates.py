"""The chat template that a run writes its rows in: θ0's own, one of those here, a file or its text; with arguments.

Base models have none. What is chosen is in θ0's copy and in every output. All of these end a turn with the model's own
end-of-sequence token: no token has to be added, and every program stops where a reply ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.errors import CheckpointError, Problem
from cpift.text.redaction import is_template
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cpift.config.run import ModelConfig

_FIELD, _ARGUMENTS = "model.chat_template", "model.chat_template_kwargs"
_START = "{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
_NO_TOOLS = (
    "{% if tools or messages | selectattr('role', 'equalto', 'tool') | list or messages | selectattr('tool_calls', "
    "'defined') | list %}{{ raise_exception('it knows no tools: use the template of a model trained on them') }}"
    "{% endif %}"
)
# https://github.com/tatsu-lab/stanford_alpaca, with more turns as others write them.
_ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
    "{% endif %}{{ '\\n\\n' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif not loop.first %}{{ raise_exception('its system message comes first') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


def _turns(before: str, after: str, end: str) -> str:
    """Turns that begin with their role between two marks."""
    turn = f"{{{{ '{before}' + message['role'] + '{after}' + message['content'] + eos_token + '{end}' }}}}"
    prompt = f"{{{{ '{before}assistant{after}' }}}}"
    return f"{{% for message in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


TEMPLATES: dict[str, str] = {
    "chatml": _NO_TOOLS + _START + _turns("<|im_start|>", "\\n", "\\n"),
    "llama3": _NO_TOOLS + _START + _turns("<|start_header_id|>", "<|end_header_id|>\\n\\n", ""),
    "alpaca": _NO_TOOLS + _START + _ALPACA,
}
# Tokens by which a base model was prepared for one of them; the first that it has decides what `cpift init` proposes.
_PREPARED = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}


def proposed(vocabulary: Mapping[str, Any]) -> str:
    """The template for a model without one, by its tokens; alpaca is of plain words."""
    return next((name for token, name in _PREPARED.items() if token in vocabulary), "alpaca")


def chosen_text(model: ModelConfig) -> str | None:
    """The template that the config names or holds, None where it does neither.

    Raises CheckpointError where it cannot be read.
    """
    name = model.chat_template
    if name is None or name in TEMPLATES:
        return TEMPLATES[name] if name else None
    if is_template(name):
        return name
    try:
        return read_bytes(Path(name), MODEL_CONFIG.size).decode("utf-8")
    except UnreadableError as error:
        raise CheckpointError("model", [error.problem(_FIELD)]) from None
    except UnicodeDecodeError as error:
        raise CheckpointError("model", [Problem(_FIELD, f"{name} is no UTF-8: {error}", "save it as UTF-8")]) from None
    except OSError as error:
        what = f"{name!r} is none of {', '.join(TEMPLATES)}, and no file ({error.strerror})"
        remedy = "name one of them, or a file in jinja, or give its text"
        raise CheckpointError("model", [Problem(_FIELD, what, remedy)]) from None


def check_template(model: ModelConfig) -> list[Problem]:
    """What is wrong with the config's template, as far as its text tells."""
    try:
        chosen_text(model)
    except CheckpointError as error:
        return list(error.problems)
    return []


def decided_by(model: ModelConfig) -> Iterator[str]:
    """What of the config decides the template, as lines; nothing where θ0's own is used as it is."""
    if (text := chosen_text(model)) is not None:
        yield f"chat_template {json.dumps(text)}"
    if model.chat_template_kwargs:
        yield f"chat_template_kwargs {json.dumps(model.chat_template_kwargs, sort_keys=True)}"


def prepare(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Give a tokenizer the template that the config says. Raises CheckpointError."""
    text = chosen_text(model)
    own: Any = tokenizer.chat_template if text is None else text
    if isinstance(own, dict) and model.chat_template_kwargs:
        what = f"θ0 has several chat templates ({', '.join(own)})"
        raise CheckpointError(
            "model", [Problem(_ARGUMENTS, what, "give the right one as a file in model.chat_template")]
        )
    if isinstance(own, str):
        tokenizer.chat_template = with_arguments(own, model.chat_template_kwargs)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A template in which these variables have a value where nobody gives another.

    Raises CheckpointError for one that it does not ask for.
    """
    for name in arguments:
        if not re.search(rf"\b{name}\b", template):
            what = f"the chat template does not ask for {name!r}"
            raise CheckpointError("model", [Problem(_ARGUMENTS, what, "take it out, or check its spelling")])
    lines = (
        f"{{%- set {name} = {name} if {name} is defined else {json.dumps(value, ensure_ascii=False)} %}}"
        for name, value in arguments.items()
    )
    apart = "{{ '' }}" if arguments and template.startswith("\n") else ""  # jinja drops a line break after a block
    return "".join(lines) + apart + template

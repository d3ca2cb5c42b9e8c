"""Scores of open-ended replies by a judge: a language model behind an OpenAI-compatible endpoint (metric `judge`).

The judge reads the conversation, the reference reply and the model's reply, and ends with a rating from 0 to 10, as in
the paper; a score is rating ÷ 10. Only the standard library is used: any server with POST …/chat/completions will do.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cpift.config.tasks import JudgeConfig
from cpift.errors import StageError
from cpift.rows.examples import Example
from cpift.untrusted.json import ANSWER, parse_json

_RATING = re.compile(r"rating\W*(\d+(?:\.\d+)?)", re.IGNORECASE)
_LATER = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP answers after which the same question may be asked again
_INSTRUCTION = (
    "You judge the reply of an assistant. Consider whether it is correct, complete, helpful and clear; its length is "
    "no merit. The reference shows one good reply, others may be as good. Give one sentence of reasons, then a last "
    'line "Rating: N" with N from 0 (useless) to 10 (excellent).'
)


@dataclass(frozen=True)
class Verdict:
    """score: 0..1; reply: what the judge wrote."""

    score: float
    reply: str


def judge_replies(
    settings: JudgeConfig, examples: Sequence[Example], replies: Sequence[str], on_done: Callable[[int], None]
) -> list[Verdict]:
    """The judge's verdict on each reply, `settings.parallel` questions at a time.

    Raises:
        StageError: the endpoint cannot be reached, refuses, or gives no rating, after `settings.retries` more tries.
    """
    verdicts = []
    with ThreadPoolExecutor(settings.parallel) as pool:
        for verdict in pool.map(lambda pair: _judge(settings, *pair), zip(examples, replies, strict=True)):
            verdicts.append(verdict)
            on_done(len(verdicts))
    return verdicts


def _judge(settings: JudgeConfig, example: Example, reply: str) -> Verdict:
    question = {
        "model": settings.model,
        "temperature": 0,
        "max_tokens": settings.max_tokens,
        "messages": [
            {"role": "system", "content": settings.instruction or _INSTRUCTION},
            {"role": "user", "content": question_about(example, reply)},
        ],
    }
    failure = ""
    for attempt in range(settings.retries + 1):
        if attempt:
            time.sleep(min(settings.wait * 2 ** (attempt - 1), 60))
        text, failure = _ask(settings, question)
        if text is not None:
            rating = rating_in(text)
            if rating is not None:
                return Verdict(rating / 10, text)
            failure = f"no line 'Rating: N' with N from 0 to 10 in its reply {text[-200:]!r}"
    raise StageError(
        f"judge {settings.model} at {settings.url}: {failure}; models scored before keep their scores, run again"
    )


def question_about(example: Example, reply: str) -> str:
    """What the judge is shown."""
    turns = "\n\n".join(f"[{message.role}]\n{message.content}" for message in example.prompt)
    return f"{turns}\n\n[reference reply]\n{example.reply}\n\n[reply to judge]\n{reply}"


def rating_in(text: str) -> float | None:
    """The last rating in a judge's reply; None where there is none from 0 to 10."""
    ratings = _RATING.findall(text)
    value = float(ratings[-1]) if ratings else -1.0
    return value if 0 <= value <= 10 else None


def _ask(settings: JudgeConfig, question: dict[str, Any]) -> tuple[str | None, str]:
    """The reply's text, or None and why. Raises StageError where asking again is of no use."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(settings.key_variable)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    url = f"{settings.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(question).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=settings.timeout) as answer:
            body = parse_json(answer.read(ANSWER.size + 1), ANSWER)
            return str(body["choices"][0]["message"]["content"]), ""
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        if error.code not in _LATER:
            hint = f"; is {settings.key_variable} set?" if error.code in (401, 403) else ""
            raise StageError(f"judge {settings.model} at {url}: {said}{hint}") from None
        return None, said
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"

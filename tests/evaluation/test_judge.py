"""The judge against a stand-in server in this process: what it is asked, what is read, what is tried again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cpift.config.tasks import JudgeConfig
from cpift.errors import StageError
from cpift.evaluation.judge import judge_replies, question_about, rating_in
from cpift.rows.examples import Example, Message

EXAMPLE = Example((Message("system", "Be brief."), Message("user", "Name a fruit."), Message("assistant", "Apple.")))


class _Stand(ThreadingHTTPServer):
    """Answers each question with the next of `answers`: a status and a text."""

    answers: list[tuple[int, str]]
    asked: list[tuple[str, dict[str, Any], str | None]]


class _Handler(BaseHTTPRequestHandler):
    server: _Stand

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, question, self.headers["Authorization"]))
        status, text = self.server.answers.pop(0)
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode() if status == 200 else text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand() -> Iterator[_Stand]:
    server = _Stand(("127.0.0.1", 0), _Handler)
    server.answers, server.asked = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def settings(stand: _Stand, **changes: Any) -> JudgeConfig:
    url = f"http://127.0.0.1:{stand.server_address[1]}/v1/"
    return JudgeConfig(**{"url": url, "model": "umpire", "wait": 0, "key_variable": "JUDGE_KEY", **changes})


def test_scores_follow_the_replies(stand: _Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    stand.answers = [(200, "Fine.\nRating: 7"), (200, "Wrong.\n**Rating:** 0"), (200, "Rating: 3, no.\nRating: 9.5")]
    progress: list[int] = []
    found = judge_replies(settings(stand, parallel=1), [EXAMPLE] * 3, ["Pear.", "Brick.", "Fig."], progress.append)
    assert [one.score for one in found] == [0.7, 0.0, 0.95]
    assert progress == [1, 2, 3]
    path, question, key = stand.asked[1]
    assert (path, question["model"], question["temperature"], key) == (
        "/v1/chat/completions",
        "umpire",
        0,
        "Bearer secret",
    )
    assert question["messages"][1]["content"] == question_about(EXAMPLE, "Brick.")


def test_the_judge_sees_the_conversation_the_reference_and_the_reply() -> None:
    shown = question_about(EXAMPLE, "Pear.")
    assert [shown.index(part) for part in ("Be brief.", "Name a fruit.", "Apple.", "Pear.")] == sorted(
        shown.index(part) for part in ("Be brief.", "Name a fruit.", "Apple.", "Pear.")
    )


def test_a_busy_server_and_an_answer_without_a_rating_are_asked_again(stand: _Stand) -> None:
    stand.answers = [(503, "busy"), (200, "I cannot say."), (200, "Rating: 11"), (200, "Rating: 4")]
    (found,) = judge_replies(settings(stand, retries=3), [EXAMPLE], ["Pear."], lambda _: None)
    assert (found.score, len(stand.asked)) == (0.4, 4)
    assert stand.asked[0][2] is None  # no key, no header


def test_what_asking_again_cannot_mend_fails_at_once(stand: _Stand) -> None:
    stand.answers = [(401, "no such key")]
    with pytest.raises(StageError, match=r"HTTP 401: no such key; is JUDGE_KEY set\?"):
        judge_replies(settings(stand), [EXAMPLE], ["Pear."], lambda _: None)
    assert len(stand.asked) == 1


def test_retries_end(stand: _Stand) -> None:
    stand.answers = [(200, "Hm.")] * 2
    with pytest.raises(StageError, match=r"umpire at .* no line 'Rating: N'"):
        judge_replies(settings(stand, retries=1), [EXAMPLE], ["Pear."], lambda _: None)


def test_an_endpoint_that_is_not_there_is_named() -> None:
    nowhere = JudgeConfig(url="http://127.0.0.1:9/v1", model="umpire", retries=0)
    with pytest.raises(StageError, match=r"umpire at http://127\.0\.0\.1:9/v1: .*refused"):
        judge_replies(nowhere, [EXAMPLE], ["Pear."], lambda _: None)


@pytest.mark.parametrize(
    ("text", "rating"), [("Rating: 0", 0.0), ("rating - 10", 10.0), ("Rating: 10.5", None), ("eight", None)]
)
def test_ratings(text: str, rating: float | None) -> None:
    assert rating_in(text) == rating

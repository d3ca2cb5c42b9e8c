"""Passwords and keys: refused where they stand in a config, and in nothing that is shown or written."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpift.cli.main import main
from cpift.cluster.submit import package
from cpift.config.loading import dump_fields, load_config
from cpift.console.terminal import Terminal, say
from cpift.errors import ConfigError, CpiftError, Problem, StageError
from cpift.text.redaction import holds_secret, is_prose, is_secret_variable, is_variable, redacted
from cpift.training.tracking import log_file

HUSH = "hu5h"  # part of every secret here
SECRETS = [
    f"https://name:{HUSH}@host/v1",
    f"https://{HUSH}@host/v1",
    f"HTTPS://Name:{HUSH}@HOST",
    f"http://name:p/{HUSH}@host:8000/v1",
    f"http://name:p@{HUSH}@host/v1",
    f"http://name:p?{HUSH}@host",
    f"http:/name:{HUSH}@host",
    f"http:///name:{HUSH}@host",
    f"http:\\\\name:{HUSH}@host",
    f"//name:{HUSH}@host/v1",
    f"http%3A%2F%2Fname%3A{HUSH}%40host",
    f"http://name:{HUSH}%40host/x%2540y@host",
    f"http%253A%252F%252Fname%253A{HUSH}%2540host",
    f"http://name:{HUSH}＠host/v1",
    f"s3://id:{HUSH}@bucket/x",
    f"s3://bucket/x?access_key=id&secret_key={HUSH}",
    f"http://host/v1?api_key={HUSH}",
    f"http://host/v1?API-KEY={HUSH}",
    f"http://host/v1?apikey={HUSH}&x=1",
    f"http://host/v1?x=1&access_token={HUSH}",
    f"http://host/v1?x=1&accessToken={HUSH}",
    f"http://host/v1#token={HUSH}",
    f"http://host/v1?a=b;password={HUSH}",
    f"http://host/v1?%61pi_key={HUSH}",
    f"https://b.s3.aws/x?X-Amz-Signature={HUSH}",
    f"https://b.s3.aws/x?X-Amz-Security-Token={HUSH}",
    f"https://b.blob/x?sv=1&sig={HUSH}",
    f"https://b/x?AWSAccessKeyId={HUSH}",
    f"sk-proj-{HUSH}0123456789abcdef",
    f"hf_{HUSH}0123456789abcdefgh",
    f"ghp_{HUSH}0123456789abcdefgh",
    f"github_pat_{HUSH}0123456789abcdefgh",
    f"xoxb-1234567890-{HUSH}",
    f"Bearer {HUSH}0123456789",
    *(f"https://name:p{sign}{HUSH}@host/v1" for sign in "'\"<>`"),
    f"http://host/v1?user[password]={HUSH}",
    f"http://host/v1?[token]={HUSH}",
    f"Basic {HUSH}dXNlcjpwYXNzd29yZA==",
    f"http&#58;//name:{HUSH}@host",
    f"http:\\u002f\\u002fname:{HUSH}\\x40host",
    f"http%2525253A%2525252F%2525252Fname%2525253A{HUSH}%25252540host",
    f"eyJhbGciOiJub25lIn0.eyJzdWIiOiI{HUSH}In0.",
    f"https://hooks.slack.com/services/T00000000/B00000000/{HUSH}0123456789abcdefghij",
    f"https://api.telegram.org/bot123456789:{HUSH}0123456789abcdefghijABCDEFGHIJ0/x",
    *(
        f"{start}{HUSH}0123456789abcdefghij"
        for start in ("gsk_", "xai-", "nvapi-", "r8_", "pk_live_", "whsec_", "hvs.", "ATATT3x", "dckr_pat_", "glptt-")
    ),
    *(
        f"{start}{HUSH}0123456789abcdefghij"
        for start in ("ya29.", "GOCSPX-", "shpat_", "pypi-", "xapp-", "SG.", "dop_v1_")
    ),
    f"-----BEGIN RSA PRIVATE KEY-----\nMII{HUSH}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\nMII{HUSH}",
]
PAIRS = [  # no prose
    f"user=u password={HUSH} host=h",
    f"AccountName=x;AccountKey={HUSH}abcdefgh==;x=y",
    f"api-key: {HUSH}0123456789",
    f"aws_secret_access_key = {HUSH}/abc+def",
]
PLAIN = [
    *("http://localhost:8000/v1", "http://host:8000/v1/@x", "https://host/path@v1", "http://host:80?next=a@b"),
    *("s3://bucket/folder?region=a&endpoint_override=localhost:9000", "s3://bucket/x@y", "org/name", "org/name@main"),
    *("mail me@host", "/data/a@b/c", "//server/share", "C:\\Users\\me@x", "file:///tmp/x@y", "50 % of @all"),
    *("https://host/v1?key_of=", "http://host/?monk=1&author=x", "sk-learn-linear-model", "risk-averse-models-x1"),
    *("bearer certificates", "the tokens=3", "a:b", "key", "secret", "https://host/tokens/secret", "%40", "100%"),
    *("org/sk-large-model-v1-instruct-2024", "xai-org/grok-1", "r8_quantised", "basic usage", "Basic training of 12"),
    *("tokens: 3", "max_tokens=300", "compass=3", "author: x", "secret keys", "a &amp; b", "C:\\x41"),
]
FIELDS = [
    *(
        "evaluation.judge.url",
        "evaluation.judge.model",
        "evaluation.judge.instruction",
        "evaluation.judge.key_variable",
    ),
    *("resources.storage", "resources.address", "output", "name", "model.revision", "backbone.source"),
    *("tasks.0.train.columns.prompt", "tasks.0.train.split", "tasks.0.name", "unknown.field"),
]


def config(folder: Path, field: str = "", value: object = None) -> Path:
    source = {"procedural": "addition", "size": 8}
    raw: dict[str, Any] = {"name": "t", "model": {"scratch": {}}, "output": "/tmp/x", "probe": {"steps": 2}}
    raw["tasks"] = [{"name": "a", "train": dict(source), "test": dict(source)}]
    raw["evaluation"] = {"judge": {"url": "http://host", "model": "m"}}
    node: Any = raw
    *parents, last = field.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last or "name"] = value or "t"
    (folder / "run.yaml").write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    return folder / "run.yaml"


@pytest.mark.parametrize("text", [*SECRETS, *PAIRS])
def test_every_spelling_is_seen_and_taken_out(text: str) -> None:
    assert holds_secret(text)
    for around in (text, f"tried '{text}', failed", f'{{"url": "{text}"}}', f"url={text}\nmore"):
        shown = redacted(around)
        assert HUSH not in shown
        assert "***" in shown
        assert redacted(shown) == shown
        assert HUSH not in str(Problem("x", around)) + str(CpiftError(around)) + str(ConfigError(around, []))
        assert HUSH not in dump_fields({"a": [{"b": around}], around: 1})


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert not holds_secret(text)
    assert redacted(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_secrets_in_a_config_are_refused_and_not_repeated(field: str, tmp_path: Path) -> None:
    secrets = [*SECRETS, *(() if is_prose(field) else PAIRS)]
    for text in secrets[FIELDS.index(field) % 4 :: 4]:  # fields share them out
        with pytest.raises(ConfigError) as caught:
            load_config(config(tmp_path, field, text))
        said = str(caught.value)
        assert f"{field}: holds a password or a key" in said, text
        assert "in the environment" in said
        assert HUSH not in said, text
        with pytest.raises(ConfigError) as caught:
            load_config(config(tmp_path), [f"{field}={yaml.safe_dump(text)}"])
        assert HUSH not in str(caught.value), text


@pytest.mark.parametrize("field", ["model.path", "tasks.0.train.file", "backbone.source", "seed", "name"])
def test_no_other_problem_of_a_field_repeats_its_secret(field: str, tmp_path: Path) -> None:
    """A password that only a field by itself shows to be one: with spaces, or without a scheme."""
    for text in (f"https://name:p {HUSH}@host/v1", f"name:{HUSH}@host", f"ftp:u:{HUSH}@h"):
        with pytest.raises(ConfigError, match=f"{field}: holds a password") as caught:
            load_config(config(tmp_path, field, text))
        assert HUSH not in str(caught.value)


def test_what_is_said_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"the cluster at ray://u:{HUSH}@h:10001 has none")
    Terminal().print(f"stop it at http://u:{HUSH}@h:8265")
    assert HUSH not in capsys.readouterr().out


@pytest.mark.parametrize("text", [f"name:{HUSH}@host/v1", f"name:{HUSH}%40host"])
def test_logins_without_a_scheme_are_refused_in_addresses(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url: holds a password"):
        load_config(config(tmp_path, "evaluation.judge.url", text))
    assert load_config(config(tmp_path, "evaluation.judge.instruction", text)).evaluation.judge is not None


def test_a_key_is_no_name_of_a_variable(tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "MY_KEY2", "_X", "KEY", "X1"):
        assert is_variable(name)
    for key in (
        f"{HUSH}",
        "hunter2",
        "AKIAIOSFODNN7EXAMPLE",
        "DEADBEEF00112233445566778899",
        "a b",
        "",
        "1X",
        "X" * 65,
        "k-1",
    ):
        assert not is_variable(key)
    for key in (HUSH, f"{HUSH}0123456789", f"{HUSH} x"):
        with pytest.raises(ConfigError, match="key_variable is no name") as caught:
            load_config(config(tmp_path, "evaluation.judge.key_variable", key))
        assert HUSH not in str(caught.value)


def test_jobs_and_workers_are_told_no_secrets(tmp_path: Path) -> None:
    for number, overrides in enumerate(
        ([f"evaluation.judge.url=http://a:{HUSH}@h"], [f"name=hf_{HUSH}0123456789abcdefgh"])
    ):
        with pytest.raises(ConfigError, match=r"--set\.0: holds a password") as caught:
            package(config(tmp_path), overrides, "/shared/x", tmp_path / str(number), wheel=False)
        assert HUSH not in str(caught.value)
    for name in (
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "X_AUTH",
    ):
        assert is_secret_variable(name, "x")
    assert is_secret_variable("MLFLOW_TRACKING_URI", f"https://a:{HUSH}@host")
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "WANDB_MODE", "MLFLOW_EXPERIMENT_NAME"):
        assert not is_secret_variable(name, "https://host/x")


def test_logs_and_messages_hold_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with log_file(tmp_path / "log"):
            for text in SECRETS:
                logging.getLogger("cpift").info("asked %s", text)
            logging.getLogger("other").error("AWS_SECRET_ACCESS_KEY=%s Authorization: Basic %s", HUSH, HUSH)
            raise ValueError(f"no answer of {SECRETS[0]}")

    with pytest.raises(ValueError, match="no answer"):
        fail()
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert HUSH not in log

    def raises(*args: object, **rest: object) -> None:
        raise StageError(f"judge at {SECRETS[0]} failed")

    monkeypatch.setattr("cpift.pipeline.preflight.examined", raises)
    monkeypatch.setattr(sys, "argv", ["cpift", "plan", str(config(tmp_path))])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "judge at https://***@host/v1 failed" in said


@pytest.mark.slow
def test_long_texts_are_searched_in_time() -> None:
    for text in (
        "a" * 200_000,
        "a:" * 100_000,
        "//" * 100_000,
        "%61" * 70_000,
        "@" * 200_000,
        "&key" * 50_000,
        "a-" * 100_000,
    ):
        assert redacted(text) == text

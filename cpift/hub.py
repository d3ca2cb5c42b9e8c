"""The Hugging Face hub: which commit a branch or tag means today, what is downloaded, what is sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cpift.errors import CpiftError, named_line

Listed = Callable[[Path], set[str]]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What of a repository is downloaded: weights as safetensors, configuration, tokenizer. No code, no pickles.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_STATUS = re.compile(r"\d{3} (Client|Server) Error")
_LONGEST = 400  # characters of the hub's own words
_ACCESS = "ask for access on its page, and log in (hf auth login) or set HF_TOKEN to a token of an account that has it"
_REMEDIES = {401: _ACCESS, 403: _ACCESS, 404: "check the name and `revision`; private ones need HF_TOKEN", 429: "wait"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for ever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


class HubError(CpiftError):
    """The hub, or the repository on it, cannot be reached."""


def resolve_revision(kind: Literal["model", "dataset"], repository: str, revision: str | None) -> str:
    """The full commit hash of a hub repository's branch or tag (default: its main branch).

    A commit hash is returned as it is, without any request; pinning one makes a run exact and lets it start offline.
    Without a connection, a model that was downloaded before answers with the commit in the local cache.

    Raises:
        HubError: the repository or revision does not exist, or the hub does not answer and nothing is cached.
    """
    if revision is not None and is_commit(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=20)
    except (HfHubHTTPError, HFValidationError) as error:
        raise HubError(f"hub: {kind} {repository!r} at revision {revision!r}: {_said(error)}") from error
    except Exception as error:  # offline, or whatever the client and the layers of its network raise
        cached = _cached_commit(kind, repository, revision)
        if cached is None:
            raise HubError(
                f"hub: no answer for {kind} {repository!r} ({named_line(error)}) and no copy in the local cache → "
                "check the connection, or pin `revision` to a full commit hash that was downloaded before"
            ) from error
        return cached
    if info.sha is None:
        raise HubError(f"hub: {kind} {repository!r} has no commit → pin `revision` to one")
    return info.sha


def download(repository: str, revision: str | None) -> Path:
    """A model repository's folder in the local cache, fetched if need be: the files of HUB_PATTERNS.

    Raises:
        HubError: see `resolve_revision`; or the download fails.
    """
    from huggingface_hub import snapshot_download

    commit = resolve_revision("model", repository, revision)
    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # as above
        raise HubError(f"hub: model {repository!r} at {commit}: {_said(error)}") from error


def fetch_small_files(repository: str, commit: str) -> Path:
    """As `download`, of a commit and without the weights."""
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in HUB_PATTERNS if pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns))
    except Exception as error:  # as above
        raise HubError(f"hub: model {repository!r} at {commit}: {_said(error)}") from error


def cached_folder(repository: str, revision: str | None) -> Path | None:
    """`snapshot`, if all that a tokenizer needs is there."""
    folder = snapshot(repository, revision)
    needed = ("tokenizer_config.json", "config.json")
    return folder if folder is not None and all((folder / name).is_file() for name in needed) else None


def snapshot(repository: str, revision: str | None) -> Path | None:
    """A model repository's folder in the local cache, with whatever has been downloaded of it; asks nobody."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    commit = revision if is_commit(revision) else _cached_commit("model", repository, revision)
    if commit is None:
        return None
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots" / commit
    return folder if folder.is_dir() else None


def upload(
    repository: str, files: Mapping[str, Path | str], private: bool, ours: str, listed: Listed, message: str
) -> str:
    """Send files (paths, or texts) to a model repository as one commit; the commit's address.

    A repository that is not there is made, private or not. One that holds files has to hold the file `ours`, of which
    `listed` makes the names of all that was sent before: these are replaced, or leave it where they are not sent any
    more; what others put there stays.

    Raises:
        HubError: the hub refuses; the repository holds what others put there under a name that is sent, or nothing of
            ours; or it is public and `private` is set.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        held = _held(api, repository, private)
        before = _sent_before(api, repository, held, ours, listed) if held else set()
        if strange := sorted((held or set()) & set(files) - before):
            what = f"holds {', '.join(strange)}, which cpift did not put there"
            raise HubError(f"hub: {repository!r} {what} → give another name, or remove them there")
        if held is None:
            api.create_repo(repository, private=private)
        operations: list[Any] = [CommitOperationDelete(name) for name in sorted(before & (held or set()) - set(files))]
        for name, content in files.items():
            operations.append(CommitOperationAdd(name, content.encode() if isinstance(content, str) else content))
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except HubError:
        raise
    except Exception as error:  # whatever the client and the layers of its network raise
        raise HubError(f"hub: model {repository!r}: {_said(error)}") from error


def _sent_before(api: Any, repository: str, held: set[str], ours: str, listed: Listed) -> set[str]:
    if ours not in held:
        raise HubError(f"hub: {repository!r} holds files that cpift did not put there → give another name")
    return listed(Path(api.hf_hub_download(repository, ours)))


def _held(api: Any, repository: str, private: bool) -> set[str] | None:
    """The names of the files that a repository holds; None where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            raise
        return None
    if private and not info.private:
        raise HubError(f"hub: {repository!r} is public → give another name, or --public if it is meant to be")
    return {file.rfilename for file in info.siblings or ()} - {".gitattributes"}


def _cached_commit(kind: Literal["model", "dataset"], repository: str, revision: str | None) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type=kind)
    try:
        with open(f"{HF_HUB_CACHE}/{folder}/refs/{revision or 'main'}", encoding="utf-8") as ref:
            return ref.read().strip()
    except FileNotFoundError:
        return None


def _said(error: BaseException) -> str:
    """What the hub answered, in its own words, and what to do; for an error without an answer its first line."""
    response = getattr(error, "response", None)
    if response is None:
        return named_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not _STATUS.match(line)]
    own = getattr(error, "server_message", None) or " ".join(lines) or "no details"
    words = " ".join("".join(sign if sign.isprintable() else " " for sign in own).split())
    status = int(response.status_code)
    remedy = _REMEDIES.get(status, "try again later" if status >= 500 else "check the name and `revision`")
    return f"{status}: {words[:_LONGEST]} → {remedy}"

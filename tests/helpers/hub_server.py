"""A stand-in for the Hugging Face hub: repositories in memory, private or not, and commits to them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)


@contextmanager
def hub() -> Iterator[Hub]:
    """The stand-in at an address of this machine, as long as the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Silent."""

        def _answer(self, status: int, value: Any, **headers: str) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, content in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, content)
            self.end_headers()
            self.wfile.write(body)

        def _known(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self._answer(401, {"error": "Invalid username or password."}, **{"X-Error-Message": "Invalid token."})
            return False

        def do_HEAD(self) -> None:
            self._file(body=False)

        def _file(self, body: bool) -> None:
            """One file of a repository, from /OWNER/NAME/resolve/REVISION/FILE."""
            if not self._known():
                return
            _, owner, name, *_, file = self.path.split("?")[0].split("/")
            files = served.repositories[f"{owner}/{name}"].files
            self.send_response(200)
            self.send_header("X-Repo-Commit", hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest())
            self.send_header("ETag", f'"{hashlib.sha256(files[file]).hexdigest()}"')
            self.send_header("Content-Length", str(len(files[file])))
            self.end_headers()
            if body:
                self.wfile.write(files[file])

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                self._file(body=True)
                return
            name = "/".join(self.path.split("?")[0].split("/")[3:5])
            if not self._known():
                return
            repository = served.repositories.get(name)
            if repository is None:
                self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
                return
            siblings = [{"rfilename": file} for file in repository.files]
            self._answer(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not self._known():
                return
            parts = self.path.split("?")[0].split("/")
            if parts[2:4] == ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                served.repositories[name] = Repository(asked.get("private") or asked.get("visibility") == "private")
                self._answer(200, {"url": f"{served.address}/{name}"})
            elif parts[2] == "validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif parts[5] == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                self._answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
            else:
                self._commit("/".join(parts[3:5]), body)

        def _commit(self, name: str, body: bytes) -> None:
            repository = served.repositories[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            self._answer(200, {"commitUrl": f"{served.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()

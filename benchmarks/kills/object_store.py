"""An S3-compatible object store on loopback: moto's server (pip install 'moto[server]'). It forgets all at its end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileType, S3FileSystem

BUCKET = "kills"


@dataclass(frozen=True)
class ObjectStore:
    """A server that runs, with one bucket."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What finds it, and what it takes for credentials."""
        secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return secrets | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def open(self) -> S3FileSystem:
        return S3FileSystem(
            access_key="key",
            secret_key="secret",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}",
            allow_bucket_creation=True,
        )

    def checkpoints(self) -> dict[str, int | None]:
        """Ray Train's checkpoints of any run in it by name, and the step of those whose state is there."""
        store = self.open()
        entries = store.get_file_info(FileSelector(BUCKET, recursive=True))
        folders = [entry.path for entry in entries if entry.type == FileType.Directory]
        complete = [path for path in folders if path.rpartition("/")[2].startswith("checkpoint_")]
        return {path.rpartition("/")[2]: _step(store, path) for path in sorted(complete)}


def _step(store: S3FileSystem, checkpoint: str) -> int | None:
    try:
        with store.open_input_stream(f"{checkpoint}/trainer_state.json") as file:
            return int(json.loads(file.read())["global_step"])
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, server)
        store = ObjectStore(port)
        store.open().create_dir(BUCKET)
        yield store
    finally:
        server.kill()
        server.wait()


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError("moto's server does not start: pip install 'moto[server]'")

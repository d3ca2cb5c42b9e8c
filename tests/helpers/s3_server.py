"""An S3-compatible server on loopback, for tests; needs moto (`pip install -e '.[dev]'`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

_REASON = "no S3-compatible server to test with: pip install -e '.[dev]' (moto)"


@contextmanager
def s3_bucket(name: str = "cpift") -> Iterator[str]:
    """Its URI. Meanwhile the environment leads every S3 client there, those of processes started within too."""
    server = pytest.importorskip("moto.server", reason=_REASON)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            import boto3  # moto needs it, so it is there

            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"
    finally:
        running.stop()


def objects(uri: str) -> dict[str, int]:
    """Size of every object below a URI by its key."""
    from pyarrow.fs import FileSelector, FileSystem

    store, path = FileSystem.from_uri(uri)
    infos = store.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    return {entry.path: entry.size for entry in infos if entry.is_file}

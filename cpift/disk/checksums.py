"""Checksums of large files that are read anyway: XXH3 (128 bit), four times as fast as a sha256.

They tell whether bytes are the same as before. Nobody can be kept by one from making other bytes of the same checksum
on purpose: what is to prove a file to somebody else has a sha256 (`files.file_sha256`).
"""

from __future__ import annotations

from pathlib import Path

from cpift.disk.files import file_identity

_BLOCK = 1 << 18  # bytes read at once, which stay in a processor's own cache until they are looked at


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes (hex); read once as long as the file stays as it is, whatever its names."""
    import xxhash

    known = file_identity(path)
    if known not in _CHECKSUMS:
        state, block = xxhash.xxh3_128(), bytearray(_BLOCK)
        with path.open("rb", buffering=0) as file, memoryview(block) as view:
            while count := file.readinto(block):
                state.update(view[:count])
        _CHECKSUMS[known] = state.hexdigest()
    return _CHECKSUMS[known]


def known_checksum(identity: tuple[int, ...]) -> str | None:
    """The checksum that a file of this identity was found to have, None if it was not read yet."""
    return _CHECKSUMS.get(identity)


_CHECKSUMS: dict[tuple[int, ...], str] = {}

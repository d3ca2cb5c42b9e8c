"""What is kept on the disk, and how it stays what it says.

`artifacts` (content-addressed outputs of stages), `artifact_state` (complete, dropped or damaged), `input_watch`
(inputs identified again), `top_files` (reports and configs that replace nobody's own), `files` (JSON and text that
no reader meets half-written), `locks`, `facts` (what need not be found out twice), `mapped` and `guarded` (memory
maps that survive a truncated file), `direct_io`, `read_back` (what was written, from the disk), `object_store`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from cpift.disk import Artifact, read_json
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = Artifact(Path(folder), "group", "", {}, {"tau": 0.1}, 1)
    ...     with made.build() as out:  # it gets its name when the block ends without an error
    ...         _ = (out / "groups.json").write_text("[]")
    ...     made.has_weights, read_json(made.path / "manifest.json")["fields"]
    (True, {'tau': 0.1})
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.disk.artifact_state import read_manifest as read_manifest
    from cpift.disk.artifact_state import state_of as state_of
    from cpift.disk.artifacts import Artifact as Artifact
    from cpift.disk.artifacts import claimed as claimed
    from cpift.disk.artifacts import require_sound as require_sound
    from cpift.disk.facts import remembered as remembered
    from cpift.disk.files import digest as digest
    from cpift.disk.files import file_sha256 as file_sha256
    from cpift.disk.files import link_or_copy as link_or_copy
    from cpift.disk.files import read_json as read_json
    from cpift.disk.files import write_json as write_json
    from cpift.disk.files import write_text as write_text
    from cpift.disk.guarded import guarded_reads as guarded_reads
    from cpift.disk.locks import exclusive as exclusive
else:
    __getattr__, __dir__ = handed_out(__name__)

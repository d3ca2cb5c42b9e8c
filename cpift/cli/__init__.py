"""The commands: words and options, and nothing else.

`main` has the stages, and collects all other commands. `init`, `plan`, `check`, `data`, `merge`, `compare` and `schema`
have a file each; `runs` has watch, runs and clean, `many` has sweep and submit, `change` has diff and
extract-lora, `standard` has standard and bench. `group` says how a command is found and how it ends, `options` what
several take.

    >>> from typer.main import get_command
    >>> from cpift.cli import app
    >>> "merge" in get_command(app).commands
    True
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.cli.group import Commands as Commands
    from cpift.cli.main import app as app
    from cpift.cli.main import process as process
    from cpift.cli.schema import schema_of as schema_of
else:
    __getattr__, __dir__ = handed_out(__name__)

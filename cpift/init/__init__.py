"""`cpift init`: looks at files, models and rows, and writes a YAML file that runs as it stands.

`files` (tasks and splits), `rows` (kinds, metrics, lengths), `model` (θ0), `run` (a run's file), `others` (merges,
sweeps, examples), `given_tests` (rows that a command is given to score on).

    >>> import tempfile
    >>> from pathlib import Path
    >>> from cpift.config.inputs import DataSource
    >>> from cpift.init import guess_metric, look_at
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = Path(folder) / "sums.csv"
    ...     _ = rows.write_text("question,answer\\n1+1?,2\\n2+2?,4\\n")
    ...     look = look_at(DataSource(file=rows))
    ...     look.title, guess_metric(look).metric
    ('CSV, read as prompt and completion ({question}, {answer})', 'number')
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.init.files import TaskFiles as TaskFiles
    from cpift.init.given_tests import GivenTest as GivenTest
    from cpift.init.model import BaseModel as BaseModel
    from cpift.init.model import base_model as base_model
    from cpift.init.others import example_files as example_files
    from cpift.init.others import examples as examples
    from cpift.init.others import merge_file as merge_file
    from cpift.init.others import sweep_file as sweep_file
    from cpift.init.rows import Guess as Guess
    from cpift.init.rows import Look as Look
    from cpift.init.rows import guess_metric as guess_metric
    from cpift.init.rows import look_at as look_at
    from cpift.init.run import Task as Task
    from cpift.init.run import written as written
else:
    __getattr__, __dir__ = handed_out(__name__)

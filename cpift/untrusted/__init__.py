"""Files that others wrote, read within limits on depth, size, digits and repetition.

`json` (JSON and JSON lines), `yaml` (data alone), `patterns` (regular expressions without backtracking), `values`
(what a value is called, and as a word of a command). Whatever is in them, `UnreadableError` comes out, with the place
and the remedy.

    >>> from cpift.untrusted import UnreadableError, parse_yaml
    >>> parse_yaml("regions: {p: 0.02}")
    {'regions': {'p': 0.02}}
    >>> try:
    ...     parse_yaml("when: 1:30")
    ... except UnreadableError as error:
    ...     print(error)
    '1:30' (line 1, column 7) would be read in base 60 or 8
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.untrusted.json import CONFIG as CONFIG
    from cpift.untrusted.json import MODEL_CONFIG as MODEL_CONFIG
    from cpift.untrusted.json import RECORD as RECORD
    from cpift.untrusted.json import ROW as ROW
    from cpift.untrusted.json import Limits as Limits
    from cpift.untrusted.json import UnreadableError as UnreadableError
    from cpift.untrusted.json import parse_json as parse_json
    from cpift.untrusted.json import read_object as read_object
    from cpift.untrusted.json import shown as shown
    from cpift.untrusted.yaml import parse_yaml as parse_yaml
    from cpift.untrusted.yaml import read_yaml_file as read_yaml_file
else:
    __getattr__, __dir__ = handed_out(__name__)

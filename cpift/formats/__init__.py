"""Files that hold tensors, as bytes: no network, no library's classes.

`safetensors` (header, views of a memory map, files written in any order), `gguf` (the head alone), `quantised`
(told and refused), `sizes` (what files state, compared with what they hold before anything of that size is built).

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> from cpift.formats import read_header
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": np.zeros((2, 3), np.float32)}, f"{folder}/model.safetensors")
    ...     [(one.name, one.shape, one.kind) for one in read_header(Path(folder) / "model.safetensors")]
    [('w', (2, 3), 'F32')]
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.formats.gguf import read_gguf as read_gguf
    from cpift.formats.safetensors import DTYPES as DTYPES
    from cpift.formats.safetensors import FileWriter as FileWriter
    from cpift.formats.safetensors import FormatError as FormatError
    from cpift.formats.safetensors import TensorInfo as TensorInfo
    from cpift.formats.safetensors import dtype_name as dtype_name
    from cpift.formats.safetensors import read_header as read_header
    from cpift.formats.sizes import folder_problems as folder_problems
else:
    __getattr__, __dir__ = handed_out(__name__)

"""Model folders and adapters as lazy tensors, written and read slice by slice.

`checkpoint` (a folder's tensors by name), `opening` (a path, a hub id or an adapter → one of these), `writing`
(shards), `slices` (a tensor in pieces; all tensors in runs), `layout`, `relaid` and `vocabulary` (a fine-tune under
θ0's names and rows), `lora`, `lora_config`, `lora_files`, `finite`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> from cpift.checkpoints import Checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": np.ones((2, 3), np.float32)}, f"{folder}/model.safetensors")
    ...     model = Checkpoint(Path(folder))
    ...     model.tensors["w"].shape, float(model.tensor("w").sum())
    ((2, 3), 6.0)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.checkpoints.checkpoint import Checkpoint as Checkpoint
    from cpift.checkpoints.finite import is_finite as is_finite
    from cpift.checkpoints.finite import require_finite as require_finite
    from cpift.checkpoints.layout import Layout as Layout
    from cpift.checkpoints.layout import checkpoint_layout as checkpoint_layout
    from cpift.checkpoints.opening import locate as locate
    from cpift.checkpoints.opening import model_files as model_files
    from cpift.checkpoints.opening import open_models as open_models
    from cpift.checkpoints.slices import pieces as pieces
    from cpift.checkpoints.slices import sweep as sweep
    from cpift.checkpoints.writing import Shard as Shard
else:
    __getattr__, __dir__ = handed_out(__name__)

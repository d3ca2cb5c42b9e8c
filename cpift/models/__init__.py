"""θ0 from wherever it comes (a folder, the hub, a GGUF file, random weights), as one folder of safetensors.

`sources` (one class for each, and θ0 made of it), `base` (what they have in common), `loading` (networks from files),
`checks` (what is wrong with its files, without reading weights), `tokenizer`, `scratch` (a small one).

    >>> from cpift.config.inputs import ModelConfig, ScratchModel
    >>> from cpift.models import source_of
    >>> source_of(ModelConfig(scratch=ScratchModel(hidden_size=16, layers=1))).parameters()
    11360
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.models.base import Source as Source
    from cpift.models.checks import check_checkpoint as check_checkpoint
    from cpift.models.loading import load_model as load_model
    from cpift.models.sources import check_model as check_model
    from cpift.models.sources import materialise as materialise
    from cpift.models.sources import model_fingerprint as model_fingerprint
    from cpift.models.sources import source_of as source_of
else:
    __getattr__, __dir__ = handed_out(__name__)

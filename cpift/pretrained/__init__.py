"""Other people's models as transformers knows them, without running their code.

`loading` is the only place that has transformers, peft, datasets or lm-eval load anything. `architecture` (the
class of a `config.json`), `plain`, `kinds`, `plain_tokenizer`, `release` (what is known of common classes and is not
asked of them), `conversion` (how transformers renames a file's tensors), `fields` (what each field of `config.json`
means), `attention` (which keep the examples of one row apart), `gguf`, `tying`, `tokenizer_files`, `sharded_state`.

    >>> from cpift.pretrained import untied_config
    >>> untied_config({"model_type": "llama", "tie_word_embeddings": True})
    {'model_type': 'llama', 'tie_word_embeddings': False}
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.pretrained.architecture import model_config as model_config
    from cpift.pretrained.architecture import skeleton as skeleton
    from cpift.pretrained.architecture import tied_names as tied_names
    from cpift.pretrained.architecture import untrainable as untrainable
    from cpift.pretrained.fields import computing_problems as computing_problems
    from cpift.pretrained.fields import setting_notes as setting_notes
    from cpift.pretrained.tokenizer_files import TEMPLATE as TEMPLATE
    from cpift.pretrained.tying import prefix_of as prefix_of
    from cpift.pretrained.tying import tied_in as tied_in
    from cpift.pretrained.tying import untied_config as untied_config
else:
    __getattr__, __dir__ = handed_out(__name__)

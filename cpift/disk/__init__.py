"""What is kept on the disk, and how it stays what it says.

`artifacts` (content-addressed outputs of stages), `artifact_state` (complete, dropped or damaged), `input_watch`
(inputs identified again), `top_files` (reports and configs that replace nobody's own), `files` (JSON and text that
no reader meets half-written), `locks`, `facts` (what need not be found out twice), `mapped` and `guarded` (memory
maps that survive a truncated file), `direct_io`, `object_store`.

    with artifact.build() as folder:
        ...  # everything is written here; the folder gets its name when the block ends without an error
"""

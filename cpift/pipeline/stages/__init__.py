"""The stages of a run, one file each: what names its output, its version, its work, and what a plan and the screen say.

A stage imports the ones before it, and `order` has them all. `names` is what outputs are named with, `step` a line of a
plan; `fits` is common to the three stages that train, `inputs` to the two that read every model.
"""

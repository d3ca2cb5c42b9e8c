"""Merging: beside mergekit on the same files, and two real adapters against what PEFT makes of them."""

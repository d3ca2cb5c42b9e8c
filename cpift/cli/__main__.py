"""`python -m cpift.cli`: the command, where it is not on the path."""

from cpift.cli.main import process

process()

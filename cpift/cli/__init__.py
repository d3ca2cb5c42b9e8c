"""The commands: words and options, and nothing else. `main` collects them; a file for each of the larger ones."""

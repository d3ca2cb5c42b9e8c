"""How a command is found and how it ends: signals in order, and what other tools call what is here."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from cpift.errors import CpiftError

_RUN, _MERGE = (
    "`cpift run CONFIG` makes every stage",
    "`cpift merge BASE MODEL... --out FOLDER`; as a file, `cpift init merge` and `cpift fuse`",
)
_MERGEKIT = "`cpift merge FILE OUT` reads mergekit's file as it is"
_SCORE = "`cpift evaluate CONFIG`, or `cpift evaluate MODEL... --test FILE`; on standard benchmarks `cpift standard`"
_INIT = "`cpift init DATA --model MODEL` writes a run's file; `cpift init --example quickstart` copies the demo"
_OTHER_WORDS = {
    **dict.fromkeys(("train", "sft", "finetune", "fine-tune", "all"), f"{_RUN}; `cpift probe` only the fine-tunes"),
    **dict.fromkeys(("mergekit-yaml", "mergekit-multi", "mergekit"), _MERGEKIT),
    **dict.fromkeys(("merge-lora", "export"), _MERGE),
    **dict.fromkeys(
        ("mergekit-extract-lora", "extract", "lora"), "`cpift extract-lora BASE TUNED --out FOLDER` makes an adapter"
    ),
    **dict.fromkeys(
        ("eval", "test", "score"),
        "`cpift evaluate CONFIG`, or `cpift evaluate MODEL... --test FILE`; on standard benchmarks `cpift standard`",
    ),
    **dict.fromkeys(("preprocess", "preview", "tokenize"), "`cpift data preview CONFIG`"),
    **dict.fromkeys(("validate", "dry-run", "lint"), "`cpift plan CONFIG` checks everything and touches nothing"),
    **dict.fromkeys(("verify", "fsck"), "`cpift check RUN` compares an output folder with what was recorded"),
    **dict.fromkeys(("select", "masks", "cores"), "`cpift regions CONFIG`"),
    **dict.fromkeys(("new", "create", "start", "setup", "quickstart", "configure"), _INIT),
    **dict.fromkeys(("upload", "publish", "share"), "`cpift push RUN --to ORG/NAME` sends a model to the hub"),
    "version": "`cpift --version`",
}


class Commands(TyperGroup):
    """Every command ends in order; within typer, which would make `Aborted!` of a signal."""

    def invoke(self, ctx: Any) -> Any:
        from cpift.console.ending import ended_in_order

        with ended_in_order():
            return super().invoke(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """With paragraphs of help as single lines, which the terminal's width breaks, not the source's."""
        asked = super().get_command(ctx, cmd_name)
        for command in (asked, *getattr(asked, "commands", {}).values()):
            if command is not None and command.help:
                command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
        return asked

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Other tools' words for what is here are told; typer suggests what is spelt alike."""
        if args and args[0] not in self.commands and (ours := _OTHER_WORDS.get(args[0])) is not None:
            raise CpiftError(f"there is no command {args[0]!r} → {ours}")
        return super().resolve_command(ctx, args)

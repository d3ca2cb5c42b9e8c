from __future__ import annotations

from pathlib import Path

from rich.style import Style
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.config.inputs import ScratchModel
from cpift.config.run import TrainingConfig
from cpift.data.preview import CUT, TRAINED, coloured, count
from cpift.models.scratch import make_scratch_tokenizer
from cpift.rows.examples import Example, Message

TOKENIZER = make_scratch_tokenizer(ScratchModel())
TURNS = Example(
    tuple(
        Message(role, text)
        for role, text in (
            ("system", "Be brief."),
            ("user", "hi"),
            ("assistant", "ho"),
            ("user", "more"),
            ("assistant", "yes"),
        )
    )
)


def test_every_assistant_turn_is_green_nothing_else_is_and_the_rest_is_there() -> None:
    text = coloured(TURNS, TOKENIZER, 500, marks=False)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED]
    assert green == ["ho<|end|>", "yes<|end|>"]
    for words in ("Be brief.", "hi", "more"):
        assert words in text.plain
    assert Style.parse(TRAINED).color is not None


def test_what_is_cut_off_is_red_and_marked_where_there_are_no_colours() -> None:
    marked = coloured(TURNS, TOKENIZER, len(TOKENIZER.encode("x")) + 40, marks=True)
    cut = [marked.plain[span.start : span.end] for span in marked.spans if span.style == CUT]
    assert len(cut) == 1
    assert cut[0].startswith("✂")
    assert "⟦ho<|end|>⟧" in marked.plain


def test_counts_are_those_of_training() -> None:
    examples = [TURNS, Example((Message("user", "h" * 60), Message("assistant", "ho")))]
    training = TrainingConfig(steps=1, max_length=40, packing=True)
    found = count(examples, TOKENIZER, training)
    assert (found.examples, found.left_out, found.cut, found.rows) == (2, 1, 2, 1)
    assert (found.tokens, found.fill) == (40, 1.0)
    assert 0 < found.trained < found.tokens


def test_the_command_shows_examples_and_counts(smoke_config: Path, tmp_path: Path) -> None:
    command = ["data", "preview", str(smoke_config), "--task", "spelling", "-n", "1", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--set", "probe.packing=true"])
    assert done.exit_code == 0, done.output
    assert "spelling, example 1" in done.output
    assert "⟦" in done.output
    assert "96" in done.output
    assert "% full" in done.output
    assert not (tmp_path / "out").exists()

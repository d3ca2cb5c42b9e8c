"""A card says what the rows show."""

from __future__ import annotations

import json
import math

import pytest

from cpift.scorecard import Scorecard, outcome
from cpift.scorecard.show import card_table
from tests.helpers.scores import scored


def test_a_card_says_what_the_rows_show_and_no_more() -> None:
    right, half, none = ([1.0] * 20, [1.0, 0.0] * 10, [0.0] * 20)
    scores = {
        "base": {"maths": scored("number", none), "code": scored("number", half)},
        "maths": {"maths": scored("number", right), "code": scored("number", none)},
        "code": {"maths": scored("number", none), "code": scored("number", [*right[:18], 0.0, 0.0])},
        "merged": {"maths": scored("number", [*right[:15], *none[:5]]), "code": scored("number", half[::-1])},
    }
    own = {"maths": "maths", "code": "code"}
    card = Scorecard("merged", dict.fromkeys(own, ""), scores, "base", own, (), "merged")
    kept = card.retention("merged")
    assert kept is not None
    assert kept.mean == pytest.approx((15 / 20 + 10 / 18) / 2)
    assert card.measured("maths", "maths").low == pytest.approx(0.05 ** (1 / 20))  # all alike, and yet not certain
    first, base, tuned = card.sentences()
    assert first.startswith("merged keeps 65.3 % ±")
    assert "better on maths (+75.0 [+" in base
    assert "no difference shown on code (+0.0 [-" in base
    assert "worse on maths (-25.0 [" in tuned
    assert card_table(card).row_count == 4
    word, figure = outcome(scores["merged"]["code"], scores["merged"]["code"])
    assert (word, figure[:14]) == ("no difference shown on", "+0.0 [-13.9, +")  # rows to come may differ


def test_a_model_that_computes_nan_is_named_and_its_summary_stays_json() -> None:
    right, broken = scored("number", [1.0] * 4), scored("number", [0.0] * 4) | {"loss": math.nan}
    card = Scorecard("scores", {"maths": ""}, {"good": {"maths": right}, "bad": {"maths": broken}})
    assert card.warnings() == ["bad computes NaN or Inf on maths: its weights hold some, or overflow."]
    summary = json.loads(json.dumps(card.summary(), allow_nan=False))
    assert summary["models"]["bad"]["scores"]["maths"]["loss"] is None

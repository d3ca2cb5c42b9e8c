"""How a run's models are scored. See `config.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cpift.config_identity import identity
from cpift.config_inputs import Precision, Section
from cpift.redaction import is_variable

Metric = Literal["loss", "choice", "number", "rouge", "judge"]


class JudgeConfig(Section):
    """The model that rates replies of tasks with metric `judge`, behind an OpenAI-compatible endpoint."""

    url: str = Field(**identity("evaluate"), description="up to the version, for example http://localhost:8000/v1")
    model: str = Field(**identity("evaluate"))
    key_variable: str = Field(
        "OPENAI_API_KEY", **identity(), description="environment variable with the key; may be unset"
    )
    instruction: str | None = Field(
        None,
        **identity("evaluate"),
        description="system prompt; must ask for a last line 'Rating: N', N from 0 to 10; default: a general one",
    )

    @model_validator(mode="after")
    def _names_a_variable(self) -> JudgeConfig:
        """Not a check of the field alone, whose error would show its value."""
        if not is_variable(self.key_variable):
            raise ValueError(
                "key_variable is no name of an environment variable (A-Z, 0-9 and _): name the variable that holds the "
                "key, and put the key into that; a key does not belong into a config"
            )
        return self

    max_tokens: int = Field(300, **identity("evaluate"), ge=1)
    parallel: int = Field(4, **identity(), ge=1, description="questions at a time")
    timeout: float = Field(120, **identity(), gt=0, description="seconds for one answer")
    retries: int = Field(
        4,
        **identity(),
        ge=0,
        description="of a question that met a busy server or an answer without a rating",
    )
    wait: float = Field(1, **identity(), ge=0, description="seconds before the first retry, doubled each time")


class EvaluationConfig(Section):
    """Scoring of θ0, every θi, the fused and the final model on every task's test rows."""

    batch_size: int = Field(16, **identity("evaluate"), ge=1)
    max_length: int = Field(1024, **identity("evaluate"), ge=8)
    precision: Precision = Field(
        "auto",
        **identity("evaluate", absent="auto", swept=True),
        description="of products, as in training; auto: bfloat16 where it is native",
    )
    limit: int | None = Field(None, **identity("evaluate"), ge=1, description="test rows per task at most")
    judge: JudgeConfig | None = Field(
        None,
        **identity("evaluate", absent=None, swept=True),
        description="needed by tasks with metric `judge`",
    )

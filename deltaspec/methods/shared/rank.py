"""A rank in a method's parameters: a number, or in a document a budget that the plan finds the number for."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_RANK = 65536
SHARE = r"^(100|[0-9]{1,2}(\.[0-9]{1,9})?) ?%$"
"""A percentage, as a document writes it."""


class Budget(BaseModel):
    """A number of trainable parameters, for the plan to choose the largest rank that it pays for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    budget: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=SHARE)] = Field(
        description="For the whole delta: a count, or a share of the backbone's parameters such as `0.5%`."
    )

    def limit(self, parameters: int) -> int:
        """Return the count, for a backbone of so many parameters; exact, rounded down."""
        if isinstance(self.budget, int):
            return self.budget
        return int(Fraction(self.budget.removesuffix("%").strip()) * parameters / 100)

    def __str__(self) -> str:
        return f"{self.budget:,}" if isinstance(self.budget, int) else f"{self.budget.removesuffix('%').strip()} %"


if TYPE_CHECKING:
    Rank: TypeAlias = int  # methods see only numbers: the plan puts one in place of a budget before it asks them
else:
    Rank = Annotated[
        Annotated[int, Field(ge=1, le=MAX_RANK)] | Budget,
        WithJsonSchema(
            {
                "type": ["integer", "object"],
                "minimum": 1,
                "maximum": MAX_RANK,
                "properties": {
                    "budget": {
                        "type": ["integer", "string"],
                        "minimum": 1,
                        "pattern": SHARE,
                        "description": Budget.model_fields["budget"].description,
                    }
                },
                "required": ["budget"],
                "additionalProperties": False,
            }
        ),
    ]
    """A rank, or the budget that it is to keep to. More rank must not cost less."""

"""The declaration of one configuration key: default, meaning, limits, and role on resume."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

Value = bool | int | float | str | list
Program = Literal["pretrain", "linear", "semisup", "detection", "segmentation"]
Role = Literal["identity", "tunable", "local"]

ALL_PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The values that a key or an option of a method accepts."""

    least: float = 0.0  # of a number, or of each number of a list
    most: float = math.inf
    choices: tuple[str, ...] = ()  # of a text
    library: str = ""  # `timm/`: a text that begins so is accepted beside the choices
    entries: tuple[int, int] = (0, 1 << 30)  # least and most entries of a list

    def spelled(self) -> tuple[str, ...]:
        """Return the choices as messages and pages list them."""
        return (*self.choices, f"{self.library}<name>") if self.library else self.choices


@dataclass(frozen=True)
class Key(Limits):
    """One configuration key: everything that is known about it.

    `role` says what a changed value means when a run resumes. `identity`: it would be another run,
    so the resume is refused. `tunable`: allowed and logged. `local`: allowed (paths, workers,
    logging). An identity key is identity only for the `programs` whose result depends on it; for
    the others it is tunable.
    """

    default: Value
    meaning: str = ""
    role: Role = field(default="identity", kw_only=True)
    programs: tuple[Program, ...] = field(default=ALL_PROGRAMS, kw_only=True)


# Limits that options of methods share: `queue_size: Count = 65536` in a signature declares the
# option.
Count = Annotated[int, Limits(least=1)]
Fraction = Annotated[float, Limits(most=1.0)]
Temperature = Annotated[float, Limits(least=1e-6)]
Rise = Annotated[str, Limits(choices=("constant", "cosine"))]  # of a target's momentum, to 1
SixCounts = Annotated[Sequence[int], Limits(entries=(6, 6))]

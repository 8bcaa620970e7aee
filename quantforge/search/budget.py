"""What a user may spend, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from quantforge.errors import UsageError


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on the average stored bits a planned weight (codes + scales + zero-points).

    Attributes:
        bits: the limit, exact.
        text: as the user wrote it.
    """

    bits: Fraction
    text: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse "3bit", "3.25bit", "3.25bits" or "3.25bpw".

        Raises:
            UsageError: the text has another form or is not a positive number up to 16.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:bits?|bpw)\s*", text, re.IGNORECASE)
        if match is None:
            raise UsageError(f"budget {text!r} is not understood; write e.g. 3bit or 3.25bpw")
        bits = Fraction(match[1])
        if not 0 < bits <= 16:
            raise UsageError(f"budget {text!r} is out of range; give 0 to 16 bits a weight")
        return cls(bits, text.strip())

    def total_bits(self, weights: int) -> int:
        """Largest whole number of stored bits for `weights` weights."""
        return int(self.bits * weights)

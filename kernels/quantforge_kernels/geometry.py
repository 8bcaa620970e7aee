"""What a packed matrix holds, apart from its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from quantforge_kernels.reference import group_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Shape and grouping of a packed matrix.

    Attributes:
        out_features: rows.
        in_features: columns.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.in_features // group_width(self.group_size, self.in_features)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

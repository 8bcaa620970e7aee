"""What a packed matrix holds, apart from its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids that are no rows. Waits for the device of `ids`.

        Raises:
            IndexError: an id outside [0, out).
        """
        if not ids.numel():
            return
        least, most = (int(bound) for bound in torch.aminmax(ids))
        if least < 0 or most >= self.out_features:
            wrong = least if least < 0 else most
            raise IndexError(f"ids must be in [0, {self.out_features}), got {wrong}")

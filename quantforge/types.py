"""The data that flows through the compiler. Frozen, validated where it is made, torch only.

Shapes are written `[out, in]`: `out` output features, `in` input features of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SCALE_BITS = 16
KEPT_BITS = 16
PER_CHANNEL = -1
PER_TENSOR = 0
SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8)

# "uniform": 2^bits levels, one more below 0 than above. "ternary": −1, 0 and 1; five codes a byte.
# "balanced": −3/2, −1/2, 1/2 and 3/2, two bits. The latter two are of our own format alone.
Grid = Literal["uniform", "ternary", "balanced"]
LEVEL_GRIDS: tuple[Grid, ...] = ("ternary", "balanced")
TERNARY_A_BYTE = 5  # 3^5 = 243


@dataclass(frozen=True, slots=True, order=True)
class QuantSpec:
    """How one weight is stored: width, grouping, symmetry.

    A layer left alone has no spec (`None` in a plan), not a 16-bit one.

    Attributes:
        bits: width of a code, 2..8; 2 for the grids that are not uniform.
        group_size: weights of a row that share a scale; -1 for the whole row (per channel), 0 for
            the whole matrix (per tensor), which uniform grids do not have.
        symmetric: codes are centred on `middle` and no zero-point is stored.
        grid: which levels there are.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    grid: Grid = "uniform"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be one of {SUPPORTED_BITS}, got {self.bits}")
        if self.grid != "uniform" and (self.bits != 2 or not self.symmetric):
            raise ValueError(f"a {self.grid} grid has codes of 2 bits and no zero-points")
        if self.group_size == PER_TENSOR and self.grid in LEVEL_GRIDS:
            return
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ValueError(f"group_size must be positive or -1, got {self.group_size}")

    def divides(self, in_features: int) -> bool:
        """Whether rows of `in_features` weights split into whole groups, at least two of them.

        A single group is the per-channel case, which has its own spelling.
        """
        if self.group_size in (PER_CHANNEL, PER_TENSOR):
            return True
        return in_features % self.group_size == 0 and in_features > self.group_size

    def groups(self, in_features: int) -> int:
        """Scales a row; that of a whole matrix is in every row."""
        if not self.divides(in_features):
            raise ValueError(f"{self} does not divide a row of {in_features} weights")
        one = self.group_size in (PER_CHANNEL, PER_TENSOR)
        return 1 if one else in_features // self.group_size

    def width(self, in_features: int) -> int:
        """Weights that share one scale."""
        return in_features // self.groups(in_features)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Codes + 16-bit scales + zero-points of one weight matrix, in bits (design: budgets)."""
        if self.grid != "uniform":
            scales = 1 if self.group_size == PER_TENSOR else out_features * self.groups(in_features)
            return 8 * out_features * self.row_bytes(in_features) + SCALE_BITS * scales
        zero_bits = 0 if self.symmetric else self.bits
        a_row = in_features * self.bits + self.groups(in_features) * (SCALE_BITS + zero_bits)
        return out_features * a_row

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row's codes on a ternary or balanced grid."""
        return -(-in_features // (TERNARY_A_BYTE if self.grid == "ternary" else 4))

    @property
    def top(self) -> int:
        """Largest code."""
        return 2 if self.grid == "ternary" else (1 << self.bits) - 1

    @property
    def middle(self) -> float:
        """The code that means 0 without zero-points; between two codes on a balanced grid."""
        return self.top / 2 if self.grid != "uniform" else float(1 << (self.bits - 1))

    @property
    def code_bits(self) -> float:
        """Bits that a code takes in the file."""
        return 8 / TERNARY_A_BYTE if self.grid == "ternary" else float(self.bits)

    @property
    def code_min(self) -> int:
        """Smallest signed code of the symmetric uniform grid."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Largest signed code of the symmetric uniform grid."""
        return (1 << (self.bits - 1)) - 1

    def __str__(self) -> str:
        grouping = {PER_CHANNEL: "pc", PER_TENSOR: "pt"}.get(self.group_size, f"g{self.group_size}")
        width = f"{self.bits}b" if self.grid == "uniform" else self.grid
        return f"{width}-{grouping}" + ("" if self.symmetric else "-asym")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Inverse of `str`: "3b-g64", "4b-pc", "2b-g64-asym", "ternary-pt", "balanced-g64".

        Raises:
            ValueError: the text has another form.
        """
        match = re.fullmatch(r"(?:(\d+)b|(ternary|balanced))-(pc|pt|g(\d+))(-asym)?", text)
        if match is None:
            raise ValueError(f"not a spec: {text!r}; expected e.g. '3b-g64' or '4b-pc'")
        group = {"pc": PER_CHANNEL, "pt": PER_TENSOR}.get(match[3])
        size = int(match[4]) if group is None else group
        if group is None and size == 0:
            raise ValueError(f"group_size must be positive or -1, got {size}")
        grid = next((one for one in LEVEL_GRIDS if one == match[2]), None)
        if grid is None:
            return cls(int(match[1]), size, match[5] is None)
        return cls(2, size, match[5] is None, grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One weight the compiler may quantize.

    Attributes:
        name: module path, e.g. "model.layers.0.self_attn.q_proj".
        kind: what the module is; "convolution": transposed ones too; "tied": an embedding whose
            weight is the head's too.
        out_features: rows of the weight.
        in_features: columns of the weight; of a convolution, numbers of a flattened kernel.
        block: index of the block it lives in, in forward order; -1 outside the blocks.
        stage: layers with the same (block, stage) read the same input and share one gram.
        fused_group: layers with the same value are fused by servers and must share a spec.
        fixed: its spec was given beforehand; budgets in bits do not count it.
    """

    name: str
    kind: Literal["linear", "convolution", "embedding", "tied"] = "linear"
    out_features: int
    in_features: int
    block: int
    stage: int
    fused_group: str
    fixed: bool = False

    @property
    def outside(self) -> bool:
        """Whether it lives outside the blocks: the embedding or the head."""
        return self.block < 0

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight matrix as integers and scales.

    The weight is `(codes - zero) * scale` formed in the dtype the model is loaded in; a symmetric
    weight has the constant zero `spec.middle` and stores none. Scales may be negative.

    Attributes:
        codes: [out, in] uint8, 0 .. `spec.top`.
        scale: [out, groups] bfloat16 or float16; the same in every row where a spec is per tensor.
        zero: [out, groups] uint8, or None when symmetric.
        spec: width and grouping.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        out, cols = self.codes.shape
        groups = self.spec.groups(cols)
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, got {self.codes.dtype}")
        if self.scale.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"scales must be 16-bit, got {self.scale.dtype}")
        if tuple(self.scale.shape) != (out, groups):
            raise ValueError(f"scale must be {(out, groups)}, got {tuple(self.scale.shape)}")
        if (self.zero is None) != self.spec.symmetric:
            raise ValueError("a symmetric weight stores no zero, an asymmetric one must")

    def centre(self) -> Tensor:
        """The codes that mean 0: int16 [out, groups, 1], or [] the middle one of all groups.

        On a balanced grid that is float32 and between two codes.
        """
        if self.zero is None:
            kind = torch.float32 if self.spec.grid == "balanced" else torch.int16
            return torch.full((), self.spec.middle, dtype=kind, device=self.codes.device)
        return self.zero.to(torch.int16).unsqueeze(-1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] weight in `dtype`: the code difference times the scale, both in `dtype`."""
        out, cols = self.codes.shape
        groups = self.spec.groups(cols)
        offset = self.codes.view(out, groups, -1).to(torch.int16) - self.centre()
        return (offset.to(dtype) * self.scale.to(dtype).unsqueeze(-1)).view(out, cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitPlan:
    """Which layer gets which spec, and what that costs.

    Attributes:
        assignment: layer name → spec; None keeps the layer in 16 bits. Covers every layer once;
            embedding and head are in it only where they are planned or fixed.
        budget: the budget as the user wrote it; what the plan costs where none was needed.
        stored_bits: average stored bits a weight over all planned weights, fixed layers left out.
        code_bits: average code bits a weight, likewise.
        predicted_loss: predicted increase of the loss, in nats a token; None where it was not
            estimated, because nothing was searched.
        solver: what found it (a name of `search.solver`, "pairwise" where layers interact,
            "refined" after `search.refine`, or "file"; "given" where there was nothing to search).
        fixed: layers of the assignment whose spec was given beforehand, beside the budget.
        gap: no plan within the budget is predicted to lose less by more than this, in nats a token;
            None where no search says so.
    """

    assignment: Mapping[str, QuantSpec | None]
    budget: str
    stored_bits: float
    code_bits: float
    predicted_loss: float | None
    solver: str
    fixed: tuple[str, ...] = ()
    gap: float | None = None

    @property
    def identity(self) -> Hashable:
        """Equal for plans that make the same network."""
        return tuple(self.assignment.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Token sequences split once, before anything looks at them.

    Attributes:
        fitting: [sequences, length] int64: grams, gradients and compensation see these.
        held_out: [sequences, length] int64: every choice between methods is made on these.
        description: where the text came from, for the report.
        fingerprint: SHA-256 of both tensors.
    """

    fitting: Tensor
    held_out: Tensor
    description: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """What pairs of layers lose together beyond what each loses alone.

    Layers i and j at specs a and b add 2 · weights[i, j] · mean over samples s of
    projections[s, i, a] · projections[s, j, b], in nats a token.

    Attributes:
        projections: [samples, layers, specs] float64, in the square root of nats a token; 0 where a
            spec does not fit.
        weights: [layers, layers] float64, symmetric, 0 on the diagonal, in 0..1.
    """

    projections: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What calibration learns; any budget is answered from it.

    Attributes:
        layers: the planned layers, in forward order.
        specs: candidates.
        loss: [layers, specs] float64, predicted loss increase in nats a token; +inf where the
            candidate does not fit the layer.
        error: [layers, specs] float64, relative squared output error of the candidate.
        estimator: name of the estimator that made `loss`.
        fingerprint: of everything that made it.
        stderr: [layers, specs] float64, standard error of `loss`; +inf where the candidate does not
            fit. None where the estimator has none.
        interactions: of pairs of layers; None where losses add up.
    """

    layers: tuple[LayerInfo, ...]
    specs: tuple[QuantSpec, ...]
    loss: Tensor
    error: Tensor
    estimator: str
    fingerprint: str
    stderr: Tensor | None = None
    interactions: Interactions | None = None

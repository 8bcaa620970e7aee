"""How far an encoder is from its float reference: cosine and squared error of the pooled output.

Of every window both networks give the mean of their last hidden states over the window's tokens
(`models.pooled`), m and m̂:

    cosine = m · m̂ / (‖m‖ ‖m̂‖),    relative squared error = ‖m̂ − m‖² / ‖m‖²

Windows have no padding. 1 − cosine is formed as half the squared distance of the directions, which
is the same and keeps its digits where the two are close. A window is one sample: standard errors
are over windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.capture import Precision, compute_in
from quantforge.errors import InputError
from quantforge.evaluate.windows import checked_windows, require_same, standard_error
from quantforge.models import Architecture, PooledOutput
from quantforge.models.pooled import direction, mean_over_tokens
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor
from quantforge.results import PooledDifference, PooledQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledReference:
    """What the float encoder makes of a set of windows, kept on the CPU.

    Attributes:
        windows: [windows, length] int64 tokens.
        pooled: [windows, hidden] float32.
        batch: windows that ran at one time; `measure_pooled` uses the same, so that the reference
            measured against itself gives exactly zero.
    """

    windows: Tensor
    pooled: Tensor
    batch: int

    @classmethod
    def collect(
        cls,
        module: nn.Module,
        architecture: Architecture,
        windows: Tensor,
        *,
        batch: int = 4,
        precision: Precision = "float32",
        monitor: Monitor | None = None,
        share: Share = ALONE,
    ) -> PooledReference:
        """Run the float encoder once over all windows.

        Args:
            module: an encoder in evaluation mode.
            architecture: its shape.
            windows: [windows, length] integer tokens, at least two a window.
            batch: windows that run at one time.
            precision: "float32" is exact; "bfloat16" rounds the operands of matrix products.
            monitor: receives one step a batch.
            share: of the batches.

        Raises:
            InputError: the windows are not [windows ≥ 2, length ≥ 2] tokens of the vocabulary, or
                the outputs are not finite or zero.
        """
        tokens = checked_windows(module, architecture, windows)
        if len(tokens) < 2:
            raise InputError(
                "an encoder gives one output a window, so errors need two windows or more: give "
                "more (calibration.sequences, or --windows)"
            )
        parts, own = {}, share.part(range(0, len(tokens), batch))
        for start, pooled in _pooled(module, architecture, tokens, batch, precision, own):
            parts[f"{start:09d}"] = pooled.cpu()
            if monitor is not None:
                monitor.step("reference", min(start + batch, len(tokens)), len(tokens))
        made = torch.cat([part for _, part in sorted(share.joined(parts).items())])
        if not bool(torch.isfinite(made).all()) or not bool(made.any(-1).all()):
            raise InputError(
                f"the outputs of {type(module).__name__} are not finite, or zero, on this text: "
                "the checkpoint is damaged"
            )
        return cls(windows=tokens, pooled=made, batch=batch)

    @property
    def output(self) -> PooledOutput:
        """What the reference makes of its last hidden states."""
        return PooledOutput()

    @property
    def window_nll(self) -> tuple[float, ...]:
        """An encoder has no cross-entropy: nothing."""
        return ()

    def with_own_head(self) -> PooledReference:
        """Itself: what is kept depends on no tensor of the network."""
        return self


@torch.no_grad()
def measure_pooled(
    module: nn.Module,
    architecture: Architecture,
    windows: Tensor,
    reference: PooledReference,
    *,
    text: str,
    monitor: Monitor | None = None,
    precision: Precision = "float32",
    share: Share = ALONE,
) -> PooledQuality:
    """Compare an encoder with its float reference on the reference's windows.

    Args:
        module: the network.
        architecture: its shape.
        windows: [windows, length] the tokens the reference was collected on, or its first rows.
        reference: of the float network.
        text: which text this is, for the report.
        monitor: receives one step a batch.
        precision: of this network; the reference keeps its own.
        share: of the batches.

    Raises:
        InputError: the windows are not the reference's, or the outputs are not finite.
    """
    tokens = checked_windows(module, architecture, windows)
    require_same(tokens, reference.windows)
    table = torch.empty(2, len(tokens), dtype=torch.float64)
    distance, mse = table
    own, batch = share.part(range(0, len(tokens), reference.batch)), reference.batch
    for start, pooled in _pooled(module, architecture, tokens, batch, precision, own):
        rows = slice(start, start + len(pooled))
        found, expected = pooled.cpu().double(), reference.pooled[rows].double()
        apart = direction(found) - direction(expected)
        distance[rows] = 0.5 * apart.square().sum(-1)
        mse[rows] = (found - expected).square().sum(-1) / expected.square().sum(-1)
        if monitor is not None:
            monitor.step("evaluate", rows.stop, len(tokens))
    mine = {str(start): table[:, start : start + batch] for start in own}
    for first, part in share.joined(mine).items():
        table[:, int(first) : int(first) + batch] = part
    if not bool(torch.isfinite(distance).all() and torch.isfinite(mse).all()):
        raise InputError("the network gives outputs that are not finite on the evaluation text")
    return PooledQuality(
        text=text,
        windows=len(tokens),
        window_length=tokens.shape[1],
        cosine=1.0 - float(distance.mean()),
        cosine_stderr=standard_error(distance),
        mse=float(mse.mean()),
        mse_stderr=standard_error(mse),
        window_distance=tuple(distance.tolist()),
        window_mse=tuple(mse.tolist()),
    )


def paired_pooled(first: PooledQuality, second: PooledQuality) -> PooledDifference:
    """Difference of two measurements over the same windows, first minus second.

    Raises:
        InputError: the two were not measured on the same number of windows of the same length.
    """
    shapes = [(q.windows, q.window_length) for q in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"cannot pair {shapes[0][0]} windows of {shapes[0][1]} tokens with "
            f"{shapes[1][0]} of {shapes[1][1]}; measure both on the same windows"
        )
    distance, mse = (
        torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
        for a, b in (
            (first.window_distance, second.window_distance),
            (first.window_mse, second.window_mse),
        )
    )
    return PooledDifference(
        distance=float(distance.mean()),
        distance_stderr=standard_error(distance),
        mse=float(mse.mean()),
        mse_stderr=standard_error(mse),
    )


@torch.no_grad()
def _pooled(
    module: nn.Module,
    architecture: Architecture,
    tokens: Tensor,
    batch: int,
    precision: Precision,
    starts: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first window, [windows, hidden] float32) of some batches."""
    body = architecture.body(module)
    embedding = module.get_submodule(architecture.embedding)
    device = next(embedding.parameters(), next(module.parameters())).device
    for start in starts:
        part = tokens[start : start + batch].to(device)
        with compute_in(precision, body, device):
            states = body(input_ids=part, use_cache=False).last_hidden_state
        yield start, mean_over_tokens(states, torch.ones_like(part)).float()

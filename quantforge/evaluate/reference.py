"""What stages ask of a measurement, whatever the network is: a decoder's or an encoder's."""

from __future__ import annotations

from torch import Tensor, nn

from quantforge.capture import Precision
from quantforge.errors import InputError
from quantforge.evaluate import quality
from quantforge.evaluate.pooled import PooledReference, measure_pooled, paired_pooled
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.models import Architecture
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor
from quantforge.results import (
    AnyDifference,
    AnyQuality,
    PooledQuality,
    Quality,
)

AnyReference = ReferenceOutputs | PooledReference


def collect(
    module: nn.Module,
    architecture: Architecture,
    windows: Tensor,
    *,
    precision: Precision = "float32",
    keep_head_copy: bool = False,
    monitor: Monitor | None = None,
    share: Share = ALONE,
) -> AnyReference:
    """What the float network makes of all windows; see `ReferenceOutputs` and `PooledReference`.

    Args:
        module: the float network in evaluation mode.
        architecture: its shape.
        windows: [windows, length] integer tokens, at least two a window.
        precision: of matrix products.
        keep_head_copy: a head's weight will be changed in place.
        monitor: receives one step a batch.
        share: of the batches; `measure` takes the same.
    """
    if architecture.encodes:
        return PooledReference.collect(
            module, architecture, windows, precision=precision, monitor=monitor, share=share
        )
    return ReferenceOutputs.collect(
        module,
        architecture,
        windows,
        precision=precision,
        keep_head_copy=keep_head_copy,
        monitor=monitor,
        share=share,
    )


def measure(
    module: nn.Module,
    architecture: Architecture,
    windows: Tensor,
    reference: AnyReference,
    *,
    text: str,
    monitor: Monitor | None = None,
    precision: Precision = "float32",
    share: Share = ALONE,
) -> AnyQuality:
    """A network against its float reference; see `quality.measure` and `measure_pooled`.

    Raises:
        InputError: one is an encoder, the other a decoder, or what those say.
    """
    if architecture.encodes != isinstance(reference, PooledReference):
        raise InputError(
            f"{type(module).__name__} and its reference are of two kinds: one gives logits, the "
            "other hidden states alone; give networks of one class"
        )
    if isinstance(reference, PooledReference):
        return measure_pooled(
            module, architecture, windows, reference,
            text=text, monitor=monitor, precision=precision, share=share,
        )  # fmt: skip
    return quality.measure(
        module, architecture, windows, reference,
        text=text, monitor=monitor, precision=precision, share=share,
    )  # fmt: skip


def paired(first: AnyQuality, second: AnyQuality) -> AnyDifference:
    """Difference of two measurements over the same windows, first minus second.

    Raises:
        InputError: they are not of the same windows, or not of the same kind.
    """
    if isinstance(first, Quality) and isinstance(second, Quality):
        return quality.paired(first, second)
    if isinstance(first, PooledQuality) and isinstance(second, PooledQuality):
        return paired_pooled(first, second)
    raise InputError("cannot pair a decoder's measurement with an encoder's")

"""Candidates of the embedding and the head, measured beside those of the blocks and kept likewise.

They have a folder of their own in the cache, so that what was measured of the blocks serves budgets
that plan them and budgets that keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate.artefact import load_sensitivity, save_sensitivity
from quantforge.calibrate.candidates import float_weight
from quantforge.calibrate.vocabulary import MatrixQuantizer, head_gram, relative_error
from quantforge.calibration import CANDIDATES, Calibrator
from quantforge.capture import product_dtype
from quantforge.decision import Measurement
from quantforge.files import fingerprint
from quantforge.format.store import CandidateStore
from quantforge.measurements import measurement
from quantforge.memory import StageTimer
from quantforge.results import AnyQuality
from quantforge.search.vocabulary import Candidates, joined
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

ESTIMATOR = "measured"
SENSITIVITY = "sensitivity.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyCalibrator:
    """Measures candidates of the matrices outside the blocks, or takes them from the cache.

    Attributes:
        calibrator: of the blocks.
        candidates: layer → specs, those to measure.
        measure: held-out quality of the network with some weights replaced, one at a time.
    """

    calibrator: Calibrator
    candidates: Candidates
    measure: Callable[[Iterable[Mapping[str, Tensor]]], list[AnyQuality]]

    @contextmanager
    def beside(self, measured: Measurement, *, fresh: bool) -> Iterator[Measurement]:
        """The measurement of the blocks with these candidates in it; readable in the body."""
        base = self.calibrator
        key = base.key(
            ESTIMATOR,
            {layer.name: [str(one) for one in specs] for layer, specs in self.candidates.items()},
            base.recipe.calibrate.model_dump(
                mode="json", include={"batch_size", "precision", "damping"}
            ),
            base.recipe.evaluate.model_dump(mode="json", include={"curve_windows", "precision"}),
        )

        def make(folder: Path) -> None:
            with StageTimer(base.timings, "calibrate"):
                self._fill(folder, measured, key)

        with measurement(
            key, make, complete=SENSITIVITY, fresh=fresh, monitor=base.monitor,
            share=base.model.share,
        ) as folder:  # fmt: skip
            found = load_sensitivity(folder / SENSITIVITY)
            found = replace(found, layers=tuple(self.candidates))
            both = _with(measured, found, folder / CANDIDATES)
            yield replace(both, key=fingerprint(measured.key, key))

    def _fill(self, folder: Path, measured: Measurement, key: str) -> None:
        """Quantize every candidate the best way, and measure."""
        if measured.final_hidden is None:
            raise ValueError("the measurement was made without embedding and head in mind")
        model, options = self.calibrator.model, self.calibrator.recipe.calibrate
        store = CandidateStore(folder / CANDIDATES, model.device)
        gram = head_gram(measured.final_hidden, product_dtype(options.precision), model.device)
        tokens = self.calibrator.calibration.fitting.flatten()
        specs = sorted({spec for found in self.candidates.values() for spec in found})
        shape = (len(self.candidates), len(specs))
        loss, stderr, error = (torch.full(shape, torch.inf).double() for _ in range(3))
        done, total = 0, sum(map(len, self.candidates.values()))
        for row, (layer, fitting) in enumerate(self.candidates.items()):
            weight = float_weight(model, layer)
            counts = torch.bincount(tokens, minlength=len(weight)).to(weight)
            quantizer = MatrixQuantizer(layer, weight, gram, options.damping)
            kept, way = {}, ""
            for spec in sorted(fitting):
                if not way:
                    way = self._best_way(layer, quantizer, spec)
                kept[spec] = quantizer.make(way, spec)
                weights = kept[spec].dequantize()
                (quality,) = self.measure([{layer.name: weights}])
                column = specs.index(spec)
                loss[row, column], stderr[row, column] = quality.loss, quality.loss_stderr
                error[row, column] = relative_error(layer, weights - weight, weight, gram, counts)
                done += 1
                self.calibrator.monitor.step("embeddings", done, total)
            if kept and model.share.main:
                store.put(layer.name, kept)
        table = Sensitivity(
            layers=tuple(self.candidates),
            specs=tuple(specs),
            loss=loss,
            error=error,
            estimator=ESTIMATOR,
            fingerprint=key,
            stderr=stderr,
        )
        if model.share.main:
            save_sensitivity(table, folder / SENSITIVITY)  # last: says that all is there

    def _best_way(self, layer: LayerInfo, quantizer: MatrixQuantizer, spec: QuantSpec) -> str:
        """The way of least held-out loss."""
        if len(quantizer.ways) == 1:
            return quantizer.ways[0]
        qualities = self.measure(
            {layer.name: quantizer.make(way, spec).dequantize()} for way in quantizer.ways
        )
        losses = dict(zip(quantizer.ways, (quality.loss for quality in qualities), strict=True))
        return min(losses, key=losses.__getitem__)


def _with(measured: Measurement, found: Sensitivity, folder: Path) -> Measurement:
    """A measurement with further layers in it."""
    names = {layer.name: folder for layer in found.layers}
    if measured.sensitivity is None or measured.store is None:
        store = CandidateStore(folder, elsewhere=names)
        return replace(measured, store=store, vocabulary=found)
    return replace(
        measured,
        sensitivity=joined(measured.sensitivity, found),
        store=replace(measured.store, elsewhere=names),
        vocabulary=found,
    )

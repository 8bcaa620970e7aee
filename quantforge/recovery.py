"""What follows compensation: blocks, then scales, then the whole network are trained; never worse.

Each goes by the whole network's held-out divergence from the float one, and is undone where that
does not fall. Blocks are trained while the norms are still the float network's; tuning fixes the
integers and costs little; training starts from what it left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.calibrate.evidence import Evidence
from quantforge.capture import product_dtype
from quantforge.errors import InputError
from quantforge.journal import Journal
from quantforge.load.batches import token_digest
from quantforge.methods.temperature import temperature_multipliers
from quantforge.models import Head, Model, Output
from quantforge.progress import Monitor
from quantforge.quantize.sequential import QuantizedLayer
from quantforge.quantize.tune import kept_if_better, tune_scales
from quantforge.recipe import Recipe
from quantforge.results import METRICS, TrainingOutcome
from quantforge.train.blockwise import BlockwiseTask, train_blocks
from quantforge.train.config import TrainingConfig
from quantforge.train.loop import Task, Trained, train
from quantforge.train.teacher import HiddenTeacher, Teacher, top_teacher
from quantforge.types import QuantizedWeight


@dataclass(kw_only=True)
class Recovery:
    """Tuning and training of one compensated network.

    Attributes:
        model: the network; holds the layers' dequantized weights.
        recipe: effective configuration.
        tokens: [sequences, length] int64 fitting tokens.
        final_hidden: [sequences, length, hidden] the float network's head input on them; None where
            only blocks are trained.
        float_output: of the float network; None where the network's own is that.
        measure: held-out loss of the network as it stands.
        evidence: of the measurement, for temperatures; None where nothing was searched.
        seed: of everything random.
        monitor: progress and cancellation.
        journal: gets what is finished.
        notes: warnings that came up on the way, one line each.
        outcome: how training went; None before it.
    """

    model: Model
    recipe: Recipe
    tokens: Tensor
    final_hidden: Tensor | None
    float_output: Output | None
    measure: Callable[[], float]
    evidence: Callable[[], Evidence] | None
    seed: int
    monitor: Monitor
    journal: Journal
    notes: list[str]
    outcome: TrainingOutcome | None = None

    def train_blocks(
        self,
        layers: Sequence[QuantizedLayer],
        originals: Mapping[str, Tensor],
        held_out: Tensor,
        channel_weights: Sequence[Tensor],
    ) -> list[QuantizedLayer]:
        """The same layers, trained block by block, if that lowers the loss on held-out tokens.

        Args:
            layers: as they are in the network.
            originals: layer name → [out, in] float weight before compensation.
            held_out: [sequences, length] int64, which the blocks' states are chosen on.
            channel_weights: per block [hidden], how much an output channel counts.
        """
        weights = _inside_blocks(layers)
        task = BlockwiseTask(
            model=self.model,
            weights=weights,
            originals=originals,
            fitting=self.tokens,
            held_out=held_out,
            channel_weights=channel_weights,
        )

        def trained() -> dict[str, QuantizedWeight]:
            return train_blocks(
                task,
                self.recipe.training,
                seed=self.seed,
                monitor=self.monitor,
                journal=self.journal,
            )

        kept = kept_if_better(self.model, weights, trained, self.measure)
        if kept is weights:
            self._undone("training blocks")
        return _with_weights(layers, kept)

    def tune(self, layers: Sequence[QuantizedLayer]) -> list[QuantizedLayer]:
        """The same layers with tuned scales, if that lowers the loss on held-out tokens."""
        weights, teacher = _inside_blocks(layers), self._hidden()

        def tuned() -> dict[str, QuantizedWeight]:
            return tune_scales(
                self.model,
                weights,
                self.tokens.to(self.model.device),
                teacher.to(self.model.device),
                self.recipe.quantize.tuning,
                float_output=self.float_output,
                generator=torch.Generator().manual_seed(self.seed),
                monitor=self.monitor,
                journal=self.journal,
            )

        kept = kept_if_better(self.model, weights, tuned, self.measure)
        if kept is weights:
            self._undone("tuning the scales")
        return _with_weights(layers, kept)

    def train(
        self, layers: Sequence[QuantizedLayer], originals: dict[str, Tensor]
    ) -> list[QuantizedLayer]:
        """The same layers trained, if that lowers the loss on held-out tokens.

        Args:
            layers: as they are in the network.
            originals: layer name → [out, in] float weight before compensation; each is taken out
                when its training starts.
        """
        weights = _inside_blocks(layers)
        config = self.recipe.training
        if not weights:
            return list(layers)
        multipliers, note = layer_multipliers(list(weights), self.evidence, config)
        task = Task(
            model=self.model,
            weights=weights,
            originals=originals.pop,
            tokens=self.tokens,
            teacher=self._teacher(config),
            measure=self.measure,
            multipliers=multipliers,
        )
        made: list[Trained] = []

        def trained() -> dict[str, QuantizedWeight]:
            made.append(
                train(
                    task,
                    config,
                    seed=self.seed,
                    monitor=self.monitor,
                    share=self.model.share,
                    journal=self.journal,
                )
            )
            return made[0].weights

        kept = kept_if_better(self.model, weights, trained, self.measure)
        self.outcome = replace(made[0].outcome, kept=kept is not weights)
        if kept is weights:
            self._undone("training")
        self.notes += [one for one in (note, self.outcome.note) if one]
        return _with_weights(layers, kept)

    def _teacher(self, config: TrainingConfig) -> Teacher:
        """The float network on the tokens that are trained on."""
        whole = HiddenTeacher(hidden=self._hidden(), head=self._teachers_head(config))
        k, folder = config.teacher_top_k, self.journal.folder
        if k == 0:
            return whole
        path = None if folder is None else folder / f"teacher-{k}.safetensors"
        return top_teacher(whole, k, path, token_digest(self.tokens))

    def _hidden(self) -> Tensor:
        """What enters the float network's head."""
        if self.final_hidden is None:
            raise ValueError("the measurement was made without tuning or training in mind")
        return self.final_hidden

    def _teachers_head(self, config: TrainingConfig) -> Head | None:
        """The float network's head, in the dtype of the products; None of an encoder."""
        output = self.float_output or self.model.architecture.output(self.model.module)
        return output.rounded(product_dtype(config.precision)) if isinstance(output, Head) else None

    def _undone(self, what: str) -> None:
        """Note that something did not help."""
        name = METRICS[self.model.architecture.measure].name
        self.notes.append(f"{what} did not lower the held-out {name} and was undone")


def layer_multipliers(
    names: Sequence[str], evidence: Callable[[], Evidence] | None, config: TrainingConfig
) -> tuple[dict[str, float], str]:
    """Layer name → multiplier of its temperature, and a note where there should be some.

    The traces are those of the Fisher information, from the gradients that calibration took.

    Args:
        names: of the trained layers.
        evidence: of the measurement.
        config: says whether they are asked for.
    """
    if config.alpha == 0.0:
        return {}, ""
    if evidence is None:
        return {}, "nothing was searched, so there are no traces: training.alpha did nothing"
    found = evidence()
    traces = dict(
        zip((x.name for x in found.layers), found.traces.double().mean(0).tolist(), strict=True)
    )
    try:
        multipliers = temperature_multipliers(
            [traces[name] for name in names], strength=config.alpha, gain=config.kappa
        )
    except InputError as error:
        return {}, f"{error}: training.alpha did nothing"
    return dict(zip(names, multipliers, strict=True)), ""


def _inside_blocks(layers: Sequence[QuantizedLayer]) -> Mapping[str, QuantizedWeight]:
    """Layer name → weight, of the quantized layers of the blocks."""
    return {
        one.layer.name: one.weight
        for one in layers
        if one.weight is not None and not one.layer.outside
    }


def _with_weights(
    layers: Sequence[QuantizedLayer], weights: Mapping[str, QuantizedWeight]
) -> list[QuantizedLayer]:
    """The layers with other weights, those outside the blocks as they are."""
    return [
        one if one.layer.outside else replace(one, weight=weights.get(one.layer.name))
        for one in layers
    ]

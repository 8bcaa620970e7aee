"""Tuning scales and norms end to end, with the integers fixed (EfficientQAT's second phase).

After compensation every layer is good for itself; what is left is how the layers' errors add up at
the logits. Scales and norm weights are few (under 2 % of the weights) but reach every logit, so a
few dozen steps of descent on the KL divergence to the float network's distribution
(EfficientQAT, Chen et al. 2024, trains scales alone with cross-entropy) can lower it
without changing an integer or the size of the file. The caller keeps the result only if it does.

Updates of scales are relative: a scale is base · (1 + change). Adam runs on the changes and on the
norm weights themselves, with a short warm-up and a linear decay. The float distribution comes from
stored final hidden states, logits of both networks are formed for a few hundred tokens at a time,
and the gradient at the head's input is written down directly, (q − p) W where the head is W alone,
so no [tokens, vocabulary] graph exists. An encoder is tuned on 1 - cosine of its pooled output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantforge.capture import compute_in, recomputed
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.memory import release_freed
from quantforge.methods.head_loss import distillation_gradient
from quantforge.methods.scaled_linear import ScaledLinear
from quantforge.models import Model, Output, PooledOutput
from quantforge.parallel import Share, Tally
from quantforge.progress import Monitor, resumed
from quantforge.quantize.config import TuningConfig
from quantforge.quantize.resume import read_tuning, write_tuning
from quantforge.stand_ins import put_weights, stand_ins, trainable_norms
from quantforge.types import QuantizedWeight


def tune_scales(
    model: Model,
    weights: Mapping[str, QuantizedWeight],
    tokens: Tensor,
    teacher: Tensor,
    config: TuningConfig,
    *,
    float_output: Output | None = None,
    generator: torch.Generator,
    monitor: Monitor,
    journal: Journal = NO_JOURNAL,
) -> dict[str, QuantizedWeight]:
    """Tune all scales and the network's norms on the divergence from the float network.

    Args:
        model: the quantized network, which holds `weights`; its norms are changed in place, its
            planned layers are not.
        weights: layer name → integers and scales.
        tokens: [sequences, length] fitting tokens.
        teacher: [sequences, length, hidden] the float network's head input on them.
        config: steps and step sizes.
        float_output: of the float network; None where it is the network's own.
        generator: orders the sequences.
        monitor: progress and cancellation.
        journal: gets the state after every step, which takes far less time than the step; where it
            has one, tuning goes on from there, and ends in the same bits.

    Returns:
        layer name → the same integers with tuned scales.
    """
    module, architecture = model.module, model.architecture
    own = architecture.output(module).rounded(torch.bfloat16)
    taught = own if float_output is None else float_output.rounded(torch.bfloat16)
    body = architecture.body(module)

    def stand_in(name: str, bias: nn.Parameter | None) -> ScaledLinear:
        return ScaledLinear(weights[name], bias)

    with (
        stand_ins(module, weights, stand_in, model.scratch) as layers,
        trainable_norms(module, layers, architecture.behind(module)) as norms,
        recomputed(architecture.block_list(module), config.recompute),
    ):
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.change for layer in layers.values()], "base": config.scale_step},
                {"params": norms, "base": config.norm_step},
            ],
            betas=(0.9, 0.95),
        )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        start, order = read_tuning(journal, trained, optimizer, generator)
        if start:
            text = resumed("step", start, config.steps)
            monitor.step("tune scales", start, config.steps, text)

        def add_gradient(index: int) -> None:
            with torch.enable_grad(), compute_in("bfloat16", body, model.device):
                output = body(input_ids=tokens[index : index + 1], use_cache=False)
            hidden = output.last_hidden_state
            gradient = _gradient(hidden.detach(), teacher[index : index + 1], own, taught)
            share = gradient / (config.batch * gradient.shape[1])
            torch.autograd.backward(hidden, share.to(hidden.dtype))

        for step in range(start, config.steps):
            chosen = []
            for _ in range(config.batch):
                if not order:
                    order = torch.randperm(len(tokens), generator=generator).tolist()
                chosen.append(order.pop())
            _add_gradients(trained, chosen, add_gradient, model.share)
            factor = min(1.0, (step + 1) / config.warm_up) * (1.0 - step / config.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            write_tuning(journal, step + 1, order, trained, optimizer, generator)
            monitor.step("tune scales", step + 1, config.steps)
        return {name: layer.finish() for name, layer in layers.items()}


def _gradient(hidden: Tensor, teacher: Tensor, own: Output, taught: Output) -> Tensor:
    """Of the divergence's sum over tokens, with respect to a sequence's last hidden states.

    Args:
        hidden: [1, length, hidden] of the network.
        teacher: likewise of the float network.
        own: output of the network.
        taught: of the float network.
    """
    if isinstance(own, PooledOutput) or isinstance(taught, PooledOutput):
        return PooledOutput().toward(hidden, teacher)[1]
    return distillation_gradient(hidden[0], teacher[0], own, taught).unsqueeze(0)


def _add_gradients(
    parameters: Sequence[Tensor], chosen: Sequence[int], add: Callable[[int], None], share: Share
) -> None:
    """Give parameters the gradient over some sequences; `add` adds that of one."""
    tally = Tally(share)
    for lane, run in share.lanes(len(chosen)):
        for place in run:
            add(chosen[place])
        tally.put(
            lane,
            [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in parameters],
        )
        for parameter in parameters:
            parameter.grad = None
    for parameter, gradient in zip(parameters, tally.total(), strict=True):
        parameter.grad = gradient


def kept_if_better(
    model: Model,
    weights: Mapping[str, QuantizedWeight],
    tune: Callable[[], dict[str, QuantizedWeight]],
    measure: Callable[[], float],
) -> Mapping[str, QuantizedWeight]:
    """Tune, and undo it unless it lowers what is measured.

    Args:
        model: the quantized network, which holds `weights`; what is kept is put into it, norms as
            the checkpoint will hold them.
        weights: layer name → integers and scales.
        tune: `tune_scales`, ready to be called.
        measure: of the network as it stands, on tokens that it is not tuned on.

    Returns:
        The tuned weights, or `weights` itself where tuning was undone.
    """
    norms = [(one, one.detach().clone()) for one in model.module.parameters() if one.ndim == 1]
    before = measure()
    release_freed()
    tuned = tune()
    release_freed()
    put_weights(model.module, tuned)
    with torch.no_grad():
        for parameter, _ in norms:
            parameter.copy_(parameter.bfloat16())
    if measure() < before:
        return tuned
    put_weights(model.module, weights)
    with torch.no_grad():
        for parameter, norm in norms:
            parameter.copy_(norm)
    return weights

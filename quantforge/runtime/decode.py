"""Continues a sequence token by token without the cost of eager PyTorch between the layers.

The prompt goes through the transformers module; its keys and values move into a cache taken once.
Each further token is one call of the C++ step, for networks whose block is Llama's and which run on
the CPU in float32; what stands in the way otherwise is said by `obstacle`.
"""

from __future__ import annotations

from typing import Any

import torch
from quantforge_kernels import CPU
from quantforge_kernels.cpu_decode import Block, DecodeStep, Matrix, Shape
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models import Architecture, architecture_of
from quantforge.models.cache import cache_of
from quantforge.runtime.linear import QuantLinear

_MOVING_FREQUENCIES = ("dynamic", "longrope")  # rotary kinds that depend on the length


class Decoder:
    """A network with the keys and values of one sequence.

    Args:
        module: a causal language model without an `obstacle`.
        capacity: the longest sequence, prompt included.

    Attributes:
        length: tokens so far; 0 begins a new sequence.
        spared_bytes: how many fewer bytes a token reads than the module holds, because float
            matrices that are exact in bfloat16 are read as such.

    Raises:
        InputError: the network has an obstacle.
    """

    def __init__(self, module: nn.Module, capacity: int) -> None:
        reason = obstacle(module)
        if reason:
            raise InputError(f"{type(module).__name__} cannot be decoded in one call: {reason}")
        self._module: Any = module
        self._step = _decode_step(module, architecture_of(module), capacity)
        self.length = 0
        self.spared_bytes = _spared_bytes(module)

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """[vocabulary] float32 logits after `tokens`, which continue the sequence.

        Raises:
            ValueError: the sequence would be longer than the capacity.
        """
        if self.length + len(tokens) > self._step.capacity:
            total = self.length + len(tokens)
            raise ValueError(f"a cache for {self._step.capacity} tokens cannot take {total}")
        if self.length == 0 and len(tokens) > 1:
            return self._prompt(tokens)
        for token in tokens:
            x = self._module.get_input_embeddings()(torch.tensor([token]))[0]
            result = self._step.run(x, self.length)
            self.length += 1
        return result

    def _prompt(self, tokens: list[int]) -> Tensor:
        output = self._module(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self.length = len(tokens)
        for index, layer in enumerate(cache_of(output).layers):
            self._step.keys[index, :, : self.length] = layer.keys[0]
            self._step.values[index, :, : self.length] = layer.values[0]
        logits: Tensor = output.logits[0, -1].float()
        return logits


def obstacle(module: nn.Module) -> str:
    """Why the network cannot be decoded by one call a token; empty if it can."""
    try:
        architecture = architecture_of(module)
    except InputError as error:
        return str(error)
    if not architecture.rotary:
        return f"the block of {architecture.name} is not Llama's"
    config: Any = module.config
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r}, supported: 'silu'"
    if getattr(config, "sliding_window", None) is not None:
        return f"attention over a window of {config.sliding_window} tokens"
    if getattr(module.get_submodule(architecture.rotary), "rope_type", "") in _MOVING_FREQUENCIES:
        return "rotary frequencies that depend on the length"
    return _obstacle_of_tensors(module) or CPU.unavailable()


def _obstacle_of_tensors(module: nn.Module) -> str:
    for parameter in module.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return f"parameters in {parameter.dtype} on {parameter.device}, supported: float32, cpu"
    packed = [child for child in module.modules() if isinstance(child, QuantLinear)]
    if any(layer.order != CPU.name for layer in packed):
        return f"packed layers that are not in the order of the {CPU.name!r} backend"
    if len({layer.mode for layer in packed}) > 1:
        return "packed layers in several modes"
    return ""


def _decode_step(module: nn.Module, architecture: Architecture, capacity: int) -> DecodeStep:
    """The network as the C++ step takes it."""
    config: Any = module.config
    blocks = list(architecture.block_list(module))
    norms = {stage: path for path, stage in architecture.folds if "." not in path}
    names = [name for stage in architecture.stages for name in stage]
    query, gate = (blocks[0].get_submodule(architecture.stages[stage][0]) for stage in (0, 2))
    head = module.get_submodule(architecture.head)
    heads = int(config.num_attention_heads)
    width = _outputs(query) // heads
    rotary: Any = module.get_submodule(architecture.rotary)
    cosine, sine = rotary(torch.zeros(1, 1, 1), torch.arange(capacity)[None])
    packed = [child for child in module.modules() if isinstance(child, QuantLinear)]
    return DecodeStep(
        [
            Block(
                matrices=tuple(_matrix(block.get_submodule(name)) for name in names),
                attention_norm=_tensor(block.get_submodule(norms[0])),
                feed_norm=_tensor(block.get_submodule(norms[2])),
            )
            for block in blocks
        ],
        _matrix(head),
        _tensor(module.get_submodule(architecture.final_norm)),
        cosine=cosine[0].float().contiguous(),
        sine=sine[0].float().contiguous(),
        shape=Shape(
            hidden=int(config.hidden_size),
            feed=_outputs(gate),
            heads=heads,
            key_heads=int(config.num_key_value_heads),
            head_width=width,
            vocabulary=_outputs(head),
            epsilon=float(config.rms_norm_eps),
            attention_scale=width**-0.5,
        ),
        quantized=any(layer.mode == "a8" for layer in packed),
    )


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features)  # type: ignore[arg-type]


def _tensor(norm: nn.Module) -> Tensor:
    weight = norm.weight
    if not isinstance(weight, Tensor):
        raise InputError(f"{type(norm).__name__} has no weight")
    return weight.detach().contiguous()


def _matrix(layer: nn.Module) -> Matrix:
    """A linear: packed, or dense, and then in bfloat16 where that loses nothing."""
    bias = layer.bias.detach().contiguous() if isinstance(layer.bias, Tensor) else None
    if isinstance(layer, QuantLinear):
        prepared = layer.prepared
        if prepared is None:
            raise InputError("a packed layer is in the order of the file")
        return Matrix(weight=prepared, bias=bias)
    weight = _tensor(layer)
    return Matrix(weight=weight.bfloat16() if _exact_in_half(weight) else weight, bias=bias)


def _exact_in_half(weight: Tensor) -> bool:
    return torch.equal(weight.bfloat16().float(), weight)


def _spared_bytes(module: nn.Module) -> int:
    dense = [_tensor(layer) for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(weight.nbytes // 2 for weight in dense if _exact_in_half(weight))

"""Lets `transformers.AutoModelForCausalLM.from_pretrained` load our checkpoints packed.

Stock transformers decompresses a `pack-quantized` checkpoint when it loads it. The quantizer here
takes its place for checkpoints that the packed modules can run, symmetric ones in linears alone,
and leaves every other to it. transformers calls it at three moments: before the weights are there
it puts packed modules into the skeleton, while they come it keeps codes and scales in their own
dtypes, and afterwards it hands them to the kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantforge.errors import InputError
from quantforge.format import compressed
from quantforge.format.checkpoint import open_checkpoint
from quantforge.models.linears import WITHOUT_LINEARS
from quantforge.runtime.linear import QuantLinear
from quantforge.types import QuantSpec

_METHOD = "compressed-tensors"
_SHAPE = "weight_shape"  # stored beside every packed weight; the module knows it


def use_in_transformers(enabled: bool = True) -> None:
    """Make transformers load quantized checkpoints packed, or as it does by itself again.

    It holds for this process, for every `from_pretrained` that follows.

    Args:
        enabled: False undoes it.
    """
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    stock = CompressedTensorsHfQuantizer
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _packed_quantizer(stock) if enabled else stock


def _packed_quantizer(stock: Any) -> Any:
    """The quantizer's class; made here because transformers is imported only when it is wanted."""

    class PackedHfQuantizer(stock):  # type: ignore[misc]
        """Packed linears where they can run, the stock quantizer elsewhere."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self._specs: dict[str, QuantSpec] | None = None

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self._specs = _packable(model, kwargs.get("checkpoint_files"))
            if self._specs is None:
                super()._process_model_before_weight_loading(model, **kwargs)
                return
            for name, spec in self._specs.items():
                linear = model.get_submodule(name)
                packed = QuantLinear(
                    linear.out_features, linear.in_features, spec, bias=linear.bias is not None
                )
                packed.register_buffer(_SHAPE, torch.empty(2, dtype=torch.int64, device="meta"))
                model.set_submodule(name, packed)

        def get_new_dtype(
            self, converter: Any, param: Any, dtype: torch.dtype | None
        ) -> torch.dtype | None:
            if self._specs is not None and _is_scale(converter):
                return None  # as it is stored
            result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
            return result

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if self._specs is None:
                return super()._process_model_after_weight_loading(model, **kwargs)
            for name in self._specs:
                layer = model.get_submodule(name)
                stored = tuple(layer.get_buffer(_SHAPE).tolist())
                if stored != (layer.out_features, layer.in_features):
                    wanted = (layer.out_features, layer.in_features)
                    raise InputError(f"{name} is stored as {stored}, expected {wanted}")
                del layer._buffers[_SHAPE]
                if layer.weight_packed.device.type == "cpu":
                    layer.prepare(model.dtype)
            return model

    return PackedHfQuantizer


def _packable(model: Any, files: list[str] | None) -> dict[str, QuantSpec] | None:
    """Specs by layer if packed modules can run all of them, else None.

    They are read from the folder again: transformers' own object of the configuration has lost
    the version of the layout.

    Raises:
        InputError: the class has no linears where the folder has packed ones.
    """
    if not files:
        return None
    try:
        specs = open_checkpoint(Path(files[0]).parent).specs()
    except InputError:
        return None
    if type(model).__name__ in WITHOUT_LINEARS:
        raise InputError(
            f"{type(model).__name__}: {WITHOUT_LINEARS[type(model).__name__]}, and transformers "
            "would load wrong weights there; use quantforge.load"
        )
    for name, spec in specs.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            return None
        if not isinstance(module, nn.Linear) or not spec.symmetric:
            return None
        if not spec.divides(module.in_features):
            return None
    return specs


def _is_scale(converter: Any) -> bool:
    """Whether transformers is about to load a scale."""
    names = [*converter.source_patterns, *converter.target_patterns]
    return any(str(name).endswith(compressed.SCALE) for name in names)

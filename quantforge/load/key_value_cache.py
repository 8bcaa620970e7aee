"""A key-value cache in memory that is taken once.

transformers' own cache makes a new, longer tensor for every layer at every token. In a batched
decode the many freed ones, each a little shorter than what is asked for next, leave gaps that the
allocator cannot use: 4.6 GB resident where 0.5 GB is live (SmolLM2-135M, 128 rows).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quantforge.scratch import IN_MEMORY, Scratch


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [rows, heads, length, features], as views of reserved tensors.

    Args:
        capacity: the longest length.
        scratch: where they are, on the CPU.
    """

    def __init__(self, capacity: int, scratch: Scratch = IN_MEMORY) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity, self._scratch = capacity, scratch
        self._reserved: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states and return all there are.

        Raises:
            ValueError: they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _length, _features = key_states.shape
            self._reserved = tuple(
                self._reserve(states, (rows, heads, self._capacity, states.shape[-1]))
                for states in (key_states, value_states)
            )
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._capacity:
            raise ValueError(f"a cache for {self._capacity} tokens cannot take {end}")
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[..., start:end, :] = states
        self.keys, self.values = (reserved[..., :end, :] for reserved in self._reserved)
        return self.keys, self.values

    def _reserve(self, states: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of any values, of the states' kind."""
        if self._scratch.on_disk and states.device.type == "cpu":
            return self._scratch.empty(shape, states.dtype)
        return states.new_empty(shape)


def reserved_cache(config: Any, capacity: int, scratch: Scratch = IN_MEMORY) -> DynamicCache:
    """An empty cache for a network of this configuration.

    Layers that look at all tokens get reserved memory; those with a sliding window keep
    transformers' own, which does not grow beyond it.

    Args:
        config: the network's.
        capacity: tokens a row, prompt included.
        scratch: where keys and values are, on the CPU.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        ReservedLayer(capacity, scratch) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache

"""Learned rounding's two passes over a layer: definition in torch, and the C++ that runs.

A weight is scale · (clamp(round(u), 0, top) − centre), u a real-valued latent for each weight. With
the gradient g of a loss with respect to the weight, and the rounding passed straight through,

    for u       g · scale inside the grid, −½ < u < top + ½, and 0 outside
    for scale   Σ g · (code − centre) over the group

A step follows the signs of running means m ← keep · m + take · gradient: latents by a step in
codes, scales by a share of their size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge_kernels import native


def _library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(
        "rounding",
        "learned rounding runs in torch, more slowly",
        ("qf_rounded_weight", "qf_rounding_step"),
    )


@dataclass(slots=True, kw_only=True)
class Latents:
    """What is learned of one layer, and its grid; all tensors float32 and contiguous.

    Attributes:
        latent: [out, in] in codes.
        scale: [out, groups].
        centre: the codes that mean 0, [out, groups] or [] for all.
        top: the largest code.
        latent_mean: running mean of the latents' gradients.
        scale_mean: of the scales'.
    """

    latent: Tensor
    scale: Tensor
    centre: Tensor
    top: int
    latent_mean: Tensor
    scale_mean: Tensor

    @classmethod
    def start(cls, latent: Tensor, scale: Tensor, centre: Tensor, top: int) -> Latents:
        """Before the first step.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        out, groups = scale.shape
        if latent.ndim != 2 or len(latent) != out or latent.shape[1] % groups:
            raise ValueError(f"latents {tuple(latent.shape)} have no scales {tuple(scale.shape)}")
        if centre.ndim and centre.shape != scale.shape:
            raise ValueError(
                f"centres {tuple(centre.shape)} are not one a scale {tuple(scale.shape)}"
            )
        latent, scale, centre = (x.float().contiguous() for x in (latent, scale, centre))
        return cls(
            latent=latent, scale=scale, centre=centre, top=top,
            latent_mean=torch.zeros_like(latent), scale_mean=torch.zeros_like(scale),
        )  # fmt: skip

    def weight(self, dtype: torch.dtype = torch.float32, *, native_code: bool = True) -> Tensor:
        """[out, in] in `dtype`: bfloat16 or float32."""
        library = self._native(native_code)
        if library is None:
            return (self._integers() * self.scale.unsqueeze(-1)).view_as(self.latent).to(dtype)
        made = torch.empty_like(self.latent, dtype=dtype)
        library.qf_rounded_weight(
            native.pointer(self.latent), native.pointer(self.scale), *self._grid(),
            ctypes.c_int(dtype == torch.float32), ctypes.c_int(torch.get_num_threads()),
            native.pointer(made),
        )  # fmt: skip
        return made

    def step(
        self,
        gradient: Tensor,
        *,
        latent_step: float,
        scale_step: float,
        keep: float,
        take: float,
        native_code: bool = True,
    ) -> None:
        """Move once, in place.

        Args:
            gradient: [out, in] of the loss with respect to the weight, bfloat16 or float32.
            latent_step: in codes.
            scale_step: relative to the scales.
            keep: weight of the running means' past.
            take: weight of what is new.
            native_code: use the C++ version where there is one.
        """
        gradient = gradient.contiguous()
        library = self._native(native_code)
        if library is None:
            self._step_in_torch(gradient.float(), latent_step, scale_step, keep, take)
            return
        library.qf_rounding_step(
            native.pointer(gradient), ctypes.c_int(gradient.dtype == torch.float32), *self._grid(),
            *(ctypes.c_float(value) for value in (latent_step, scale_step, keep, take)),
            ctypes.c_int(torch.get_num_threads()),
            *map(native.pointer, (self.latent, self.latent_mean, self.scale, self.scale_mean)),
        )  # fmt: skip

    def codes(self) -> Tensor:
        """[out, in] float32 integers."""
        return self.latent.round().clamp(0, self.top)

    def _integers(self) -> Tensor:
        """[out, groups, width] code − centre."""
        centre = self.centre.unsqueeze(-1) if self.centre.ndim else self.centre
        return self.codes().view(*self.scale.shape, -1) - centre

    def _step_in_torch(
        self, gradient: Tensor, latent_step: float, scale_step: float, keep: float, take: float
    ) -> None:
        grouped = gradient.view(*self.scale.shape, -1)
        inside = (self.latent > -0.5) & (self.latent < self.top + 0.5)
        for_latent = (grouped * self.scale.unsqueeze(-1)).view_as(self.latent) * inside
        for_scale = (grouped * self._integers()).sum(-1)
        self.latent_mean.mul_(keep).add_(for_latent, alpha=take)
        self.scale_mean.mul_(keep).add_(for_scale, alpha=take)
        self.latent.sub_(self.latent_mean.sign(), alpha=latent_step)
        self.scale.sub_(self.scale_mean.sign() * self.scale.abs(), alpha=scale_step)

    def _native(self, wanted: bool) -> ctypes.CDLL | None:
        return _library() if wanted and self.latent.device.type == "cpu" else None

    def _grid(self) -> tuple[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float, ...]:
        out, groups = self.scale.shape
        return (
            native.pointer(self.centre), ctypes.c_int64(int(self.centre.ndim > 0)),
            ctypes.c_float(self.top), ctypes.c_int64(out), ctypes.c_int64(groups),
            ctypes.c_int64(self.latent.shape[1] // groups),
        )  # fmt: skip

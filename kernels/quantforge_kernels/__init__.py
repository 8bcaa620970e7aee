"""Low-bit operators: one definition in plain torch, and fast backends that must equal it.

`layout` defines the bits in memory and on disk, `reference` defines every operator, `ops` registers
them with torch, `backends` says who can run what, and `prepared` keeps a weight in the order that a
backend wants. Importing this needs torch only.
"""

from quantforge_kernels.backends import (
    BACKENDS,
    CPU,
    Backend,
    BackendError,
    Capability,
    Prepared,
    Request,
    choose_backend,
)
from quantforge_kernels.convolution import qconv2d
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.layout import LAYOUT_VERSION, pack, packed_words, unpack
from quantforge_kernels.ops import qembedding, qlinear
from quantforge_kernels.prepared import (
    PreparedWeight,
    prepare,
    qembedding_prepared,
    qlinear_prepared,
)
from quantforge_kernels.reference import PER_CHANNEL, dequantize

__all__ = [
    "BACKENDS",
    "CPU",
    "LAYOUT_VERSION",
    "PER_CHANNEL",
    "Backend",
    "BackendError",
    "Capability",
    "Geometry",
    "Prepared",
    "PreparedWeight",
    "Request",
    "choose_backend",
    "dequantize",
    "pack",
    "packed_words",
    "prepare",
    "qconv2d",
    "qembedding",
    "qembedding_prepared",
    "qlinear",
    "qlinear_prepared",
    "unpack",
]

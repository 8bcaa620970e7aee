"""Network shapes as data, and the registry of known ones."""

from quantforge.models.architecture import (
    ARCHITECTURES,
    Architecture,
    Model,
    ModelSource,
    architecture_of,
)
from quantforge.models.discovery import block_list_path, shape_of
from quantforge.models.gpt2 import GPT2
from quantforge.models.head import Head, LogitForm
from quantforge.models.llama import LLAMA

__all__ = [
    "ARCHITECTURES",
    "GPT2",
    "LLAMA",
    "Architecture",
    "Head",
    "LogitForm",
    "Model",
    "ModelSource",
    "architecture_of",
    "block_list_path",
    "shape_of",
]

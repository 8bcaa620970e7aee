"""Network shapes as data, and the registry of known ones."""

from quantforge.models.architecture import (
    ARCHITECTURES,
    Architecture,
    Model,
    ModelSource,
    Output,
    architecture_of,
    encoder_classes,
)
from quantforge.models.bert import BERT
from quantforge.models.discovery import block_list_path, shape_of
from quantforge.models.gpt2 import GPT2
from quantforge.models.head import Head, LogitForm
from quantforge.models.llama import LLAMA
from quantforge.models.pooled import PooledOutput

__all__ = [
    "ARCHITECTURES",
    "BERT",
    "GPT2",
    "LLAMA",
    "Architecture",
    "Head",
    "LogitForm",
    "Model",
    "ModelSource",
    "Output",
    "PooledOutput",
    "architecture_of",
    "block_list_path",
    "encoder_classes",
    "shape_of",
]

"""Options of the export stage."""

from __future__ import annotations

from pydantic import Field

from quantforge.config import Config


class ExportConfig(Config):
    """How the checkpoint is written.

    Attributes:
        shard_bytes: largest size of one safetensors file.
    """

    shard_bytes: int = Field(default=4_000_000_000, ge=1_000_000)

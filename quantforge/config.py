"""The base of every configuration section: immutable, and an unknown key is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen pydantic model that forbids unknown keys. Defaults live only in the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

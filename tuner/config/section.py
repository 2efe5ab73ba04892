"""The kind of mapping that every part of a space file is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen mapping of the file; unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

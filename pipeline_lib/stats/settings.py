"""Parameters of the pass that collects statistics."""

from pydantic import Field

from pipeline_lib.core.params import Params


class CalibrateParams(Params):
    """Section ``calibrate``."""

    batch_rows: int = Field(ge=1)
    median_tokens: int = Field(ge=1)

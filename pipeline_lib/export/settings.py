"""Section ``export``: which files are written for a variant."""

from typing import Literal

from pipeline_lib.core.params import Params

Format = Literal["dense", "bitmask", "compressed-tensors"]


class ExportParams(Params):
    """Section ``export`` with the variant's entry of ``exported`` laid over it."""

    formats: list[Format]

"""Parameters of which model is pruned."""

from pathlib import Path
from typing import Literal

from pipeline_lib.core.params import Params


class ModelParams(Params):
    """Section ``model``."""

    path: Path
    id: str | None
    revision: str | None
    include: list[str]
    exclude: list[str]
    remote_code: bool
    dequantize: bool
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    products: Literal["float32", "tf32", "bfloat16"]  # as ``core.products.Products``, whose module imports torch

"""Parameters of the model."""

import re
from pathlib import Path
from typing import Literal

from pipeline_lib.core.params import Params

COMMIT = re.compile("[0-9a-f]{40}")  # of the hub, in full: a name may come to mean other files


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
    # as ``core.products.Products``, whose module imports torch
    products: Literal["float32", "tf32", "bfloat16"]

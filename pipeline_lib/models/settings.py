"""Parameters of the model."""

import re
from pathlib import Path
from typing import Literal

from pipeline_lib.core.params import Params

COMMIT = re.compile("[0-9a-f]{40}")  # a full commit hash of the hub: branches and tags can move


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
    # repeats ``core.products.Products``, because that module imports torch
    products: Literal["float32", "tf32", "bfloat16"]

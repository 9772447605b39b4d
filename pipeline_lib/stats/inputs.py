"""What the calibrated stages open first: the model, ready to stream, and the calibration rows."""

from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import artifacts, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.source import ModelParams, open_source
from pipeline_lib.models.stream import BlockModel

CALIBRATION = Path("build/texts/calibrate")


def open_model(params: ModelParams) -> BlockModel:
    """The model as prepare saw it, on the device that the settings name."""
    return BlockModel(open_source(params), getattr(torch, params.compute_dtype), runtime.device())


def calibration_rows() -> dict[str, torch.Tensor]:
    """``fit`` and ``held_out`` rows [N, T] of the one calibration text.

    Raises:
        SparselineError: there is none, or more than one.
    """
    return artifacts.read_tensors(_file())[0]


def calibration_facts() -> dict[str, Any]:
    """Where they come from: the text's name, its facts, and the SHA-256 of their file.

    Raises:
        SparselineError: as ``calibration_rows``.
    """
    path = _file()
    return artifacts.read_tensors(path)[1] | {"text": path.stem, "file_sha256": artifacts.sha256(path)}


def _file() -> Path:
    files = sorted(CALIBRATION.glob("*.safetensors"))
    if len(files) != 1:
        raise SparselineError(f"params.yaml: texts must hold exactly one text with use: calibrate, not {len(files)}; change one's `use`.")
    return files[0]

"""The inputs of stages with calibration text: the model, ready to stream, and the calibration samples."""

from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import files, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.places import allowed_storage
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.stream import BlockModel


def open_model(workspace: Workspace, params: ModelParams) -> BlockModel:
    """The model as prepare recorded it, on the device of the settings."""
    device = runtime.compute()
    return BlockModel(
        open_source(workspace, params),
        getattr(torch, params.compute_dtype),
        device,
        params.products,
        allowed_storage(device),
    )


def calibration_rows(workspace: Workspace) -> dict[str, torch.Tensor]:
    """``fit``, ``held_out`` and ``training`` samples [N, T] of the one calibration text.

    Raises:
        SparselineError: there is no calibration text, or more than one.
    """
    return workspace.load_tensors(calibration_file(workspace))[0]


def calibration_facts(workspace: Workspace) -> dict[str, Any]:
    """Provenance of the samples: the text's name, its facts, and the SHA-256 of the file.

    Raises:
        SparselineError: as ``calibration_rows``.
    """
    path = calibration_file(workspace)
    return workspace.load_facts(path) | {"text": path.stem, "file_sha256": files.sha256(path)}


def calibration_file(workspace: Workspace) -> Path:
    """Path of the samples.

    Raises:
        SparselineError: as ``calibration_rows``.
    """
    folder = workspace.texts("calibrate")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SparselineError(
            f"{folder}/<calibration text>.safetensors is missing; run `dvc repro` to make it."
        )
    if len(files) != 1:
        raise SparselineError(
            f"params.yaml: texts must hold exactly one text with use: calibrate, not {len(files)}; change"
            " one's `use`."
        )
    return files[0]

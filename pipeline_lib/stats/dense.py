"""A block of the dense model and its statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline_lib.models.architecture import Layout
from pipeline_lib.stats.moments import SiteStatistics


@dataclass(frozen=True)
class DenseBlock:
    """One original block, the input of error curves and induction, all on one device."""

    layout: Layout
    where: str  # its name in the model
    tensors: Mapping[str, torch.Tensor]  # every parameter
    statistics: Mapping[str, SiteStatistics]  # of the inputs of every site, in the dense stream

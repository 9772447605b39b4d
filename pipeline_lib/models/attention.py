"""transformers' attention with torch's fused kernel, adapted to the CPU.

The kernel's small products run faster with MKL than with oneDNN (see ``core.products``). On a CPU,
its gradients take longer in bfloat16 than in float32.
"""

from typing import Any

import torch

from pipeline_lib.core.products import rounding


def register() -> None:
    """Make transformers use this attention for every model with ``sdpa`` attention (the default)."""
    # imported here: it takes seconds, and not every stage needs it
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        with rounding(False):
            if not (query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad):
                return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
            wide = (tensor.float() for tensor in (query, key, value))
            output, weights = sdpa_attention_forward(module, *wide, *args, **kwargs)
            return output.to(query.dtype), weights

    AttentionInterface.register("sdpa", forward)

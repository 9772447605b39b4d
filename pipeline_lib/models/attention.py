"""transformers' attention by torch's fused kernel, whose small products MKL does faster than oneDNN
(see ``products``).
"""

from typing import Any

from pipeline_lib.core.products import rounding


def register() -> None:
    """Have transformers call it for every model whose attention is ``sdpa`` (the default)."""
    from transformers import AttentionInterface  # imported here: seconds that not every stage needs
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with rounding(False):
            return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("sdpa", forward)

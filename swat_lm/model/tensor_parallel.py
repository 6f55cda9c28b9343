"""Tensor parallelism as `transformers` does it: what attention must know of its share of the heads.

What is cut how stands in `SwatConfig.base_model_tp_plan`; layers of other kinds are whole on every process.
"""

from typing import Any

from torch import nn
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,  # pyright: ignore[reportPrivateImportUsage] in transformers 5.20 it has no other place
    ColwiseParallel,
)

from swat_lm.layers.spade import SpadeMixer
from swat_lm.layers.window_attention import WindowAttention
from swat_lm.model.configuration import HEADS


class HeadsParallel(ColwiseParallel):
    """Attention that has a share of the heads; of parameters of its own, of which a sink has one entry per head."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Tell the module its share. Raises ValueError for heads that cannot be shared equally, or that are not all."""
        if not isinstance(module, WindowAttention | SpadeMixer):
            raise ValueError(
                f"tensor parallelism shares out the heads of attention, and the plan has {type(module).__name__} too; "
                "run the model without tensor parallelism"
            )
        module.take_heads(mesh.get_local_rank(), mesh.size())
        return module


ALL_PARALLEL_STYLES.register(HEADS, HeadsParallel())  # pyright: ignore[reportArgumentType]

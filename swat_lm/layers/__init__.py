"""Layers behind one contract; a model names their kinds in `SwatConfig.layers`."""

from swat_lm.layers.attention import AttentionLayer
from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.base import Layer
from swat_lm.layers.ecp import EcpLayer
from swat_lm.layers.longvq import LongVqLayer
from swat_lm.layers.mamba2 import Mamba2Layer
from swat_lm.layers.perceiver import PerceiverLayer
from swat_lm.layers.spade import SpadeLayer
from swat_lm.layers.sparsek import SparsekLayer
from swat_lm.layers.taipan import TaipanLayer
from swat_lm.layers.window_attention import WindowAttention

LAYERS: dict[str, type[Layer]] = {
    kind.name: kind
    for kind in (
        AttentionLayer,
        Mamba2Layer,
        SpadeLayer,
        TaipanLayer,
        SparsekLayer,
        EcpLayer,
        PerceiverLayer,
        LongVqLayer,
    )
}

__all__ = [
    "LAYERS",
    "AttentionLayer",
    "AttentionSettings",
    "EcpLayer",
    "Layer",
    "LongVqLayer",
    "Mamba2Layer",
    "PerceiverLayer",
    "SpadeLayer",
    "SparsekLayer",
    "TaipanLayer",
    "WindowAttention",
]

"""Token mixers behind one protocol; a model names them in `SwatConfig.mixers`."""

from swat_lm.mixers.attention import AttentionSettings, WindowAttention
from swat_lm.mixers.protocol import Mixer

MIXERS: dict[str, type[Mixer]] = {WindowAttention.name: WindowAttention}

__all__ = ["MIXERS", "AttentionSettings", "Mixer", "WindowAttention"]

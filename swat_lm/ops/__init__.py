"""The mathematics: pure functions on tensors."""

from swat_lm.ops.window_attention import window_attention, window_attention_step

__all__ = ["window_attention", "window_attention_step"]

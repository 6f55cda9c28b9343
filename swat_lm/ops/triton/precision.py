"""When the hardware's approximate tanh computes the weights, and when scores are scaled before they are formed."""

import math

import torch

from swat_lm.ops.calls import AttentionCall

# below this bias most weights are near 0, where the error of tanh, which is absolute, is not small beside them
LOWEST_BIAS_FOR_FAST = -2.0


def is_fast(call: AttentionCall) -> bool:
    """Whether weights come from the hardware's tanh: "fast", or "auto" where its error hides behind the inputs' own.

    The absolute error of a weight is at most 2.5e-4 by PTX's bound for tanh.approx.f32 (6e-6 as others measured it). A
    weight near 1/2 is rounded by 1e-3 to bfloat16 and 1e-4 to float16; weights near 0 are rounded by less, so "auto"
    is exact where a score bias makes most of them small, or may come to do so.
    """
    if call.softmax or call.query.dtype not in (torch.bfloat16, torch.float16) or call.precision == "exact":
        return False
    return call.precision == "fast" or (call.score_bias is None and call.bias >= LOWEST_BIAS_FOR_FAST)


def is_folded(scale: float, fast: bool, one_loop: bool) -> bool:
    """Whether queries (or keys) are multiplied by `scale / 2`, the factor of fast scores, before their product.

    The product then adds to the bias, which saves a multiplication for every score. A power of two only moves the
    exponent, so nothing is rounded: heads of 16, 64 and 256 channels at their usual scale. Neither end of float16's
    range must come nearer by much. In one loop the compiler would wait for every product instead of running it behind
    the next (ptxas says C7515), which costs more.
    """
    return fast and not one_loop and 2.0**-8 <= scale <= 2.0 and math.frexp(scale)[0] == 0.5

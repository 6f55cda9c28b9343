"""What may be set of a layer of the kind `longvq`, and what of it cannot be."""

import math
from dataclasses import dataclass
from typing import Any

from swat_lm.layers.attention_settings import LARGEST_WINDOW
from swat_lm.layers.norm import NORMS
from swat_lm.layers.pre_norm import ACTIVATIONS, FEED_FORWARDS
from swat_lm.layers.state_space_settings import SYSTEMS, check_state_space

ATTENTIONS = ("quantised", "exact", "none")
WITHOUT = "none"
# every token is compared with every code
MOST_CODES = 2**16
OF_CODES = ("codes", "average_decay", "dead_below", "commitment_weight")
OF_SYSTEM = (
    "state_size", "taps", "time_step_min", "time_step_max", "transition_rate", "entry_rate", "step_rate"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LongVqSettings:
    """What may be set of a LongVQ layer, a reconstruction (arXiv 2404.11163); in brackets the letters of its parents.

    The paper's own numbers could not be consulted. Rates and the commitment's weight are Transformer-VQ's.
    """

    codes: int = 256
    """Codes of the codebook (S): all that is far counts through them."""
    block: int = 128
    """Tokens of a block (L), counted from the document's start: a token's own and the one before are near, and a bias
    is learnt for each distance below it."""
    key_size: int = 64
    """Numbers of a query and a key (z), of which there is one head."""
    value_expand: int = 2
    """Channels of a value per channel of the model (h / d)."""
    attention: str = "quantised"
    """Controls: "exact": keys as they are, all pairs, and decoding that keeps them all; "none": the state space alone
    (O = 0)."""
    average_decay: float = 0.99
    """Share that the codebook's running averages keep in each step (gamma)."""
    dead_below: float = 0.1
    """A code that counts less than this share of the mean begins anew at a key of the step; 0: none does."""
    commitment_weight: float = 1e-4
    """What the keys' mean squared distance to their codes counts in the loss (beta)."""
    bidirectional: bool = False
    """A token sees what comes after it too: for tasks without generation."""
    ssm: str = "s4d"
    """What mixes the input of queries, keys and gates: "s4d", "s4", or, a control, "none"."""
    state_size: int = 16
    """Numbers kept per channel: half as many conjugate pairs."""
    taps: str = "powers"
    """How a kernel is made: "powers" of the discrete matrix, or "cauchy" sums; equal up to rounding."""
    time_step_min: float = 0.001
    """Steps are drawn between this and the next at the start; 1 / step tokens back about half is left."""
    time_step_max: float = 1.0
    """The fastest channels remember a token or two, as Mega's averages do: a key can know the token before its own."""
    transition_rate: float = 1.0
    """Learning rate of A as a share of the model's; 0 freezes it."""
    entry_rate: float = 1.0
    """That of B."""
    step_rate: float = 1.0
    """That of dt."""
    intermediate_size: int = 2816
    mlp_bias: bool = False
    norm: str = "rms"
    feed_forward: str = "gated"
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        least = {"codes": 1, "block": 1, "key_size": 2, "value_expand": 1, "intermediate_size": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
        if self.codes > MOST_CODES:
            raise ValueError(
                f"codes: every token is compared with all of them, so expected at most {MOST_CODES:,}, got "
                f"{self.codes:,}"
            )
        if self.window > LARGEST_WINDOW:
            raise ValueError(
                f"block: two blocks of {self.block:,} tokens are {self.window:,}, more than the {LARGEST_WINDOW:,} "
                "that can be near; take shorter ones"
            )
        words = {
            "attention": ATTENTIONS, "ssm": (*SYSTEMS, WITHOUT), "norm": tuple(NORMS), "feed_forward": FEED_FORWARDS,
            "hidden_act": tuple(ACTIVATIONS),
        }  # fmt: skip
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if self.attention == WITHOUT and self.ssm == WITHOUT:
            raise ValueError("ssm: without attention and without a state space no token would see another; keep one")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: expected at least 0 and below 1, got {self.average_decay}")
        if not 0 <= self.dead_below < 1:
            raise ValueError(
                f"dead_below: expected a share of the mean count of at least 0 and below 1, got {self.dead_below}"
            )
        if not 0 <= self.commitment_weight < math.inf:
            raise ValueError(f"commitment_weight: expected a number of at least 0, got {self.commitment_weight}")
        check_state_space(self)

    @property
    def window(self) -> int:
        """Tokens of two blocks: what the last token of one sees one by one, and what decoding keeps so."""
        return 2 * self.block

    @property
    def quantises(self) -> bool:
        """Whether there is a codebook."""
        return self.attention == "quantised"

    def check_given(self, given: frozenset[str]) -> None:
        """Refuse settings, by the names an entry gives, that this layer has no use for. Raises ValueError."""
        unused: dict[str, tuple[str, ...]] = {}
        if not self.quantises:
            unused[f"attention: {self.attention}"] = OF_CODES
        if self.attention == WITHOUT:
            unused["attention: none"] = (*OF_CODES, "block", "key_size", "value_expand")
        if self.ssm == WITHOUT:
            unused["ssm: none"] = OF_SYSTEM
        for why, names in unused.items():
            for name in names:
                if name in given:
                    raise ValueError(f"{name}: has no meaning with {why}; leave it out, or change that")


def settled(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """The values of an entry, once it is known that it says nothing without a meaning. Raises ValueError."""
    LongVqSettings(**values).check_given(given)
    return values

"""The kind `spade`: a state space beside windowed attention, fused (SPADE, arXiv 2212.08136), in Llama's layer.

One such layer at the bottom brings in what is farther away than any window; the others can be windows alone. The state
space is S4's, without activation or projection of its own: norms and the fusion's projection mix channels.
Legend: B rows, T tokens, M width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.layers.attention import AttentionLayer, layer_type, own_feed_forward, own_rotary
from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.base import InPlace, Output, Part, Past, Shared, StateTensor, lay_out
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.norm import NORMS
from swat_lm.layers.per_head import start_per_head
from swat_lm.layers.pre_norm import Mixer, PreNorm
from swat_lm.layers.state_space_settings import SYSTEMS, check_state_space
from swat_lm.layers.structured_state import StructuredState
from swat_lm.layers.window_attention import WindowAttention

FUSIONS = ("concat", "add", "stack")


@dataclass(frozen=True, kw_only=True)
class SpadeSettings(AttentionSettings):
    """What may be set beside what windowed attention has; in brackets the authors' words."""

    relative_bias: str = "shared"
    state_size: int = 64
    """N, numbers kept per channel: half as many conjugate pairs."""
    fusion: str = "concat"
    """"concat": a projection of both, each normed; "add": their mean, each normed; "stack": attention over what the
    state space gives."""
    ssm: str = "s4"
    """"s4": diagonal plus rank one (NPLR); "s4d": diagonal."""
    taps: str = "powers"
    """How a kernel is made: "powers" of the discrete matrix, or "cauchy" sums; equal up to rounding."""
    time_step_min: float = 0.001
    """Steps are drawn between this and the next at the start; 1 / step tokens back about half is left."""
    time_step_max: float = 0.1
    transition_rate: float = 1.0
    """Learning rate of A as a share of the model's; 0 freezes it."""
    entry_rate: float = 1.0
    """That of B."""
    step_rate: float = 1.0
    """That of dt."""

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        super().__post_init__()
        for name, words in (("fusion", FUSIONS), ("ssm", SYSTEMS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, words))}, got {getattr(self, name)!r}")
        check_state_space(self)


class SpadeMixer(Mixer):
    """State space and windowed attention over the same tokens."""

    def __init__(self, settings: SpadeSettings, width: int, attention: WindowAttention, norm_eps: float) -> None:
        super().__init__()
        self.settings = settings
        self.ssm = StructuredState(settings, width)
        self.attention = attention
        self.global_norm = self.local_norm = self.fuse = None
        if settings.fusion != "stack":
            made = NORMS[settings.norm]
            self.global_norm, self.local_norm = made(width, norm_eps), made(width, norm_eps)
        if settings.fusion == "concat":
            self.fuse = nn.Linear(2 * width, width, bias=True)

    @property
    def o_proj(self) -> nn.Linear:  # type: ignore[override]
        """The projection that writes to the stream."""
        return self.attention.o_proj if self.fuse is None else self.fuse

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Both branches' states."""
        return () if self.settings.bidirectional else (*self.attention.state_spec(), *self.ssm.state_spec())

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix a chunk `[B, T, M]`; the past, if any, is moved on."""
        far = self.ssm(hidden, chunk, past)
        near = self.attention(self._attended(hidden, far), chunk, past).hidden
        return Output(self._fused(far, near), None if past is None else past.after())

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Mix parts of a row `[1, T, M]`: projections and norms for all at once."""
        each = [self.ssm(hidden[:, part.tokens], part.chunk, part.past) for part in parts]
        far = lay_out(parts, each, hidden.shape[1])
        return self._fused(far, self.attention.forward_packed(self._attended(hidden, far), parts))

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Mix one token per row, `[B, 1, M]`, in place over slots."""
        far = self.ssm.step(hidden, chunk, past)
        return self._fused(far, self.attention.step(self._attended(hidden, far), chunk, past))

    def _attended(self, hidden: Tensor, far: Tensor) -> Tensor:
        return far if self.settings.fusion == "stack" else hidden

    def _fused(self, far: Tensor, near: Tensor) -> Tensor:
        if self.global_norm is None or self.local_norm is None:
            return near
        far, near = self.global_norm(far), self.local_norm(near)
        if self.fuse is None:
            return (far + near) / 2
        return self.fuse(torch.cat((far, near), dim=-1))

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Attention's and the fusion's; a convolution by FFT has no matrix product."""
        matrix = 0 if self.fuse is None else self.fuse.weight.numel()
        return self.attention.flops(num_tokens, num_past) + 2 * num_tokens * matrix

    def reach(self) -> int | None:
        """Everything before, though faded."""
        return None

    def first_kept(self) -> int:
        """Attention's first tokens."""
        return self.attention.first_kept()

    def refuses_past(self) -> str | None:
        """Tokens that see what comes after them."""
        return self.attention.refuses_past()

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions."""
        if chunk.last is None:
            return None
        return "a state space reads in one direction, so it cannot read a prefix in both; use attention for such rows"

    def take_heads(self, share: int, num_shares: int) -> None:
        """Refused: the state space has channels and no heads."""
        raise ValueError("spade: its state space has no heads to share, so tensor parallelism cannot cut the layer")


class SpadeLayer(PreNorm):
    """SPADE's layer: a norm, state space beside windowed attention, and the feed-forward."""

    name = "spade"
    Settings = SpadeSettings

    self_attn: SpadeMixer

    def __init__(self, settings: SpadeSettings, width: int, index: int, shared: Shared) -> None:
        rotary = own_rotary(settings, shared)
        attention = WindowAttention(settings, width, rotary, index, shared.norm_eps, shared)
        mixer = SpadeMixer(settings, width, attention, shared.norm_eps)
        super().__init__(
            mixer, own_feed_forward(settings, width), width, shared.norm_eps, settings.residual_multiplier,
            settings.norm_placement, settings.norm, settings.layer_scale,
        )  # fmt: skip

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """As attention does; the paper's softmax without slopes beside T5's bias, unless the entry says otherwise."""
        values = AttentionLayer.settle(values, given, width)
        own: dict[str, Any] = {}
        if "score_function" not in given:
            own |= {"score_function": "softmax", "score_bias": 0.0}
        if not given & {"slopes", "learned_slopes"}:
            own |= {"slopes": "none", "learned_slopes": False}
        return values | {name: value for name, value in own.items() if name not in given}

    @staticmethod
    def layer_type(settings: SpadeSettings) -> str:
        """Hugging Face's name, which chooses its stock cache."""
        return layer_type(settings.sliding_window)

    @classmethod
    def keeps_beside_keys(cls, settings: SpadeSettings) -> str | None:
        """The state."""
        return "a summary"

    def init_weights(self, shared: Shared) -> None:
        """HiPPO's memory; what attention learns per head starts as the settings say."""
        super().init_weights(shared)
        self.self_attn.ssm.init_weights()
        start_per_head(self.self_attn.attention)

    def optimizer_options(self) -> dict[str, dict[str, Any]]:
        """Those of the state space."""
        return {f"self_attn.ssm.{name}": options for name, options in self.self_attn.ssm.optimizer_options().items()}

"""The kind `taipan`: attention for chosen queries alone, between layers of state space (Taipan, arXiv 2410.18572).

A gate chooses which tokens look back through a window; keys and values are those of all tokens. What attention finds
takes the place of the token's hidden state by the share that the gate gives it; the others pass as they are. SwiGLU
follows for all. There is no position code. What the paper leaves open is in docs/mathematics.md.
Legend: B rows, T tokens, N chosen tokens, M width, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from swat_lm.layers.attention import layer_type, settle_heads
from swat_lm.layers.base import InPlace, Layer, Output, Part, Past, Shared, StateTensor
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.norm import RMSNorm
from swat_lm.layers.pre_norm import FeedForward, start, start_normal
from swat_lm.layers.selective_attention import SelectiveAttention
from swat_lm.layers.taipan_settings import TaipanSettings


class TaipanLayer(Layer):
    """Selective attention and SwiGLU, each behind a norm."""

    name = "taipan"
    Settings = TaipanSettings

    def __init__(self, settings: TaipanSettings, width: int, index: int, shared: Shared) -> None:
        super().__init__()
        self.settings = settings
        self.draws_noise = settings.selection != "all"
        self.judges_rows = "budget_weight" if settings.selection == "gate" and settings.budget_weight > 0 else None
        self.input_layernorm = RMSNorm(width, shared.norm_eps)
        self.mixer = SelectiveAttention(settings, width, index, shared.norm_eps)
        self.post_attention_layernorm = RMSNorm(width, shared.norm_eps)
        self.mlp = FeedForward(width, settings.intermediate_size)

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Sizes that follow from the number of heads; the paper's softmax, unless the entry itself says otherwise."""
        values = settle_heads(values, given, width)
        return values if "score_function" in given else {**values, "score_function": "softmax"}

    @staticmethod
    def layer_type(settings: TaipanSettings) -> str:
        """Hugging Face's name, which chooses its stock cache: keys and values of all tokens are kept."""
        return layer_type(settings.sliding_window)

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Keys and values of the window."""
        return self.mixer.state_spec()

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process a chunk `[B, T, M]` after its past."""
        mixed, share, auxiliary = self.mixer(self.input_layernorm(hidden), chunk, past)
        return Output(self._feed(hidden, mixed, share), None if past is None else past.after(), auxiliary)

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Process parts of a row `[1, T, M]`: norms, gate, keys, values and feed-forward for all at once."""
        return self._feed(hidden, *self.mixer.forward_parts(self.input_layernorm(hidden), parts))

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Process one token per row, `[B, 1, M]`, in place over rings."""
        return self._feed(hidden, *self.mixer.step_share(self.input_layernorm(hidden), chunk, past))

    def _feed(self, hidden: Tensor, mixed: Tensor, share: Tensor) -> Tensor:
        """Give attention its share `[B, T, 1]`, of which `mixed` is a multiple already; then the feed-forward."""
        hidden = hidden * (1 - share) + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Those of the mixer, which are counted at its capacity where it computes chosen rows alone, and SwiGLU."""
        matrices = sum(module.weight.numel() for module in self.mlp.children() if isinstance(module, nn.Linear))
        return self.mixer.flops(num_tokens, num_past) + 2 * num_tokens * matrices

    def reach(self) -> int | None:
        """The window, of chosen tokens; the others see themselves."""
        return self.mixer.reach()

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions."""
        if chunk.last is None:
            return None
        return "chosen tokens look back through a window, so it cannot read a prefix in both directions; use attention"

    def init_weights(self, shared: Shared) -> None:
        """The gate begins with more tokens than its capacity, so that attention can show what it is good for."""
        bias = self.mixer.gate.out_proj.bias
        start(bias, lambda: bias.copy_(self.settings.first_bias()))
        if shared.output_projection_init_scale != 1:
            # o_proj does not add to the residual stream, it stands in its place
            start_normal(self.mlp.down_proj.weight, shared.initializer_range * shared.output_projection_init_scale)

"""The kind `longvq`: LongVQ (reconstruction), gated attention over quantised keys beside a state space.

After arXiv 2404.11163, of which the abstract and a figure's caption could be consulted: the wiring is Mega's (arXiv
2209.10655), the attention Transformer-VQ's (arXiv 2309.16354). A state space mixes what queries, keys and gates are
made of; values come from the unmixed input. Codes, counts and sums are the far memory, of constant size.
Legend: B rows, T tokens, P kept tokens, M width, D key size, E value size, S codes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.layers.base import NOTHING, Auxiliary, InPlace, Layer, Output, Past, Shared, StateTensor
from swat_lm.layers.both_ways import REFUSAL
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.codebook import KeyCodebook
from swat_lm.layers.far_by_code import attend_by_code, step_by_code
from swat_lm.layers.longvq_settings import WITHOUT, LongVqSettings, settled
from swat_lm.layers.norm import NORMS
from swat_lm.layers.pre_norm import FeedForward, start, start_normal
from swat_lm.layers.structured_state import StructuredState
from swat_lm.ops.codebook import unit_keys
from swat_lm.ops.flops import quantised_flops
from swat_lm.ops.memory import check_fits
from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.quantised_attention import dense_attention

BIAS_START = 0.02
# of all pairs, forward and backward, where keys are as they are
SCORES_HELD = 6


class Projected(NamedTuple):
    """What the block makes of its tokens."""

    gate: Tensor
    """`[B, T, M]`, u: the share of the new state."""
    candidate: Tensor
    """`[B, T, M]`, what attention is added to."""
    reset: Tensor
    """`[B, T, E]`, r: what multiplies attention."""
    query: Tensor
    """`[B, T, D]` in the precision of sums."""
    key: Tensor
    value: Tensor
    """`[B, T, E]`"""


class LongVqMixer(nn.Module):
    """State space, gates, and attention over quantised keys; the controls lack a part of it."""

    def __init__(self, settings: LongVqSettings, width: int, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.value_size = settings.value_expand * width
        self.ssm = None if settings.ssm == WITHOUT else StructuredState(settings, width, "longvq")
        self.attends = settings.attention != WITHOUT
        self.sizes = [width, width, self.value_size, settings.key_size] if self.attends else [width, width]
        self.in_proj = nn.Linear(width, sum(self.sizes))
        self.codebook: KeyCodebook | None = None
        if settings.quantises:
            self.codebook = KeyCodebook(
                settings.codes, settings.key_size, index, settings.average_decay, settings.dead_below,
                settings.commitment_weight,
            )  # fmt: skip
        if self.attends:
            self.v_proj = nn.Linear(width, self.value_size)
            self.out_proj = nn.Linear(self.value_size, width, bias=False)
            # of queries, then of keys
            self.shared_scale = nn.Parameter(torch.ones(2, settings.key_size))
            self.shared_shift = nn.Parameter(torch.zeros(2, settings.key_size))
            both = settings.bidirectional
            self.local_bias = nn.Parameter(torch.zeros(2 * settings.block - 1 if both else settings.block))

    def state_spec(self) -> tuple[StateTensor, ...]:
        """The state space's; near keys, values and codes; of far ones, how many of each code and their sum.

        Counts are whole and sums float64: a stream has no end.
        """
        settings = self.settings
        if settings.bidirectional:
            return ()
        far = () if self.ssm is None else self.ssm.state_spec()
        if not self.attends:
            return far
        key, value = (settings.key_size,), (self.value_size,)
        if not settings.quantises:
            return StateTensor("exact_key", key, "growing"), StateTensor("exact_value", value, "growing"), *far
        return (
            StateTensor("near_key", key, "window", settings.window),
            StateTensor("near_value", value, "window", settings.window),
            StateTensor("near_code", (), "window", settings.window, torch.int64),
            StateTensor("code_counts", (settings.codes,), "summary", dtype=torch.int64),
            StateTensor("code_totals", (settings.codes, *value), "summary", dtype=torch.float64),
            *far,
        )

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None) -> tuple[Tensor, Tensor, Auxiliary]:
        """From normed tokens `[B, T, M]` to the update gate and the new state, both `[B, T, M]`."""
        if chunk.real is not None:
            # not even NaN passes from a token that does not count, nor does its gradient
            hidden = hidden.masked_fill(~chunk.real[..., None], 0.0)
        mixed = hidden if self.ssm is None else self.ssm(hidden, chunk, past)
        if not self.attends:
            return *self._gates_alone(mixed), NOTHING
        made = self._project(hidden, mixed)
        said = NOTHING
        if self.codebook is None:
            heads = self._attend_exactly(made, chunk, past)
        else:
            key, code = self.codebook(made.key)
            said = self.codebook.say(made.key, code, chunk)
            if self.training:
                self.codebook.notice(self.shared_scale)
            heads = attend_by_code(
                made.query, key.to(hidden.dtype), made.value, code, self.codebook.codes, self.local_bias, chunk, past,
                self.settings.block, self.settings.bidirectional,
            )  # fmt: skip
        return *self._finish(made, heads), said

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> tuple[Tensor, Tensor]:
        """The same of one normed token per row, `[B, 1, M]`, in place over slots."""
        mixed = hidden if self.ssm is None else self.ssm.step(hidden, chunk, past)
        if not self.attends:
            return self._gates_alone(mixed)
        made = self._project(hidden, mixed)
        if self.codebook is None:
            return self._finish(made, self._step_exactly(made, past))
        key, code = self.codebook(made.key)
        heads = step_by_code(
            made.query, key.to(hidden.dtype), made.value, code, self.codebook.codes, self.local_bias, past
        )
        return self._finish(made, heads)

    def _gates_alone(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate = self.in_proj(mixed).chunk(2, dim=-1)
        return gate.sigmoid(), F.silu(candidate)

    def _project(self, hidden: Tensor, mixed: Tensor) -> Projected:
        gate, candidate, reset, shared = self.in_proj(mixed).split(self.sizes, dim=-1)
        value = F.silu(self.v_proj(hidden))
        # codes are chosen by small differences
        precise = sum_dtype(shared)
        with torch.autocast(shared.device.type, enabled=False):
            shared = F.silu(shared.to(precise))
            query, key = (
                unit_keys(shared * scale.to(precise) + shift.to(precise))
                for scale, shift in zip(self.shared_scale, self.shared_shift, strict=True)
            )
        return Projected(gate.sigmoid(), candidate, F.silu(reset), query, key, value)

    def _finish(self, made: Projected, heads: Tensor) -> tuple[Tensor, Tensor]:
        return made.gate, F.silu(made.candidate + self.out_proj(heads.to(made.reset.dtype) * made.reset))

    def _attend_exactly(self, made: Projected, chunk: Chunk, past: Past | None) -> Tensor:
        """Over keys as they are, all pairs at once: the control."""
        key, value, num_past = made.key, made.value, 0
        if past is not None:
            items, num_past = past.extend(exact_key=key.to(value.dtype), exact_value=value)
            key, value = items["exact_key"].to(made.query.dtype), items["exact_value"]
        batch, num_items = key.shape[:2]
        if not torch.compiler.is_compiling():
            check_fits(
                batch * made.query.shape[1] * num_items * key.element_size() * SCORES_HELD, key.device,
                f"longvq: scores of all pairs of {num_items:,} keys (attention: exact)",
                "read the text in shorter chunks after a state, train on shorter rows, or quantise",
            )  # fmt: skip
        own = torch.arange(num_items, device=key.device)
        distance = (own[num_past:, None] - own)[None]
        blind, first = chunk.hidden_items(num_past), chunk.first_visible(num_past)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.settings.bidirectional:
            if chunk.segments is not None:
                visible = chunk.segments[:, :, None] == chunk.segments[:, None]
            real = chunk.real
            visible = visible if real is None else visible & real[:, None]
        else:
            visible = distance >= 0
            visible = visible if first is None else visible & (own >= first[..., None])
            visible = visible if blind is None else visible & ~blind[:, None]
        both_ways = self.settings.bidirectional
        return dense_attention(made.query, key, value, self.local_bias, visible, distance, both_ways)

    def _step_exactly(self, made: Projected, past: InPlace) -> Tensor:
        kept, slot, position = past.kept, past.slot, past.position
        for name, new in (("exact_key", made.key), ("exact_value", made.value)):
            kept[name][slot, position] = new[:, 0].to(kept[name].dtype)
        key, value = kept["exact_key"][slot].to(made.query.dtype), kept["exact_value"][slot]
        distance = (position[:, None] - torch.arange(key.shape[1], device=key.device))[:, None]
        # what no token has filled yet may be any number
        value = value.masked_fill((distance < 0).transpose(1, 2), 0.0)
        return dense_attention(made.query, key, value, self.local_bias, distance >= 0, distance)

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products of attention; a convolution by FFT has no matrix product."""
        settings, matrices = self.settings, self.in_proj.weight.numel()
        if not self.attends:
            return 2 * num_tokens * matrices
        matrices += self.v_proj.weight.numel() + self.out_proj.weight.numel()
        if settings.quantises:
            attended = quantised_flops(
                settings.key_size, self.value_size, num_tokens, settings.block, settings.codes, num_past,
                settings.bidirectional,
            )  # fmt: skip
        else:
            attended = 2 * num_tokens * (num_past + num_tokens) * (settings.key_size + self.value_size)
        return 2 * num_tokens * matrices + attended


class LongVqLayer(Layer):
    """LongVQ (reconstruction): the gated block, then a feed-forward, each behind a norm."""

    name = "longvq"
    remark = "reconstruction"
    Settings = LongVqSettings

    def __init__(self, settings: LongVqSettings, width: int, index: int, shared: Shared) -> None:
        super().__init__()
        self.settings, self.draws_noise = settings, settings.quantises
        made = NORMS[settings.norm]
        self.input_layernorm = made(width, shared.norm_eps)
        self.mixer = LongVqMixer(settings, width, index)
        self.post_attention_layernorm = made(width, shared.norm_eps)
        self.mlp = FeedForward(
            width, settings.intermediate_size, settings.mlp_bias, settings.hidden_act, settings.feed_forward
        )

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Nothing follows from other settings; raises ValueError for what has no meaning beside them."""
        return settled(values, given)

    @classmethod
    def keeps_beside_keys(cls, settings: LongVqSettings) -> str | None:
        """Counts and sums by code, and the state."""
        if settings.bidirectional or not (settings.quantises or settings.ssm != WITHOUT):
            return None
        return "a summary"

    def idle_in(self, num_tokens: int) -> str | None:
        """Codes, where all keys are near."""
        near = 2 * self.settings.block
        if not self.settings.quantises or num_tokens > near:
            return None
        return f"two blocks of {self.settings.block:,} tokens hold the row, so no code is read: take shorter blocks"

    def state_spec(self) -> tuple[StateTensor, ...]:
        """What the mixer keeps."""
        return self.mixer.state_spec()

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process a chunk `[B, T, M]` after its past."""
        gate, new, said = self.mixer(self.input_layernorm(hidden), chunk, past)
        return Output(self._feed(hidden, gate, new), None if past is None else past.after(), said)

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Process one token per row, `[B, 1, M]`, in place over slots."""
        return self._feed(hidden, *self.mixer.step(self.input_layernorm(hidden), chunk, past))

    def _feed(self, hidden: Tensor, gate: Tensor, new: Tensor) -> Tensor:
        """Move the residual stream towards the new state by the gate; then the feed-forward."""
        hidden = hidden + gate * (new - hidden)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Those of the mixer and of the feed-forward."""
        matrices = sum(module.weight.numel() for module in self.mlp.children() if isinstance(module, nn.Linear))
        return self.mixer.flops(num_tokens, num_past) + 2 * num_tokens * matrices

    def reach(self) -> int | None:
        """Everything before."""
        return None

    def refuses_past(self) -> str | None:
        """Tokens that see what comes after them."""
        return REFUSAL if self.settings.bidirectional else None

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions."""
        if chunk.last is None:
            return None
        return "what is far is summed up to each block, so it cannot read a prefix in both directions; use attention"

    def metrics_of(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many codes are in use."""
        assert self.mixer.codebook is not None, "a layer without a codebook returned statistics"
        return self.mixer.codebook.metrics_of(statistics)

    def absorb(self, statistics: Mapping[str, Tensor]) -> None:
        """The codebook follows the keys of the step."""
        assert self.mixer.codebook is not None, "a layer without a codebook returned statistics"
        self.mixer.codebook.absorb(statistics)

    def init_weights(self, shared: Shared) -> None:
        """Channels of queries and keys that differ from the start; distances are nearly alike."""
        mixer = self.mixer
        if mixer.ssm is not None:
            mixer.ssm.init_weights()
        if mixer.codebook is not None:
            mixer.codebook.init_weights()
        if mixer.attends:
            start_normal(mixer.shared_scale, 1.0)
            start(mixer.shared_shift, partial(nn.init.zeros_, mixer.shared_shift))
            start_normal(mixer.local_bias, BIAS_START)
        if shared.output_projection_init_scale != 1:
            # nothing else of the layer is added to the residual stream
            start_normal(self.mlp.down_proj.weight, shared.initializer_range * shared.output_projection_init_scale)

    def optimizer_options(self) -> dict[str, dict[str, Any]]:
        """Nothing pulls scales and biases to zero; the state space has rates of its own."""
        found: dict[str, dict[str, Any]] = {}
        if self.mixer.attends:
            found = {f"mixer.{name}": {"weight_decay": 0.0} for name in ("shared_scale", "shared_shift", "local_bias")}
        if self.mixer.ssm is not None:
            found |= {f"mixer.ssm.{name}": options for name, options in self.mixer.ssm.optimizer_options().items()}
        return found

"""The kind `mamba2`: Mamba-2 (state space duality, arXiv 2405.21060), a recurrence whose state has one decay per head.

A block is a norm, an input projection, a short convolution, the scan, a gated norm and an output projection, added to
the residual stream; it has no feed-forward. Parameter names within the block are those of `transformers`' Mamba2.
Legend: B rows, T tokens, M width, H heads, P head size, N state size, G groups, C channels of the convolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.layers.base import InPlace, Layer, Output, Part, Past, Shared, StateTensor, lay_out
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.norm import GatedRMSNorm, RMSNorm
from swat_lm.layers.pre_norm import start, start_normal
from swat_lm.ops.flops import state_space_flops
from swat_lm.ops.short_convolution import short_convolution, short_convolution_step, tail_after
from swat_lm.ops.state_space import state_space_scan, state_space_step, state_space_summary

# decays of the first step, as the authors' code draws them: -A between these
DECAY_RANGE = (1.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class Mamba2Settings:
    """What may be set of a Mamba-2 layer; in brackets what `transformers` calls it."""

    state_size: int = 128
    """N, numbers kept per channel."""
    expand: int = 2
    """Channels of the recurrence per channel of the model."""
    ssm_head_dim: int = 64
    """P, channels that share a decay (head_dim)."""
    num_groups: int = 1
    """G, groups of heads that share what is written and read (n_groups)."""
    conv_kernel: int = 4
    """Tokens that the convolution sees, its own included."""
    conv_bias: bool = True
    """Bias of the convolution (use_conv_bias)."""
    projection_bias: bool = False
    """Biases of the input and output projections (use_bias)."""
    time_step_min: float = 0.001
    """Steps are drawn between this and the next at the start."""
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    """No step is smaller at the start."""
    time_step_limit: tuple[float, float] | None = None
    """What steps are held to while running; None: nothing."""
    chunk_size: int = 64
    """Tokens that the scan takes at once; the result does not depend on it."""

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        for name in ("state_size", "expand", "ssm_head_dim", "num_groups", "conv_kernel", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.time_step_floor <= self.time_step_min <= self.time_step_max:
            raise ValueError(
                "time_step_min: expected 0 < time_step_floor <= time_step_min <= time_step_max, got "
                f"{self.time_step_floor}, {self.time_step_min}, {self.time_step_max}"
            )
        limit = self.time_step_limit
        if limit is not None and not (len(limit) == 2 and 0 <= limit[0] <= limit[1]):
            raise ValueError(f"time_step_limit: expected two numbers, the smaller first, at least 0; got {list(limit)}")

    def check_width(self, width: int) -> None:
        """Raise ValueError, which begins with the setting's name, for heads that do not fit a model of this width."""
        inner = self.expand * width
        if inner % self.ssm_head_dim:
            raise ValueError(
                f"ssm_head_dim: expected a divisor of expand * hidden_size ({inner}), got {self.ssm_head_dim}"
            )
        if inner // self.ssm_head_dim % self.num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of the {inner // self.ssm_head_dim} heads, got {self.num_groups}"
            )


class ShortConvolution(nn.Conv1d):
    """The convolution's weights, by transformers' names; a module that is called, for whoever offloads weights."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, past: Tensor | None, segments: Tensor | None, real: Tensor | None
    ) -> Tensor:
        """Convolve `[B, T, C]` after the `past` `[B, kernel - 1, C]`; see `short_convolution`."""
        weight, bias = self.weight[:, 0], self.bias
        return short_convolution(inputs, weight, bias, past=past, segments=segments, real=real)[0]


class Mamba2Mixer(nn.Module):
    """Projections, convolution, scan and gated norm."""

    def __init__(self, settings: Mamba2Settings, width: int, norm_eps: float) -> None:
        super().__init__()
        self.settings = settings
        self.inner = settings.expand * width
        self.num_heads = self.inner // settings.ssm_head_dim
        self.num_channels = self.inner + 2 * settings.num_groups * settings.state_size
        bias = settings.projection_bias
        self.in_proj = nn.Linear(width, self.inner + self.num_channels + self.num_heads, bias=bias)
        self.conv1d = ShortConvolution(
            self.num_channels,
            self.num_channels,
            settings.conv_kernel,
            groups=self.num_channels,
            bias=settings.conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        # a module that is called, so that adapters can stand in its place
        self.norm = GatedRMSNorm(self.inner, norm_eps, self.inner // settings.num_groups)
        self.out_proj = nn.Linear(self.inner, width, bias=bias)

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None) -> Tensor:
        """Mix a normed chunk `[B, T, M]`; the past, if any, is moved on."""
        real = chunk.real
        if real is not None:
            # not even NaN passes from a token that does not count, nor does its gradient
            hidden = hidden.masked_fill(~real[..., None], 0.0)
        gate, inputs, steps = self._project(hidden)
        return self._finish(self._mix(inputs, steps, chunk, past), gate)

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Mix parts of a normed row `[1, T, M]`: projections and norm for all at once."""
        gate, inputs, steps = self._project(hidden)
        mixed = [self._mix(inputs[:, part.tokens], steps[:, part.tokens], part.chunk, part.past) for part in parts]
        return self._finish(lay_out(parts, mixed, hidden.shape[1]), gate)

    def _mix(self, inputs: Tensor, steps: Tensor, chunk: Chunk, past: Past | None) -> Tensor:
        """Convolution and scan of what was projected, `[B, T, H, P]`."""
        segments, real = chunk.segments, chunk.real
        tail = None
        if past is not None:
            nothing = inputs.new_zeros(len(inputs), self.settings.conv_kernel - 1, self.num_channels)
            own = {"conv": tail_after(nothing, inputs, segments, real)}

            def join(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
                # where the chunk is shorter than the tail, some of the old one stays
                return {"conv": tail_after(before["conv"].to(inputs.dtype), inputs, segments, real)}

            tail = past.merge(own, join)["conv"].to(inputs.dtype)
        mixed = self.conv1d(inputs, tail, segments, real)
        query, key, value, log_decay, step_size = self._scanned(mixed, steps)
        state = None
        if past is not None:
            decay, added = state_space_summary(key, value, log_decay, step_size, segments=segments, real=real)
            state = past.fold("ssm", decay, added).to(added.dtype)
        output, _ = state_space_scan(
            query, key, value, log_decay, step_size, initial_state=state, segments=segments, real=real, skip=self.D,
            chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return output

    def step(self, hidden: Tensor, past: InPlace) -> Tensor:
        """Mix one normed token per row, `[B, 1, M]`, in place over slots."""
        gate, inputs, steps = self._project(hidden)
        tail = past.kept["conv"]
        mixed = short_convolution_step(
            inputs.to(tail.dtype), self.conv1d.weight[:, 0], self.conv1d.bias, tail, past.slot
        ).to(inputs.dtype)
        query, key, value, log_decay, step_size = self._scanned(mixed, steps)
        output = state_space_step(query, key, value, log_decay, step_size, past.kept["ssm"], past.slot)
        return self._finish(output + value * self.D.to(value.dtype)[:, None], gate)

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Gate `[B, T, inner]`, inputs of the convolution `[B, T, C]` and steps before softplus `[B, T, H]`."""
        return self.in_proj(hidden).split([self.inner, self.num_channels, self.num_heads], dim=-1)

    def _scanned(self, mixed: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan takes of a chunk; in brackets the paper's letters.

        Query (C) and key (B) `[B, T, G, N]`, value (X) `[B, T, H, P]`, logarithms of decays and steps `[B, T, H]`.
        """
        settings = self.settings
        written = settings.num_groups * settings.state_size
        value, key, query = mixed.split([self.inner, written, written], dim=-1)
        precise = torch.promote_types(self.dt_bias.dtype, torch.float32)
        step_size = F.softplus(steps.to(precise) + self.dt_bias.to(precise))
        if settings.time_step_limit is not None:
            step_size = step_size.clamp(*settings.time_step_limit)
        key, query = (x.unflatten(-1, (settings.num_groups, settings.state_size)) for x in (key, query))
        log_decay = -step_size * self.A_log.to(precise).exp()
        return query, key, value.unflatten(-1, (self.num_heads, -1)), log_decay, step_size

    def _finish(self, output: Tensor, gate: Tensor) -> Tensor:
        """Gated norm and output projection."""
        return self.out_proj(self.norm(output.flatten(2), gate))


class Mamba2Layer(Layer):
    """A Mamba-2 block: norm, mixer, residual connection."""

    name = "mamba2"
    Settings = Mamba2Settings

    def __init__(self, settings: Mamba2Settings, width: int, index: int, shared: Shared) -> None:
        super().__init__()
        settings.check_width(width)
        self.norm = RMSNorm(width, shared.norm_eps)
        self.mixer = Mamba2Mixer(settings, width, shared.norm_eps)

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """A pair from JSON or YAML comes as a list; raises ValueError for heads that do not fit the width."""
        limit = values["time_step_limit"]
        values = {**values, "time_step_limit": None if limit is None else tuple(limit)}
        Mamba2Settings(**values).check_width(width)
        return values

    def state_spec(self) -> tuple[StateTensor, ...]:
        """The convolution's last inputs, and the state in float32 at least."""
        mixer, settings = self.mixer, self.mixer.settings
        state = (mixer.num_heads, settings.ssm_head_dim, settings.state_size)
        return (
            StateTensor("conv", (settings.conv_kernel - 1, mixer.num_channels), "summary"),
            StateTensor("ssm", state, "summary", dtype=torch.float32),
        )

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process a chunk `[B, T, M]` after its past."""
        return Output(hidden + self.mixer(self.norm(hidden), chunk, past), None if past is None else past.after())

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Process parts of a row `[1, T, M]`."""
        return hidden + self.mixer.forward_packed(self.norm(hidden), parts)

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Process one token per row, `[B, 1, M]`, in place over slots."""
        return hidden + self.mixer.step(self.norm(hidden), past)

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products of the recurrence: what is written to the state and read from it."""
        mixer = self.mixer
        matrices = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
        return 2 * num_tokens * matrices + state_space_flops(mixer.inner, mixer.settings.state_size, num_tokens)

    def reach(self) -> int | None:
        """Everything before, though faded."""
        return None

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions."""
        if chunk.last is None:
            return None
        return "a recurrence reads in one direction, so it cannot read a prefix in both; use attention for such rows"

    def init_weights(self, shared: Shared) -> None:
        """As the authors' code: decays and steps of many sizes; the convolution as PyTorch starts it."""
        mixer, settings = self.mixer, self.mixer.settings
        start(mixer.A_log, lambda: mixer.A_log.uniform_(*DECAY_RANGE).log_())
        start(mixer.D, lambda: nn.init.ones_(mixer.D))
        start(mixer.dt_bias, lambda: draw_steps(mixer.dt_bias, settings))
        start(mixer.conv1d.weight, lambda: nn.init.kaiming_uniform_(mixer.conv1d.weight, a=math.sqrt(5)))
        if shared.output_projection_init_scale != 1:
            start_normal(mixer.out_proj.weight, shared.initializer_range * shared.output_projection_init_scale)

    def optimizer_options(self) -> dict[str, dict[str, Any]]:
        """What sets decays and steps is not pulled to zero."""
        return {f"mixer.{name}": {"weight_decay": 0.0} for name in ("A_log", "D", "dt_bias")}


def draw_steps(dt_bias: Tensor, settings: Mamba2Settings) -> None:
    """Fill with numbers whose softplus is spread evenly in the logarithm between the least and the largest step."""
    low, high = math.log(settings.time_step_min), math.log(settings.time_step_max)
    steps = torch.empty_like(dt_bias).uniform_(low, high).exp_().clamp_(min=settings.time_step_floor)
    # the inverse of softplus
    dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

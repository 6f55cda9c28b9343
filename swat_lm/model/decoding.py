"""A model laid out for decoding on a CPU: weights stored by input channel and joined, few operations per token.

The parameters become views of the joined matrices, so no byte is held twice; whatever else the model does still works.
Legend: B streams, M model width, H query heads, K key/value heads, D head size, F feed-forward width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.mixers.attention import WindowAttention, rotate_paired
from swat_lm.mixers.norm import RMSNorm
from swat_lm.mixers.protocol import RingMemory
from swat_lm.model.state import StreamState

if TYPE_CHECKING:
    from swat_lm.model.modeling import DecoderLayer, SwatForCausalLM


@dataclass
class LayerPlan:
    """The joined matrices of one layer, `[inputs, outputs]`."""

    attention: WindowAttention
    input_norm: Tensor
    query_key_value: Tensor
    """`[M, (H + 2 K) D]`."""
    output: Tensor
    feed_forward_norm: Tensor
    gate_up: Tensor
    """`[M, 2 F]`."""
    down: Tensor

    def step(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, memory: RingMemory, epsilon: Tensor) -> Tensor:
        """What `DecoderLayer.step` computes, on `[B, M]`."""
        settings = self.attention.settings
        heads, rotated = settings.num_heads, settings.num_heads + settings.num_kv_heads
        joined = torch.mm(_norm(hidden, self.input_norm, epsilon), self.query_key_value)
        joined = joined.view(hidden.shape[0], 1, -1, settings.head_dim)
        query_key = joined[:, :, :rotated]
        if angles is not None:
            query_key = rotate_paired(query_key, *angles)
        query, key = query_key[:, :, :heads], query_key[:, :, heads:]
        mixed = self.attention.attend_step(query, key, joined[:, :, rotated:], memory)
        hidden = torch.addmm(hidden, mixed.view(hidden.shape[0], -1), self.output)
        gate, up = torch.mm(_norm(hidden, self.feed_forward_norm, epsilon), self.gate_up).chunk(2, dim=1)
        return torch.addmm(hidden, F.silu(gate).mul_(up), self.down)


@dataclass
class DecodingPlan:
    """The layers' plans, and what has to be in place for them to describe the model."""

    layers: list[LayerPlan]
    final_norm: Tensor
    head: Tensor
    """`[M, V]`."""
    epsilon: Tensor
    held: list[tuple[dict[str, Any], str, nn.Module, int]]
    """Parent's modules, name, module and address of its weight, as they were planned."""

    def describes_the_model(self) -> bool:
        """Whether no module was replaced (by an adapter, say) and no weight moved (by a cast, a load) since."""
        return all(
            modules[name] is module and module._parameters["weight"].data_ptr() == address  # type: ignore[union-attr]
            for modules, name, module, address in self.held
        )

    def step(self, hidden: Tensor, angles: list[tuple[Tensor, Tensor] | None], state: StreamState) -> Tensor:
        """Hidden states `[B, M]` before the layers to hidden states after the final norm."""
        for layer, layer_angles, memory in zip(self.layers, angles, state.step_memories(), strict=True):
            hidden = layer.step(hidden, layer_angles, memory, self.epsilon)
        return _norm(hidden, self.final_norm, self.epsilon)


def arrange(model: "SwatForCausalLM") -> DecodingPlan | None:
    """Store the weights by input channel and join those with the same input; returns the plan that uses them.

    None where the model has what a plan does not cover (biases, qk_norm, adapters, fewer than 32 bits): its weights are
    laid out all the same.
    """
    stack = model.model.stack
    for layer in stack:
        attention, feed_forward = layer.self_attn, layer.mlp
        groups = [[feed_forward.gate_proj, feed_forward.up_proj], [feed_forward.down_proj]]
        if isinstance(attention, WindowAttention):
            groups += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        for group in groups:
            _join([module for module in group if type(module) is nn.Linear])
    if not model.config.tie_word_embeddings and type(model.lm_head) is nn.Linear:
        # looking a token up in a tied one would touch one cache line per channel
        _join([model.lm_head])
    if not all(_is_covered(layer) for layer in stack) or not _is_plain(model.lm_head):
        return None
    if model.lm_head.weight.dtype not in (torch.float32, torch.float64):
        return None
    return DecodingPlan(
        [_plan(layer) for layer in stack],
        model.model.norm.weight.detach(),
        model.lm_head.weight.detach().t(),
        torch.full((1, 1, 1), model.config.rms_norm_eps, dtype=model.lm_head.weight.dtype),
        [entry for parent in model.modules() for entry in _held(parent)],
    )


def contiguous_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict) -> None:
    """A hook for `state_dict()`: weights leave as matrices of their own, as files need them."""
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and not value.is_contiguous():
            state_dict[name] = value.contiguous()


def _plan(layer: "DecoderLayer") -> LayerPlan:
    attention = layer.self_attn
    assert isinstance(attention, WindowAttention)
    return LayerPlan(
        attention,
        layer.input_layernorm.weight.detach(),
        _joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention.o_proj.weight.detach().t(),
        layer.post_attention_layernorm.weight.detach(),
        _joined([layer.mlp.gate_proj, layer.mlp.up_proj]),
        layer.mlp.down_proj.weight.detach().t(),
    )


def _join(modules: list[nn.Linear]) -> None:
    """Make the weights views of one matrix `[inputs, outputs of all]`."""
    if not modules:
        return
    matrix = torch.cat([module.weight.data.t() for module in modules], dim=1).contiguous()
    for module, part in zip(modules, matrix.split([module.out_features for module in modules], dim=1), strict=True):
        module.weight.data = part.t()


def _joined(modules: list[nn.Linear]) -> Tensor:
    """The matrix that `_join` has made of these weights."""
    first = modules[0].weight.detach()
    width = sum(module.out_features for module in modules)
    return first.t().as_strided((first.shape[1], width), (width, 1), first.storage_offset())


def _is_covered(layer: "DecoderLayer") -> bool:
    attention = layer.self_attn
    if not isinstance(attention, WindowAttention) or attention.q_norm is not None:
        return False
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, *layer.mlp.children())
    return all(_is_plain(module) for module in linears)


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.bias is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _held(parent: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module, int]]:
    return [
        (parent._modules, name, child, child.weight.data_ptr())
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | RMSNorm)
    ]


def _norm(hidden: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    # the mean square and epsilon in one product; the fused norm of PyTorch is a dozen operations on a CPU
    row = hidden.unsqueeze(1)
    scale = torch.baddbmm(epsilon, row, row.mT, alpha=1 / hidden.shape[1]).rsqrt_().squeeze(1)
    return (hidden * scale).mul_(weight)

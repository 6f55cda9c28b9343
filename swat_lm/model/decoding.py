"""A model laid out for decoding on a CPU: weights joined and stored as they are read fastest, few operations per token.

The parameters become views of the joined matrices, so no byte is held twice; whatever else the model does still works.
Legend: B streams, M model width, H query heads, K key/value heads, D head size, F feed-forward width.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.mixers.attention import WindowAttention, rotate_paired
from swat_lm.mixers.norm import RMSNorm
from swat_lm.mixers.protocol import RingMemory
from swat_lm.model.rotary import LayerRotary
from swat_lm.model.state import StreamState
from swat_lm.ops.head_bias import head_bias, score_dtype
from swat_lm.ops.ring import periodic_table, step_together

if TYPE_CHECKING:
    from swat_lm.model.modeling import DecoderLayer, SwatForCausalLM

# narrower pieces of a matrix are read more slowly than a thread gains
MIN_OUTPUTS = 128


class Matrix:
    """A weight matrix `[inputs, outputs]` as decoding multiplies with it.

    PyTorch's product of one row with a matrix uses one thread only, but a batch of products uses all: for one stream
    the outputs are cut into as many pieces as there are threads.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.whole = matrix
        self._num_pieces = 1
        self._pieces = matrix.unsqueeze(0)

    def cut(self, num_threads: int) -> None:
        """Cut the outputs into equal pieces of at least MIN_OUTPUTS, at most one per thread."""
        num_outputs = self.whole.shape[1]
        most = max(1, min(num_threads, num_outputs // MIN_OUTPUTS))
        self._num_pieces = max(count for count in range(1, most + 1) if num_outputs % count == 0)
        self._pieces = self.whole.unflatten(1, (self._num_pieces, -1)).transpose(0, 1)

    def times(self, rows: Tensor) -> Tensor:
        """`rows [B, inputs]` times the matrix, `[B, outputs]`."""
        if self._num_pieces == 1 or rows.shape[0] > 1:
            return torch.mm(rows, self.whole)
        return torch.bmm(rows.expand(self._num_pieces, 1, -1), self._pieces).view(1, -1)

    def times_plus(self, rows: Tensor, residual: Tensor) -> Tensor:
        """`residual [B, outputs]` and the product."""
        if self._num_pieces == 1 or rows.shape[0] > 1:
            return torch.addmm(residual, rows, self.whole)
        return self.times(rows).add_(residual)


class Norm:
    """`RMSNorm` over a weight of M channels in four operations; the fused norm of PyTorch is a dozen on a CPU."""

    def __init__(self, module: RMSNorm) -> None:
        self.weight = module.weight.detach()
        self.root = math.sqrt(self.weight.shape[0])
        # epsilon as if it were one more channel
        self.floor = self.weight.new_tensor(math.sqrt(module.eps) * self.root)
        self.zero = self.weight.new_zeros(())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Normalise `[B, M]`."""
        length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).hypot_(self.floor)
        return torch.addcdiv(self.zero, hidden * self.weight, length, value=self.root)


@dataclass
class LayerPlan:
    """The norms and the joined matrices of one layer, `[inputs, outputs]`."""

    attention: WindowAttention
    input_norm: Norm
    query_key_value: Matrix
    """`[M, (H + 2 K) D]`."""
    output: Matrix
    feed_forward_norm: Norm
    gate_up: Matrix
    """`[M, 2 F]`."""
    down: Matrix
    _table: Tensor | None = None
    """The bias of the ring's places."""

    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return self.query_key_value, self.output, self.gate_up, self.down

    def step(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, memory: RingMemory, position: int | None
    ) -> Tensor:
        """What `DecoderLayer.step` computes, on `[B, M]`; the position is None where the streams' differ."""
        settings, batch = self.attention.settings, hidden.shape[0]
        heads, kv_heads = settings.num_heads, settings.num_kv_heads
        joined = self.query_key_value.times(self.input_norm(hidden)).view(batch, 1, -1, settings.head_dim)
        query_key, value = joined.narrow(2, 0, heads + kv_heads), joined.narrow(2, heads + kv_heads, kv_heads)
        if angles is not None:
            query_key = rotate_paired(query_key, *angles)
        query, key = query_key.narrow(2, 0, heads), query_key.narrow(2, heads, kv_heads)
        mixed = self._attend(query, key, value, memory, position)
        hidden = self.output.times_plus(mixed.view(batch, -1), hidden)
        gate, up = self.gate_up.times(self.feed_forward_norm(hidden)).chunk(2, dim=1)
        return self.down.times_plus(F.silu(gate).mul_(up), hidden)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, memory: RingMemory, position: int | None) -> Tensor:
        settings, ring = self.attention.settings, memory.key_ring
        if position is None or key.dtype != ring.dtype or settings.backend == "reference":
            return self.attention.attend_step(query, key, value, memory)
        table = self._table
        # a ring of full attention grows
        if table is None or table.shape[2] != 2 * ring.shape[1] or table.dtype != score_dtype(query):
            bias = head_bias(self.attention.slopes_on(ring.device), None, settings.score_bias, query)
            table = self._table = periodic_table(ring.shape[1], settings.num_kv_heads, bias)
        output, lse = step_together(
            query, key, value, ring, memory.value_ring, position, table, settings.score_function,
            settings.head_dim**-0.5, return_lse=settings.learned_sink,
        )  # fmt: skip
        return self.attention.heads_output(output if lse is None else (output, lse))


@dataclass
class DecodingPlan:
    """The layers' plans, and what has to be in place for them to describe the model."""

    layers: list[LayerPlan]
    final_norm: Norm
    head: Matrix
    """`[M, V]`."""
    held: list[tuple[dict[str, Any], str, nn.Module, int]]
    """Parent's modules, name, module and address of its weight, as they were planned."""
    num_threads: int = 1

    def describes_the_model(self) -> bool:
        """Whether no module was replaced (by an adapter, say) or hooked, and no weight moved (by a cast) since."""
        for modules, name, module, address in self.held:
            weight = module._parameters.get("weight")
            if modules[name] is not module or weight is None or weight.data_ptr() != address:
                return False
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        return True

    def step(self, hidden: Tensor, rotary: LayerRotary, state: StreamState) -> Tensor:
        """Hidden states `[B, M]` before the layers to hidden states after the final norm."""
        if self.num_threads != torch.get_num_threads():
            self.num_threads = torch.get_num_threads()
            for matrix in (self.head, *(matrix for layer in self.layers for matrix in layer.matrices())):
                matrix.cut(self.num_threads)
        position = state.common_position()
        angles = rotary.step_angles(state.position if position is None else state.position[:1], hidden.dtype)
        for layer, layer_angles, memory in zip(self.layers, angles, state.step_memories(), strict=True):
            hidden = layer.step(hidden, layer_angles, memory, position)
        return self.final_norm(hidden)


def arrange(model: "SwatForCausalLM") -> DecodingPlan | None:
    """Store the weights by input channel and join those with the same input; returns the plan that uses them.

    None where the model has what a plan does not cover (biases, qk_norm, adapters, fewer than 32 bits): its weights are
    laid out all the same.
    """
    stack = model.model.stack
    for layer in stack:
        attention, feed_forward = layer.self_attn, layer.mlp
        # down_proj stays as it is: few outputs of many inputs are read faster by rows
        groups = [[feed_forward.gate_proj, feed_forward.up_proj]]
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
        Norm(model.model.norm),
        Matrix(model.lm_head.weight.detach().t()),
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
        Norm(layer.input_layernorm),
        Matrix(_joined([attention.q_proj, attention.k_proj, attention.v_proj])),
        Matrix(attention.o_proj.weight.detach().t()),
        Norm(layer.post_attention_layernorm),
        Matrix(_joined([layer.mlp.gate_proj, layer.mlp.up_proj])),
        Matrix(layer.mlp.down_proj.weight.detach().t()),
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

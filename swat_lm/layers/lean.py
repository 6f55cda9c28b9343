"""Layers laid out for decoding on a CPU: weights joined and stored as they are read fastest, few operations per token.

The parameters become views of the joined matrices, so no byte is held twice; whatever else the model does still works.
Legend: B streams, M model width, H query heads, K key/value heads, D head size, F feed-forward width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.layers.base import InPlace
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.first_tokens import Heads, join_heads
from swat_lm.layers.norm import RMSNorm
from swat_lm.ops.head_bias import head_bias, score_dtype
from swat_lm.ops.ring import periodic_table, step_by_row, step_together
from swat_lm.ops.rotary import rotate_paired

if TYPE_CHECKING:
    from swat_lm.layers.attention import AttentionLayer

# narrower pieces of a matrix are read more slowly than a thread gains
MIN_OUTPUTS = 128
# outputs of a panel, and the batches that are multiplied by panels: fewer or more rows are faster by the whole matrix
PANEL, PANEL_ROWS = 32, range(2, 49)


class Matrix:
    """A weight matrix `[inputs, outputs]` as decoding multiplies with it.

    PyTorch's product of one row with a matrix uses one thread only, but a batch of products uses all: for one stream
    the outputs are cut into as many pieces as there are threads.
    """

    def __init__(self, matrix: Tensor, parameters: Sequence[Tensor] = ()) -> None:
        """`matrix` is a view of the parameters, in whose joined memory it lies."""
        self.whole, self.parameters = matrix, parameters
        self._num_pieces = 1
        self._pieces = matrix.unsqueeze(0)
        self._panels: Tensor | None = None
        self._versions: list[int] = []
        self._left = 0

    def cut(self, num_threads: int) -> None:
        """Cut the outputs into equal pieces of at least MIN_OUTPUTS, at most one per thread."""
        num_outputs = self.whole.shape[1]
        most = max(1, min(num_threads, num_outputs // MIN_OUTPUTS))
        self._num_pieces = max(count for count in range(1, most + 1) if num_outputs % count == 0)
        self._pieces = self.whole.unflatten(1, (self._num_pieces, -1)).transpose(0, 1)

    def lay_out_panels(self) -> None:
        """Hold the numbers a second time, in panels of a few outputs, each in one piece of memory.

        PyTorch's product of a few rows with a wide matrix copies most of the matrix on the way, or strides through it:
        a batch of products with panels that a cache holds does neither, and takes two thirds of the time. Once a
        parameter is changed in place, as by `load_state_dict` or an optimizer, panels are left alone.
        """
        if not self.panel_bytes:
            return
        left = self.whole.shape[1] % PANEL
        panels = self.whole[:, : self.whole.shape[1] - left].unflatten(1, (-1, PANEL)).transpose(0, 1)
        # the last outputs as a whole panel: in a narrow product a row's bits depend on its place
        self._panels = torch.cat((panels, self.whole[None, :, -PANEL:])) if left else panels.contiguous()
        self._left, self._versions = left, list(map(version, self.parameters))

    def _panels_for(self, num_rows: int) -> Tensor | None:
        if self._panels is None or num_rows not in PANEL_ROWS or self._versions != list(map(version, self.parameters)):
            return None
        return self._panels

    @property
    def panel_bytes(self) -> int:
        """What panels take, or would take; none are made of fewer outputs than one has."""
        num_inputs, num_outputs = self.whole.shape
        return 0 if num_outputs < PANEL else num_inputs * -(-num_outputs // PANEL) * PANEL * self.whole.element_size()

    def times(self, rows: Tensor) -> Tensor:
        """`rows [B, inputs]` times the matrix, `[B, outputs]`."""
        panels = self._panels_for(rows.shape[0])
        if panels is not None:
            product = torch.bmm(rows.expand(panels.shape[0], *rows.shape), panels)
            outputs = product.transpose(0, 1).reshape(rows.shape[0], -1)
            if self._left:
                return torch.cat((outputs[:, :-PANEL], outputs[:, -self._left :]), dim=1)
            return outputs
        if self._num_pieces == 1 or rows.shape[0] > 1:
            return torch.mm(rows, self.whole)
        return torch.bmm(rows.expand(self._num_pieces, 1, -1), self._pieces).view(1, -1)

    def times_plus(self, rows: Tensor, residual: Tensor) -> Tensor:
        """`residual [B, outputs]` and the product."""
        if self._panels is None and (self._num_pieces == 1 or rows.shape[0] > 1):
            return torch.addmm(residual, rows, self.whole)
        return self.times(rows).add_(residual)


def version(parameter: Tensor) -> int:
    """Counts changes in place; what was made for inference alone has no count, nor a way to be loaded into."""
    return 0 if parameter.is_inference() else parameter._version


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


class LayerPlan(ABC):
    """What a layer computes for one token per stream, with fewer operations."""

    def __init__(self, layer: nn.Module) -> None:
        self.held: Held = [entry for parent in layer.modules() for entry in held_by(parent)]
        """What has to be in place for the plan to describe the layer."""

    def describes_the_layer(self) -> bool:
        """Whether no module was replaced (by an adapter, say) or hooked, and no weight moved (by a cast) since."""
        return are_in_place(self.held)

    @abstractmethod
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices, to be cut for the number of threads."""

    @abstractmethod
    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace, position: int | None) -> Tensor:
        """What the layer's `step` computes, on `[B, M]`; the position is None where the streams' differ."""


class AttentionPlan(LayerPlan):
    """The norms and the joined matrices of a layer of windowed attention, `[inputs, outputs]`."""

    def __init__(self, layer: "AttentionLayer") -> None:
        super().__init__(layer)
        attention, feed_forward = layer.self_attn, layer.mlp
        self.attention = attention
        assert isinstance(layer.input_layernorm, RMSNorm)
        assert isinstance(layer.post_attention_layernorm, RMSNorm)
        assert feed_forward.gate_proj is not None
        self.input_norm = Norm(layer.input_layernorm)
        # [M, (H + 2 K) D]
        self.query_key_value = of_joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = of_one(attention.o_proj)
        self.feed_forward_norm = Norm(layer.post_attention_layernorm)
        # [M, 2 F]
        self.gate_up = of_joined([feed_forward.gate_proj, feed_forward.up_proj])
        self.down = of_one(feed_forward.down_proj)
        # the bias of the ring's places, and with which state of what is learned it was made
        self._table: Tensor | None = None
        self._table_of: tuple[tuple[float, ...], ...] = ()
        self._adds_nothing = False

    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return self.query_key_value, self.output, self.gate_up, self.down

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace, position: int | None) -> Tensor:
        """What `AttentionLayer.step` computes, on `[B, M]`."""
        attention, batch = self.attention, hidden.shape[0]
        settings = attention.settings
        heads, kv_heads = settings.num_attention_heads, settings.num_key_value_heads
        joined = self.query_key_value.times(self.input_norm(hidden)).view(batch, 1, -1, settings.head_dim)
        query_key, value = joined.narrow(2, 0, heads + kv_heads), joined.narrow(2, heads + kv_heads, kv_heads)
        far = None
        if attention.first_tokens is not None:
            query, key = query_key.narrow(2, 0, heads), query_key.narrow(2, heads, kv_heads)
            far = attention.first_tokens.step(query, key, value, chunk, past)
        if attention.rotary is not None:
            query_key = rotate_paired(query_key, *chunk.step_angles(attention.rotary, hidden.dtype))
        query, key = query_key.narrow(2, 0, heads), query_key.narrow(2, heads, kv_heads)
        hidden = self.output.times_plus(
            self._attend(query, key, value, chunk, past, position, far).view(batch, -1), hidden
        )
        gate, up = self.gate_up.times(self.feed_forward_norm(hidden)).chunk(2, dim=1)
        return self.down.times_plus(F.silu(gate).mul_(up), hidden)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunk: Chunk,
        past: InPlace,
        position: int | None,
        far: Heads | None,
    ) -> Tensor:
        attention, ring = self.attention, past.kept["key"]
        settings = attention.settings
        if (
            key.dtype != ring.dtype
            or settings.attention_backend == "reference"
            or (position is None and not chunk.batch_invariant)
        ):
            return self.attention.attend_step(query, key, value, past, None, far, chunk.batch_invariant)
        # what first tokens take is nothing where none is behind a window
        asks_for_lse = settings.learned_sink or (attention.asks_for_lse and far is not None)
        options = {"return_lse": asks_for_lse, "softcap": settings.attn_logit_softcapping}
        settled = settings.score_function, attention.scale
        rings, table = (ring, past.kept["value"]), self._bias_table(query, ring)
        if position is None:
            table = None if self._adds_nothing else table
            output, lse = step_by_row(query, key, value, *rings, past.slot, past.position, table, *settled, **options)
        else:
            output, lse = step_together(query, key, value, *rings, position, table, *settled, **options)
        return self.attention.heads_output(join_heads(output if lse is None else (output, lse), far))

    def _bias_table(self, query: Tensor, ring: Tensor) -> Tensor:
        """What is added to the scores of a ring's places, see `periodic_table`."""
        attention, table = self.attention, self._table
        learned = attention.slopes, attention.score_bias
        # a handful of numbers: writes past the version counter are seen too
        made_of = tuple(() if parameter is None else tuple(parameter.tolist()) for parameter in learned)
        # a ring of full attention grows, and an optimizer's step leaves parameters in their places
        if (
            table is None
            or table.shape[2] != 2 * ring.shape[1]
            or table.dtype != score_dtype(query)
            or made_of != self._table_of
        ):
            number = attention.bias()
            given = (number, 0.0) if isinstance(number, Tensor) else (None, number)
            bias = head_bias(attention.slopes_on(ring.device), *given, query)
            table = self._table = periodic_table(ring.shape[1], attention.settings.num_key_value_heads, bias)
            self._table_of, self._adds_nothing = made_of, not bool(table.any())
        return table


def plan_attention(layer: "AttentionLayer") -> AttentionPlan | None:
    """Store the weights by input channel and join those with the same input; returns the plan that uses them.

    None where the layer has what a plan does not cover (biases, qk_norm, a relative bias, norms behind or of another
    kind than RMS, a feed-forward without a gate, a gate on heads, a scaled residual stream, another activation than
    SiLU, adapters, fewer than 32 bits): its weights are laid out all the same.
    """
    attention, feed_forward = layer.self_attn, layer.mlp
    # down_proj stays as it is: few outputs of many inputs are read faster by rows
    for group in (
        [feed_forward.gate_proj, feed_forward.up_proj],
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
    ):
        join([module for module in group if type(module) is nn.Linear and type(module.weight) is nn.Parameter])
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, *feed_forward.children())
    if (
        attention.q_norm is not None
        or attention.relative_bias is not None
        or attention.settings.norm_placement != "pre"
        or attention.settings.norm != "rms"
        or attention.settings.feed_forward != "gated"
        or attention.settings.hidden_act != "silu"
        or layer.residual_multiplier != 1
        or layer.layer_scale is not None
        or attention.gate_proj is not None
        or not all(is_plain(module) for module in linears)
    ):
        return None
    return AttentionPlan(layer) if attention.q_proj.weight.dtype in (torch.float32, torch.float64) else None


def join(modules: list[nn.Linear]) -> None:
    """Make the weights views of one matrix `[inputs, outputs of all]`."""
    if not modules:
        return
    matrix = torch.cat([module.weight.data.t() for module in modules], dim=1).contiguous()
    for module, part in zip(modules, matrix.split([module.out_features for module in modules], dim=1), strict=True):
        module.weight.data = part.t()


def of_one(module: nn.Linear) -> Matrix:
    """The matrix of one linear map."""
    return Matrix(module.weight.detach().t(), [module.weight])


def of_joined(modules: list[nn.Linear]) -> Matrix:
    """The matrix that `join` has made of these weights."""
    first = modules[0].weight.detach()
    width = sum(module.out_features for module in modules)
    matrix = first.t().as_strided((first.shape[1], width), (width, 1), first.storage_offset())
    return Matrix(matrix, [module.weight for module in modules])


def is_plain(module: nn.Module) -> bool:
    """Whether a plan may multiply with the weight instead of calling the module."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.bias is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


Held = list[tuple[dict[str, Any], str, nn.Module, int]]
"""Parent's modules, name, module and address of its weight, as they were planned."""


def held_by(parent: nn.Module) -> Held:
    """The linear maps and norms right below a module."""
    return [
        (parent._modules, name, child, child.weight.data_ptr())
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | RMSNorm)
    ]


def are_in_place(held: Held) -> bool:
    """Whether no module was replaced or hooked, and no weight moved, since they were noted."""
    for modules, name, module, address in held:
        weight = module._parameters.get("weight")
        if modules[name] is not module or weight is None or weight.data_ptr() != address:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True

"""What the models return: Hugging Face's outputs, with what training by chunks and auxiliary losses need beside."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from swat_lm.layers.base import Auxiliary
from swat_lm.model.pasts import Carry


@dataclass
class SwatModelOutput(BaseModelOutputWithPast):
    """With the carry for the next chunk, and what layers say beside."""

    carry: Carry | None = None
    auxiliary: tuple[Auxiliary, ...] | None = None
    """One per layer; None where no layer says anything."""


@dataclass
class SwatCausalLMOutput(CausalLMOutputWithPast):
    """With the hidden states after the final norm, the carry for the next chunk, and what layers say beside."""

    last_hidden_state: Tensor | None = None
    carry: Carry | None = None
    auxiliary: tuple[Auxiliary, ...] | None = None

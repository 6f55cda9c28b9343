"""What may be set of a layer of the kind `taipan`, and what of it cannot be."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swat_lm.layers.attention_settings import AttentionSettings

EXECUTIONS = ("dense", "sparse")
SELECTIONS = ("gate", "random", "all")


@dataclass(frozen=True, kw_only=True)
class TaipanSettings:
    """What may be set of a Taipan layer (arXiv 2410.18572); in brackets the paper's letters."""

    sliding_window: int | None = 2048
    """Tokens that a chosen one sees, itself included (w)."""
    capacity: float = 0.15
    """Share of the tokens of a row that the budget leaves to attention (C)."""
    budget_weight: float = 1.0
    """What the budget's loss is multiplied by (lambda); the paper gives none."""
    temperature: float = 1.0
    """Of the gate's softmax in training (tau); the paper gives none."""
    gate_layers: int = 1
    """1: the gate is a linear map; 2: one with SiLU and a quarter of the width between."""
    selection: str = "gate"
    """"gate": by the gate. Controls: "random": `capacity` of the tokens by chance; "all": all of them."""
    execution: str = "dense"
    """"dense": attention for all rows, of which the unchosen count nothing, so that the gate learns what each would
    have been worth; "sparse": for chosen rows alone, and the gate learns of the others by the budget only."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "softmax"
    """The paper's; the configuration's field of the same name does not change it, an entry of the plan does."""
    score_bias: float | str = 0.0
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        if not 0 < self.capacity < 1:
            raise ValueError(
                f"capacity: expected a share of the tokens above 0 and below 1, such as 0.15, got {self.capacity}; "
                "for attention on all tokens set selection='all' or use the kind attention"
            )
        if not 0 <= self.budget_weight < math.inf:
            raise ValueError(f"budget_weight: expected a number of at least 0, got {self.budget_weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.gate_layers not in (1, 2):
            raise ValueError(f"gate_layers: expected 1 or 2, got {self.gate_layers}")
        for name, words in (("selection", SELECTIONS), ("execution", EXECUTIONS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, words))}, got {getattr(self, name)!r}")
        if self.execution == "sparse" and self.sliding_window is None:
            raise ValueError(
                "execution: 'sparse' gathers the rows of a window, and the layer has none; give it a sliding_window, "
                "or set execution='dense'"
            )
        if self.execution == "sparse" and self.selection == "all":
            raise ValueError(
                "execution: 'sparse' leaves out rows that are not chosen, and selection='all' chooses all of them; "
                "set execution='dense'"
            )
        self.attention()

    def attention(self) -> AttentionSettings:
        """Those of the attention inside: no rotary and no slopes. Raises ValueError, as above."""
        return AttentionSettings(
            sliding_window=self.sliding_window,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            score_function=self.score_function,
            slopes="none",
            score_bias=self.score_bias,
            use_rotary=False,
            attention_backend=self.attention_backend,
        )

    def first_bias(self) -> Tensor:
        """The gate's bias `[2]` at the start: with noise it lets through the mean of the capacity and all."""
        share = (1 + self.capacity) / 2
        half = math.log(share / (1 - share)) / 2
        return torch.tensor([-half, half])

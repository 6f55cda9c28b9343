"""A whole training step at 340M parameters: the presets, and Hugging Face's models of these sizes with FlashAttention.

A step is forward with labels under bfloat16 autocast, backward, and a fused AdamW step on float32 weights. FLOPs are
useful ones, by `swat_lm.model.cost`; their rate over the data sheet's is what others call MFU.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks import measure
from benchmarks.gpu.candidates import NotHereError
from benchmarks.gpu.comparison import one_line, peer_failures
from benchmarks.gpu.device import Device, Roof
from swat_lm import SwatForCausalLM
from swat_lm.model import cost
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.presets import preset_fields

Builder = Callable[[SwatConfig], nn.Module]
SIGMOID, SOFTMAX = "swat-340m", "softmax-window-340m"


def load_config(preset: str, length: int, **changes: Any) -> SwatConfig:
    """A preset for sequences of a length."""
    return SwatConfig(**{**preset_fields(preset), "max_position_embeddings": length, **changes})


def _hugging_face_fields(config: SwatConfig, attention: str) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    return {**{name: getattr(config, name) for name in names}, "attn_implementation": attention}


def mistral(config: SwatConfig) -> nn.Module:
    """The softmax window twin on FlashAttention-2, which has the window."""
    if importlib.util.find_spec("flash_attn") is None:
        raise NotHereError("a window with FlashAttention needs the package flash-attn")
    fields = _hugging_face_fields(config, "flash_attention_2")
    return MistralForCausalLM(MistralConfig(**fields, sliding_window=config.window(0)))


def llama(config: SwatConfig) -> nn.Module:
    """The full attention twin on the FlashAttention inside PyTorch's scaled_dot_product_attention."""
    return LlamaForCausalLM(LlamaConfig(**_hugging_face_fields(config, "sdpa")))


# name: the model, and the preset whose pairs its FLOPs count
BUILDERS: Mapping[str, tuple[str, Builder]] = {
    "swat-lm sigmoid window": (SIGMOID, SwatForCausalLM),
    "swat-lm softmax window": (SOFTMAX, SwatForCausalLM),
    "Mistral, FlashAttention-2 window": (SOFTMAX, mistral),
    "Llama, SDPA full attention": ("transformer-340m", llama),
}


class TrainingStep:
    """One model with its optimizer and a batch of random tokens."""

    def __init__(self, model: nn.Module, batch: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(vocabulary, (batch, length), generator=generator).to(device)

    def __call__(self) -> None:
        """Take one step."""
        with torch.autocast(self.tokens.device.type, dtype=torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def compare_training(
    batch: int,
    length: int,
    device: Device,
    roof: Roof,
    peak: float | None,
    rounds: int,
    builders: Mapping[str, tuple[str, Builder]] = BUILDERS,
    **changes: Any,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time a step of every model in turns; one row per model, and why others are absent.

    Args:
        changes: fields of the presets to change.
    """
    steps: dict[str, TrainingStep] = {}
    absent = {}
    configs = {name: load_config(preset, length, **changes) for name, (preset, _) in builders.items()}
    for name, (_, build) in builders.items():
        try:
            step = TrainingStep(build(configs[name]), batch, length, configs[name].vocab_size, device.torch_device)
            step()
        except NotHereError as error:
            absent[name] = str(error)
        except peer_failures() as error:
            absent[name] = one_line(error)
        else:
            steps[name] = step
        device.free()
    timings = measure.take_turns(steps, rounds, clock=device.clock)
    ours = timings.get("swat-lm sigmoid window")
    rows = []
    for name, timing in timings.items():
        flops = batch * length * cost.training_flops_per_token(configs[name], length) / timing.median
        rows.append(
            {
                "training step": name,
                "batch": batch,
                "length": length,
                "ms": timing.median * 1e3,
                "tokens/s": batch * length / timing.median,
                "share of products": flops / roof.flops_per_second,
                "MFU": None if peak is None else flops / peak,
                "ours is faster, times": None if ours is None else ours.times_faster_than(timing),
            }
        )
    return rows, absent

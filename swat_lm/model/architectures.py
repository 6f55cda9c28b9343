"""Every architecture a recipe can train: ours, and baselines from libraries through the same trainer.

`model: {architecture: mamba2, ...}` takes the library configuration's own fields. Library classes are used as they are;
only the loss is ours (in chunks of tokens), so that a large vocabulary costs no memory.
Legend: B batch, T tokens, M model width, V vocabulary.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from swat_lm.model.configuration import SwatConfig
from swat_lm.model.conversion import convert_config
from swat_lm.model.cost import Parameters, count_parameters, state_bytes, training_flops_per_token
from swat_lm.model.fitting import explain_misfit
from swat_lm.model.loss import chunked_cross_entropy
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.model.targets import next_tokens
from swat_lm.words import did_you_mean

__all__ = [
    "ARCHITECTURES",
    "OURS",
    "Flops",
    "Library",
    "build_model",
    "check_known",
    "check_trainable",
    "configure_model",
    "count_model_parameters",
    "exported_class",
    "library_class",
    "model_state_bytes",
    "streaming_inputs",
    "training_flops",
]

OURS = "swat"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FLA_PACKAGE = "flash-linear-attention"


@dataclass(frozen=True)
class Library:
    """One architecture of a library."""

    module: str
    """Where `config` and `model` are imported from."""
    config: str
    model: str
    keeps_documents_apart: bool = False
    """Whether positions that start anew keep the documents of a row from seeing each other."""
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda model: {}
    """Fields that make the library's class this architecture; the recipe's own go over them."""
    requires: tuple[tuple[str, str], ...] = ()
    """(module, package to install); such architectures run on CUDA only."""


def only_linear_layers(model: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3-Next without its experts and its full-attention layers is Gated DeltaNet with a SwiGLU feed-forward."""
    count = model.get("num_hidden_layers")
    layers = ["linear_attention"] * count if isinstance(count, int) else None
    # its own cache asks an attention layer for the length, so plain calls must not make one; see `streaming_inputs`
    return {"num_experts": 0, "layer_types": layers, "use_cache": False}


FLA = (("fla", FLA_PACKAGE), ("triton", "triton"))
ARCHITECTURES: dict[str, Library] = {
    "llama": Library("transformers", "LlamaConfig", "LlamaForCausalLM", keeps_documents_apart=True),
    "mistral": Library("transformers", "MistralConfig", "MistralForCausalLM", keeps_documents_apart=True),
    "mamba2": Library("transformers", "Mamba2Config", "Mamba2ForCausalLM"),
    "gated_deltanet": Library(
        "transformers", "Qwen3NextConfig", "Qwen3NextForCausalLM", defaults=only_linear_layers
    ),
    "retnet": Library("fla.models", "RetNetConfig", "RetNetForCausalLM", requires=FLA),
    "gla": Library("fla.models", "GLAConfig", "GLAForCausalLM", requires=FLA),
    "deltanet": Library("fla.models", "DeltaNetConfig", "DeltaNetForCausalLM", requires=FLA),
    "mamba": Library(
        "fla.models", "MambaConfig", "MambaForCausalLM", requires=(*FLA, ("mamba_ssm", "mamba-ssm"))
    ),
}  # fmt: skip
"""By the name that a recipe gives as `model.architecture`; `swat` is ours and the default."""


class Flops(NamedTuple):
    """Useful FLOPs of training, per token."""

    per_token: float
    method: Literal["formula", "estimate: 6 x parameters without the input embedding"]


def configure_model(model: Mapping[str, Any], vocab_size: int | None = None) -> PreTrainedConfig:
    """The configuration that a recipe's `model:` describes: `architecture: NAME` and that architecture's own fields.

    Args:
        vocab_size: the tokenizer's; used where the mapping itself names no vocab_size.

    Raises:
        ValueError: an unknown architecture or key (the nearest valid one is named), a wrong value, a package that is
            not installed.
    """
    name = model.get("architecture", OURS)
    # `preset: null` is how a recipe that inherits drops the preset of the other
    values: dict[str, Any] = {
        key: value for key, value in model.items() if key != "architecture" and (key, value) != ("preset", None)
    }
    if name == OURS:
        return config_from_recipe(values, vocab_size)
    if name not in ARCHITECTURES:
        known = (OURS, *ARCHITECTURES)
        hint = did_you_mean(name, known, ".")
        raise ValueError(f"model.architecture: unknown architecture {name!r}{hint} Known are {', '.join(known)}")
    library = ARCHITECTURES[name]
    kind = library_class(name, "config")
    # a recipe that inherits drops what the other says of our architecture in the same way
    ours = set(library_keys(SwatConfig)) - set(library_keys(kind))
    values = {key: value for key, value in values.items() if value is not None or key not in ours}
    check_keys(name, kind, values)
    if vocab_size is not None and values.setdefault("vocab_size", vocab_size) < vocab_size:
        raise ValueError(
            f"model: vocab_size {values['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
            "leave it out or raise it"
        )
    # a library's own ids belong to another tokenizer
    given = {**dict.fromkeys(TOKEN_IDS), **library.defaults(values), **values}
    try:
        return kind(**given)
    except StrictDataclassError as error:
        raise ValueError(f"model ({name}): {explain_misfit(error, kind, given)}") from error


def check_keys(name: str, kind: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that the configuration does not have: libraries keep any keyword without a word."""
    known = library_keys(kind)
    ours = [key for key in values if key in library_keys(SwatConfig) and key not in known]
    if ours:
        drop = " ".join(f"model.{key}=null" for key in ours)
        raise ValueError(
            f"model: {name} has no key {ours[0]!r}, which is one of swat's: drop such keys with {drop}, or start from "
            "one of the baselines that `swat-lm recipes` lists"
        )
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known, f"; valid keys: {', '.join(known)}")
            raise ValueError(f"model: {name} has no key {key!r}{hint}")


def library_keys(kind: type) -> list[str]:
    """The fields of a library's configuration class: those it declares itself, as a dataclass or by its arguments."""
    own = [name for name in inspect.get_annotations(kind) if name != "model_type"]
    if "hidden_size" in own:
        return [*own, *(name for name in ("tie_word_embeddings",) if name not in own)]
    parameters = inspect.signature(kind.__init__).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def library_class(name: str, part: Literal["config", "model"]) -> Any:
    """The configuration or model class of an architecture.

    Raises ValueError that says what to install where a package is missing.
    """
    library = ARCHITECTURES[name]
    for module, package in library.requires:
        # mamba_ssm is compiled for CUDA and imported by the model itself; counting parameters needs only its presence
        if module != "mamba_ssm" and not is_importable(module):
            raise ValueError(
                f"model.architecture: {name} needs {package}, which is not installed: pip install {package}; "
                "its kernels run on CUDA only"
            )
    return getattr(importlib.import_module(library.module), getattr(library, part))


def is_importable(module: str) -> bool:
    """Whether a package is there."""
    return importlib.util.find_spec(module) is not None


def name_of(config: PreTrainedConfig) -> str:
    """The name in ARCHITECTURES of a configuration; `swat` for ours."""
    if isinstance(config, SwatConfig):
        return OURS
    return next(name for name, architecture in ARCHITECTURES.items() if architecture.config == type(config).__name__)


def check_known(config: PreTrainedConfig, source: str) -> None:
    """Raise ValueError, naming where it is from, for a configuration of none of these architectures."""
    known = {architecture.config: name for name, architecture in ARCHITECTURES.items()}
    if not isinstance(config, SwatConfig) and type(config).__name__ not in known:
        raise ValueError(
            f"{source} holds a model of type {config.model_type!r}, whose costs are not known here; "
            f"known are {', '.join((OURS, *known.values()))}"
        )


def check_trainable(model: Mapping[str, Any], documents: str) -> None:
    """Raise ValueError, before anything is prepared, for an architecture that cannot be trained so on this machine.

    `documents` is the recipe's `data.documents`: `separate` is refused where a model lets the documents of a row mix.
    """
    name = model.get("architecture", OURS)
    library = ARCHITECTURES.get(name)
    if library is None:
        return
    if documents == "separate" and not library.keeps_documents_apart:
        raise ValueError(
            f"data.documents: {name} cannot keep the documents packed in one row apart (its state runs through the "
            "whole row); set data.documents: concatenate"
        )
    check_machine(name)


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model to train, with new weights from torch's random state; on the meta device it needs no CUDA.

    Raises ValueError for kernels that cannot run on this machine.
    """
    name = name_of(config)
    if name == OURS:
        return SwatForCausalLM(cast(SwatConfig, config))
    if torch.get_default_device().type != "meta":
        check_machine(name)
    return with_chunked_loss(library_class(name, "model"))(config)


def check_machine(name: str) -> None:
    """Raise ValueError where the kernels of an architecture, or those that its library would choose, cannot run."""
    requires = ARCHITECTURES[name].requires
    missing = [package for module, package in requires if not is_importable(module)]
    if missing:
        raise ValueError(f"model.architecture: {name} needs {missing[0]}: pip install {missing[0]}")
    if requires and not torch.cuda.is_available():
        raise ValueError(
            f"model.architecture: {name} runs on CUDA only (the kernels of {FLA_PACKAGE}), and PyTorch sees no GPU; "
            "on a CPU train llama, mistral, mamba2 or gated_deltanet"
        )
    if name == "gated_deltanet" and is_importable("fla") and not torch.cuda.is_available():
        raise ValueError(
            f"model.architecture: with {FLA_PACKAGE} installed, transformers takes its kernels for gated_deltanet, "
            f"which need CUDA; on this machine: pip uninstall {FLA_PACKAGE}"
        )


class ChunkedLoss:
    """Put before a library's language model: its forward pass gives the loss from hidden states, chunk by chunk.

    The pass goes through `forward`, where FSDP gathers weights. Everything else is the library's.
    """

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool = False,
        return_logits: bool = False,
        noise_seed: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Loss in nats of the next tokens of `[B, T]`, as SwatForCausalLM's; with `document_ids`, documents apart.

        Libraries' models draw no noise, so there is nothing for its seed to do.
        """
        assert not use_cache
        assert not return_logits
        model = cast(PreTrainedModel, self)
        # positions that start anew are what libraries know documents by; a plain row needs none
        extra = {} if document_ids is None else {"position_ids": position_ids}
        hidden = model.base_model(input_ids=input_ids, use_cache=False, **extra)[0]
        targets = next_tokens(labels, document_ids)
        weight = cast(nn.Linear, model.get_output_embeddings()).weight
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1).to(weight.dtype), weight, targets.flatten(), num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]


@cache
def with_chunked_loss(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The library's class with our loss in front."""
    return type(kind.__name__, (ChunkedLoss, kind), {"library_kind": kind, "__module__": __name__})


def exported_class(kind: type[nn.Module]) -> type[PreTrainedModel]:
    """The class to save a trained model as: the library's own, or ours, whatever training has put before it."""
    library = getattr(kind, "library_kind", None)
    return library or next(base for base in kind.__mro__ if base.__module__.startswith("swat_lm."))  # type: ignore[return-value]


def streaming_inputs(config: PreTrainedConfig, start: int, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """What a model must be told to read tokens `start .. start + num_tokens` of a stream with its cache.

    Qwen3-Next without an attention layer asks its cache for a length that only attention layers know; with positions
    and masks given it need not ask. Every other model needs nothing.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if config.model_type != "qwen3_next" or kinds != {"linear_attention"}:
        return {}
    positions = torch.arange(start, start + num_tokens, device=device).unsqueeze(0)
    return {"position_ids": positions, "attention_mask": dict.fromkeys(("full_attention", "linear_attention"))}


def count_model_parameters(config: PreTrainedConfig) -> Parameters:
    """Parameters of any configuration: ours by formula, others counted on the meta device."""
    if isinstance(config, SwatConfig):
        return count_parameters(config)
    with torch.device("meta"):
        model = build_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = cast(Any, model.get_input_embeddings()).weight.numel()
    output = 0 if config.tie_word_embeddings else cast(Any, model.get_output_embeddings()).weight.numel()
    return Parameters(total, embedding, output, total - embedding - output)


def training_flops(config: PreTrainedConfig, sequence_length: int) -> Flops:
    """FLOPs per token of a forward and a backward pass: by formula where attention is ours or Llama's, else 6 N.

    The estimate leaves out what the recurrences of state-space and linear-attention models cost beside their matrix
    products.
    """
    if isinstance(config, SwatConfig):
        return Flops(training_flops_per_token(config, sequence_length), "formula")
    if config.model_type in ("llama", "mistral"):
        return Flops(training_flops_per_token(convert_config(config), sequence_length), "formula")
    count = count_model_parameters(config)
    return Flops(6.0 * count.without_input_embedding, "estimate: 6 x parameters without the input embedding")


def model_state_bytes(config: PreTrainedConfig, context: int, dtype_bytes: int = 2) -> int | None:
    """Bytes one stream keeps after `context` tokens; None for fla's models, whose kernels do not run on meta."""
    if isinstance(config, SwatConfig):
        return state_bytes(config, context=context, dtype_bytes=dtype_bytes)
    if config.model_type in ("llama", "mistral"):
        return state_bytes(convert_config(config), context=context, dtype_bytes=dtype_bytes)
    if ARCHITECTURES[name_of(config)].requires:
        return None
    meta = torch.device("meta")
    with meta:
        model = build_model(config).base_model
    token = torch.zeros(1, 1, dtype=torch.int64, device=meta)
    outputs = model(input_ids=token, use_cache=True, **streaming_inputs(config, 0, 1, meta))
    held = outputs["cache_params" if "cache_params" in outputs else "past_key_values"]
    states = [
        state for layer in held.layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
    ]
    return dtype_bytes * sum(state.numel() for state in states)

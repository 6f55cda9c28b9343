"""swat-lm: language models whose attention is a sliding window.

Everything is imported on first use. The operator needs PyTorch alone, the model classes `pip install -e '.[model]'`;
Hugging Face's Auto classes know them as soon as `swat_lm` is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swat_lm.model import registration as _registration
from swat_lm.words import install_extra as _install_extra

if TYPE_CHECKING:
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.heads import SwatForQuestionAnswering, SwatForSequenceClassification, SwatForTokenClassification
    from swat_lm.model.modeling import SwatForCausalLM, SwatModel, SwatPreTrainedModel
    from swat_lm.model.trainer_callback import AbsorbingCallback
    from swat_lm.ops import window_attention, window_attention_step

__version__ = "0.1.0"

_LAZY = {
    "AbsorbingCallback": "swat_lm.model.trainer_callback",
    "SwatConfig": "swat_lm.model.configuration",
    "SwatForCausalLM": "swat_lm.model.modeling",
    "SwatForQuestionAnswering": "swat_lm.model.heads",
    "SwatForSequenceClassification": "swat_lm.model.heads",
    "SwatForTokenClassification": "swat_lm.model.heads",
    "SwatModel": "swat_lm.model.modeling",
    "SwatPreTrainedModel": "swat_lm.model.modeling",
    "window_attention": "swat_lm.ops",
    "window_attention_step": "swat_lm.ops",
}

_MODEL_PACKAGES = ("transformers", "safetensors", "huggingface_hub", "yaml")

__all__ = [
    "AbsorbingCallback",
    "SwatConfig",
    "SwatForCausalLM",
    "SwatForQuestionAnswering",
    "SwatForSequenceClassification",
    "SwatForTokenClassification",
    "SwatModel",
    "SwatPreTrainedModel",
    "window_attention",
    "window_attention_step",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'swat_lm' has no attribute {name!r}")
    problem = _registration.complaint() if _LAZY[name].startswith("swat_lm.model") else None
    if problem is not None:
        raise ImportError(problem, name="transformers")
    try:
        module = import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _MODEL_PACKAGES:
            raise
        raise ImportError(
            f"swat_lm.{name} needs the package {error.name!r}: {_install_extra('model')}", name=error.name
        ) from error
    return getattr(module, name)


_registration.arrange()

"""Makes Hugging Face's tables know our classes by their names, without importing `transformers` here.

The tables are filled as soon as the modules that hold them are executed, or at once where they are loaded already; ours
are imported when somebody asks for one of them. So `import swat_lm` stays cheap, and works without `transformers`.

A hook in `sys.meta_path` is needed: transformers 5.23 has no entry points for classes from other packages, and whoever
imports it after us has no reason to call us.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from swat_lm.words import install_extra

MODEL_TYPE = "swat"
CLASSES = {
    "MODEL_MAPPING": "SwatModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "SwatForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "SwatForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "SwatForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "SwatForQuestionAnswering",
}
"""By the table of transformers that each belongs in."""

AUTO_MODULE = "modeling_swat"
AUTO_CODE = f"from swat_lm import {', '.join(['SwatConfig', *CLASSES.values()])}  # pip install swat-lm\n"
"""Of the module beside the weights by which tools that were not told of this package find it."""
AUTO_MAP = {"AutoConfig": f"{AUTO_MODULE}.SwatConfig"} | {
    f"AutoModel{name.removeprefix('Swat').removeprefix('Model')}": f"{AUTO_MODULE}.{name}" for name in CLASSES.values()
}
"""In `config.json`, by transformers' Auto classes."""

# of transformers; pyproject.toml says the same
OLDEST = (5, 20)


def complaint() -> str | None:
    """What is wrong with the installed transformers for the model classes; None if nothing, or if there is none."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return None
    numbers = [int(part) for part in found.split(".")[:2] if part.isdecimal()]
    if len(numbers) < 2 or tuple(numbers) >= OLDEST:
        return None
    wanted = ".".join(str(number) for number in OLDEST)
    return (
        f"swat_lm's model classes need transformers {wanted} or newer, {found} is installed: "
        f"{install_extra('model')}; the operator works without"
    )


def _name_classes(_: ModuleType) -> None:
    # where it looks for its own
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules["swat_lm"]
    # by the name in config.json its pipelines and its server look for a class there, and so does TRL
    modules = sys.modules["transformers"]._class_to_module
    modules |= dict.fromkeys(("SwatConfig", *CLASSES.values()), f"models.{MODEL_TYPE}")


def _name_configuration(tables: ModuleType) -> None:
    tables.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "SwatConfig"


def _name_models(tables: ModuleType) -> None:
    for table, name in CLASSES.items():
        getattr(tables, f"{table}_NAMES")[MODEL_TYPE] = name
        # made from the configurations' table, which may have been without ours
        getattr(tables, table)._reverse_config_mapping["SwatConfig"] = MODEL_TYPE


def _name_adapted_modules(tables: ModuleType) -> None:
    # what adapters take where target_modules is left out: Mistral's, whose names ours are, and Mamba-2's projections
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "mistral" in table:
            own = list(table["mistral"])
            # these ask for widths that divide by their blocks, which that of in_proj need not
            if {"q_proj", "k_proj"} & set(own) and not any(method in name for method in ("_C3A_", "_ROAD_")):
                own += ["in_proj"] if "IA3" in name else ["in_proj", "out_proj"]
            if "input_layernorm" in own:
                own += ["mixer_output_layernorm", "feedforward_output_layernorm"]
            table[MODEL_TYPE] = own


FILLED: dict[str, Callable[[ModuleType], None]] = {
    "transformers": _name_classes,
    # which executes transformers itself a second time, as another module of this name
    "transformers.processing_utils": _name_classes,
    "transformers.models.auto.configuration_auto": _name_configuration,
    "transformers.models.auto.modeling_auto": _name_models,
    "peft.utils.constants": _name_adapted_modules,
}
"""What is done once such a module is executed."""


def fill(module: ModuleType) -> None:
    """Write our names into a module's tables, unless transformers is too old for ours."""
    problem = complaint()
    if problem is None:
        FILLED[module.__name__](module)
    elif FILLED[module.__name__] is _name_configuration:
        # said once; who asks for a model class gets it as an error
        logging.getLogger(__name__).warning(problem)


class _FillingLoader(Loader):
    """Executes a module as its own loader does, then fills its tables."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # whoever asks for the loader later, for a source or a resource, finds the usual one
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        fill(module)


class _FillingFinder(MetaPathFinder):
    """Stands first in `sys.meta_path` and lets everything pass but the modules waited for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FILLED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _FillingLoader(spec.loader)
                return spec
        return None


def arrange() -> None:
    """Fill the tables that are loaded now, and the rest when they are loaded; calling twice changes nothing."""
    if any(isinstance(finder, _FillingFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _FillingFinder())
    for name in FILLED:
        if name in sys.modules:
            fill(sys.modules[name])

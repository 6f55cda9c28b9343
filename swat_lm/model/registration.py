"""Makes Hugging Face's Auto classes know SwatConfig and its models, without importing `transformers` here.

Where `transformers` comes later, a finder waits for its Auto modules and registers right after they are executed;
where they are loaded already, it happens at once. `import swat_lm` stays cheap, and works without `transformers`.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

# each of ours registers itself at its own end, so importing it is enough, also while it is being imported
WAITED_FOR = {
    "transformers.models.auto.configuration_auto": "swat_lm.model.configuration",
    "transformers.models.auto.modeling_auto": "swat_lm.model.modeling",
}

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
        "pip install 'swat-lm[model]'; the operator works without"
    )


def register(registering: str) -> None:
    """Import a module of ours that registers itself, unless the installed transformers is too old for it."""
    problem = complaint()
    if problem is None:
        import_module(registering)
    elif registering == WAITED_FOR["transformers.models.auto.configuration_auto"]:
        # said once; who asks for a model class gets it as an error
        logging.getLogger(__name__).warning(problem)


class _RegisteringLoader(Loader):
    """Executes a module as its own loader does, then imports the module that registers our classes."""

    def __init__(self, loader: Loader, registering: str) -> None:
        self._loader = loader
        self._registering = registering

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(self._registering)


class _AutoFinder(MetaPathFinder):
    """Stands first in `sys.meta_path` and lets everything pass but the modules waited for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WAITED_FOR:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, WAITED_FOR[fullname])
                return spec
        return None


def arrange() -> None:
    """Register now what transformers has loaded, and the rest when it is loaded; calling twice changes nothing."""
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
    for waited_for, registering in WAITED_FOR.items():
        if waited_for in sys.modules:
            register(registering)

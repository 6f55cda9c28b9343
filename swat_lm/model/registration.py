"""Makes Hugging Face's Auto classes know SwatConfig and its models, without importing `transformers` here.

Where `transformers` comes later, a finder waits for its Auto modules and registers as soon as they are executed, and
nothing that our modules are built on is half executed; where they are loaded already, it happens at once. So
`import swat_lm` stays cheap, and works without `transformers`.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from swat_lm.words import install_extra

# each of ours registers itself at its own end, so importing it is enough, also while it is being imported
WAITED_FOR = {
    "transformers.models.auto.configuration_auto": "swat_lm.model.configuration",
    "transformers.models.auto.modeling_auto": "swat_lm.model.modeling",
}

# what ours are built on; some import Auto modules themselves, and ours cannot be imported while one of them is executed
BUILT_ON = ("transformers.modeling_utils", "transformers.modeling_layers", "transformers.generation.utils")

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


def register() -> None:
    """Import those of ours whose Auto modules are there, unless it is too early, or transformers too old."""
    if any(_is_half_executed(name) for name in BUILT_ON):
        # when that one is executed, this is called again
        return
    for waited_for, registering in WAITED_FOR.items():
        if waited_for not in _executed or registering in _registered:
            continue
        _registered.add(registering)
        problem = complaint()
        if problem is None:
            import_module(registering)
        elif registering == WAITED_FOR["transformers.models.auto.configuration_auto"]:
            # said once; who asks for a model class gets it as an error
            logging.getLogger(__name__).warning(problem)


_executed: set[str] = set()
_registered: set[str] = set()


def _is_half_executed(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and name not in _executed and getattr(module.__spec__, "_initializing", False)


class _RegisteringLoader(Loader):
    """Executes a module as its own loader does, then registers what waited for it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _executed.add(module.__name__)
        register()


class _AutoFinder(MetaPathFinder):
    """Stands first in `sys.meta_path` and lets everything pass but the modules waited for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WAITED_FOR and fullname not in BUILT_ON:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def arrange() -> None:
    """Register now what transformers has loaded, and the rest when it is loaded; calling twice changes nothing."""
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
    for name in (*WAITED_FOR, *BUILT_ON):
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _executed.add(name)
    register()

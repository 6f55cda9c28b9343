"""The configuration as each layer has it, which is how Hugging Face's caches ask for windows."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from swat_lm.model.plan import LayerEntry

if TYPE_CHECKING:
    from swat_lm.model.configuration import SwatConfig

__all__ = ["LayerView", "LayerViews"]


class LayerView:
    """The configuration as one layer has it: `sliding_window` is the layer's own, everything else is shared.

    Hugging Face's caches read `config.per_layer_config[i].sliding_window`, so per-layer windows work in them.
    """

    def __init__(self, config: "SwatConfig", entry: LayerEntry) -> None:
        self._config = config
        self.sliding_window = getattr(entry.settings, "sliding_window", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class LayerViews(Sequence[LayerView]):
    """The views of all layers, by index."""

    def __init__(self, config: "SwatConfig") -> None:
        self._views = [LayerView(config, entry) for entry in config.plan()]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: Any) -> Any:
        return self._views[index]

    def __iter__(self) -> Iterator[LayerView]:
        return iter(self._views)

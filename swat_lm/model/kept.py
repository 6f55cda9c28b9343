"""Whether what was kept, in slots, a cache or a carry, is what the layers of a model keep."""

from collections.abc import Mapping, Sequence

from swat_lm.layers.base import StateTensor


def check_kept(held: Sequence[Mapping[str, StateTensor]], specs: Sequence[tuple[StateTensor, ...]], what: str) -> None:
    """Raise ValueError, naming the layer, unless `what`, which holds one mapping per layer, is what layers keep."""
    if len(specs) != len(held):
        raise ValueError(f"{what}: expected {len(specs)} layers, it holds {len(held)}; it belongs to another model")
    for index, (spec, own) in enumerate(zip(specs, held, strict=True)):
        wanted = {tensor.name: tensor for tensor in spec}
        for name in sorted(wanted.keys() | own.keys()):
            need, have = wanted.get(name), own.get(name)
            if need is None or have is None or described(need) != described(have):
                raise ValueError(
                    f"{what}: layer {index} keeps {name} as {described(need)}, the {what} holds {described(have)}; "
                    "it belongs to another model"
                )


def described(tensor: StateTensor | None) -> str:
    """A state tensor in a message."""
    if tensor is None:
        return "nothing"
    items = {"window": f"{tensor.items} x ", "growing": "all x ", "summary": ""}[tensor.kind]
    return f"{items}{list(tensor.shape)}"

"""SPADE's claims as losses by length: the system, its branch removed, other fusions, SWAT's windows.

All variants see the same tokens, and their feed-forwards are widened or narrowed until they have equal parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from swat_lm.papers.findings import Findings
from swat_lm.papers.scales import Scale
from swat_lm.papers.spade.scales import SCALES, STATE_SIZES
from swat_lm.papers.swat.losses import LossOfModules
from swat_lm.papers.swat.variants import SizedVariant
from swat_lm.papers.verdicts import Samples, Verdict, judge

__all__ = ["SpadeLosses"]

SOFTMAX = {"score_function": "softmax", "slopes": "none", "use_rotary": False}
SWAT = {"score_function": "sigmoid", "slopes": "balanced", "use_rotary": True}
FROZEN = {"transition_rate": 0.0, "entry_rate": 0.0, "step_rate": 0.0}
# of a system's numbers per channel that freezing takes out of the parameters: A (w, p), B and dt
FROZEN_SHARE = 3

Claim = tuple[str, str, str, str, str]
"""What is said, the paper's word for it, the worse variant, the better one, a remark."""
CLAIMS: tuple[Claim, ...] = (
    (
        "a state space in the bottom layer beats windows alone of equal depth and parameters at the greatest length",
        "stated: better than windows and than a vanilla Transformer in language modelling", "windows", "spade", "",
    ),
    (
        "the same where training ends, at its own length",
        "stated, without numbers at hand", "windows@L", "spade@L", "",
    ),
    ("fusion by concatenation beats the mean of both", "the paper's formula against the released code's default",
     "add", "spade", ""),
    ("fusion by concatenation beats attention over what the state space gives", "an ablation, numbers not at hand",
     "stack", "spade", ""),
    (
        "one state space in the bottom layer beats one in every layer", "said of section 6.3 by a reviewer",
        "every-layer", "spade", "The claim is that one suffices: undecided is what it predicts.",
    ),
    (
        "training A, B and dt gains over freezing them", "README: freezing is fine, training gains only marginally",
        "frozen", "spade", "Undecided, or a gap that is small beside the others, is what it predicts.",
    ),
    (
        "a state space helps SWAT's sigmoid windows too", "not the paper's: the same stack with SWAT's windows",
        "swat-windows", "swat", "",
    ),
    (
        "beside the state space SWAT's windows beat softmax windows with a relative bias", "not the paper's", "spade",
        "swat", "",
    ),
)  # fmt: skip


def entries(scale: Scale, base: Mapping[str, Any], spades: int, **own: Any) -> list[dict[str, Any]]:
    """A plan with state spaces in the first layers and windows in the others, with as many parameters as SPADE has."""
    shape, state_size = scale.budgets["analysis"].shape, STATE_SIZES[scale.name]
    width, depth, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    bias = {"relative_bias": "shared" if base is SOFTMAX else "none"}
    # alone a state space stands beside the paper's softmax
    beside = {name: base[name] for name in ("score_function", "slopes")}
    # numbers per channel of the model; a unit of a feed-forward has three
    of_one = branch(width, state_size, "concat")
    missing = of_one - spades * branch(width, state_size, own.get("fusion", "concat"))
    if own.get("transition_rate") == 0:
        missing += FROZEN_SHARE * state_size + 1
    # the bottom layer's feed-forward makes up for it; where all layers differ, all of them
    wider = missing / 3
    layers: list[dict[str, Any]] = []
    for index in range(depth):
        changed = round(wider) if spades <= 1 and index == 0 else round(wider / depth) if spades > 1 else 0
        kind = {"kind": "spade", "state_size": state_size, **beside, **own} if index < spades else {"kind": "attention"}
        layers.append({**kind, **bias, "intermediate_size": inner + changed})
    return layers


def branch(width: int, state_size: int, fusion: str) -> int:
    """Parameters of a layer's state space and fusion, per channel of the model."""
    norms = 0 if fusion == "stack" else 2
    projection = 2 * width + 1 if fusion == "concat" else 0
    # w and p, B and C are pairs of real numbers for every conjugate pair; D and dt
    return norms + projection + 4 * state_size + 2


class SpadeLosses(LossOfModules):
    """Loss of every variant at every length on held-out text."""

    texts: ClassVar[tuple[str, ...]] = ("text",)

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        depth = scale.budgets["analysis"].shape["num_hidden_layers"]
        made = (
            ("spade", "SPADE: concatenated, bottom layer", SOFTMAX, 1, {}),
            ("windows", "windows alone", SOFTMAX, 0, {}),
            ("add", "mean of both, bottom layer", SOFTMAX, 1, {"fusion": "add"}),
            ("stack", "windows over the state space, bottom layer", SOFTMAX, 1, {"fusion": "stack"}),
            ("every-layer", "concatenated, every layer", SOFTMAX, depth, {}),
            ("frozen", "A, B and dt as they start", SOFTMAX, 1, FROZEN),
            ("swat", "SPADE with SWAT's sigmoid windows", SWAT, 1, {}),
            ("swat-windows", "SWAT's sigmoid windows alone", SWAT, 0, {}),
        )
        return {
            name: SizedVariant(
                name, label, "L", None, {"sliding_window": "W", **base, "layers": entries(scale, base, spades, **own)}
            )
            for name, label, base, spades, own in made
            if not self.names or name in self.names
        }

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        def side(words: str) -> Samples | None:
            name, _, size = words.partition("@")
            scale, variant = found.scale, found.chosen.get(name)
            length = scale.sizes[size] if size else scale.lengths[-1]
            return None if variant is None else found.losses(variant, "text", length, None) or None

        return [judge(says, paper, side(worse), side(better), remark) for says, paper, worse, better, remark in CLAIMS]

    @override
    def lead(self, scale: Scale) -> str:
        width = scale.budgets["analysis"].shape["hidden_size"]
        return (
            f"SPADE, arXiv 2212.08136. W = {scale.sizes['W']:,} here (512 there), L = {scale.sizes['L']:,} (3,072), "
            f"{STATE_SIZES[scale.name]} numbers of state for each of {width:,} channels (64 for each of 1,024). "
            "Feed-forwards are as wide as makes parameters equal."
        )

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_rows

        last = found.scale.lengths[-1]
        path = out / f"{self.name}-text.png"
        rows = [(variant.label, *found.mean_loss(variant, "text", last)) for variant in found.chosen.values()]
        title = f"W = {found.scale.sizes['W']:,}, L = {found.scale.sizes['L']:,} tokens"
        plot_rows(rows, path, xlabel=f"loss at {last:,} tokens (nats per token)", title=title)
        return {f"Loss at {last:,} tokens on held-out text": path}

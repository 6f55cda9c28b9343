"""A codebook as a module: buffers that follow averages of keys, which a step absorbs, and no optimizer trains.

Legend: B rows, T tokens, S codes, D key size.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from swat_lm.layers.base import NOTHING, Auxiliary
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.pre_norm import start
from swat_lm.layers.precise import Precise, precise_dtype
from swat_lm.ops.codebook import Codebook, Seen, absorbed, nearest_codes, perplexity, seen_of, unit_keys
from swat_lm.ops.noise import uniform

BUFFERS = ("codes", "counts", "totals")


class KeyCodebook(Precise):
    """Codes, and the running averages that they are the quotients of."""

    codes: Tensor
    counts: Tensor
    totals: Tensor

    def __init__(
        self, num_codes: int, key_size: int, index: int, decay: float, dead_below: float, commitment_weight: float
    ) -> None:
        super().__init__()
        self.index, self.decay, self.dead_below, self.weight = index, decay, dead_below, commitment_weight
        self.noticed = False
        self.trained: Tensor | None = None
        precise = precise_dtype()
        self.register_buffer("codes", torch.zeros(num_codes, key_size, dtype=precise))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=precise))
        self.register_buffer("totals", torch.zeros(num_codes, key_size, dtype=precise))

    def forward(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of keys `[B, T, D]` with the keys' gradient (straight through), and their numbers `[B, T]`.

        Raises:
            ValueError: somebody asks the codebook for a gradient.
        """
        self.check_untrained()
        codes = self.codes.to(key.dtype)
        code = nearest_codes(key.detach(), codes)
        return codes[code] + (key - key.detach()), code

    def say(self, key: Tensor, code: Tensor, chunk: Chunk) -> Auxiliary:
        """The commitment loss of keys `[B, T, D]`, and in training what the codebook absorbs after the step."""
        real = None if chunk.real is None else chunk.real.expand(code.shape)
        counted = torch.ones_like(code, dtype=torch.bool) if real is None else real
        losses: dict[str, tuple[Tensor, Tensor | float]] = {}
        if self.weight > 0:
            error = (key - self.codes.to(key.dtype)[code]).square().sum(-1)
            total = self.weight * torch.where(counted, error, 0.0).sum(
                dtype=torch.promote_types(key.dtype, torch.float32)
            )
            losses["commitment"] = total, counted.sum()
        if not self.training:
            return Auxiliary(losses) if losses else NOTHING
        seed = torch.zeros_like(chunk.positions[:, :1]) if chunk.seed is None else chunk.seed[:, None]
        drawn = [uniform(seed, chunk.positions, self.index, which).expand(code.shape) for which in (0, 1)]
        seen = seen_of(key.detach(), code, self.codes, -drawn[0].log(), (drawn[1] * len(self.codes)).long(), real)
        return Auxiliary(losses, {f"codebook_{name}": value for name, value in seen._asdict().items()})

    def metrics_of(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many codes a whole step has used, as a perplexity, which is no mean over its parts."""
        return {f"codes_used_{self.index}": perplexity(statistics["codebook_counts"])}

    def notice(self, trained: Tensor) -> None:
        """Warn once where an optimizer has stepped between two passes of training and nothing was ever absorbed.

        `trained`: a small parameter that every step changes.
        """
        if (
            self.noticed
            or not trained.requires_grad
            or torch.compiler.is_compiling()
            or isinstance(trained, FakeTensor)
        ):
            return
        # fused optimizers leave no trace but the numbers
        before, self.trained = self.trained, trained.detach().clone()
        if before is None or torch.equal(before, self.trained):
            return
        self.noticed, self.trained = True, None
        if not self.counts.any():
            warnings.warn(
                "longvq: the optimizer has stepped and the codebook has absorbed nothing, so it stays as drawn: "
                "call model.absorb(outputs.auxiliary) after optimizer.step(), or give the Trainer "
                "callbacks=[swat_lm.AbsorbingCallback()]",
                stacklevel=2,
            )

    def absorb(self, statistics: Mapping[str, Tensor]) -> None:
        """Take in what a whole step has seen. Raises ValueError for a codebook that asks for a gradient."""
        self.check_untrained()
        self.noticed, self.trained = True, None
        seen = Seen(*(statistics[f"codebook_{name}"].to(self.codes.device) for name in Seen._fields))
        book = absorbed(Codebook(self.codes, self.counts, self.totals), seen, self.decay, self.dead_below)
        for name in BUFFERS:
            getattr(self, name).copy_(getattr(book, name))

    def check_untrained(self) -> None:
        """Raise ValueError where an optimizer is to train the codebook."""
        for name in BUFFERS:
            if getattr(self, name).requires_grad:
                raise ValueError(
                    f"longvq: the codebook's {name} ask for a gradient, and follow averages of keys instead: an "
                    "optimizer beside them makes it diverge; leave buffers out of the optimizer, and call "
                    "requires_grad_(False)"
                )

    def init_weights(self) -> None:
        """Directions by chance, of the length of keys; dead ones soon begin anew at keys."""
        start(self.codes, lambda: self.codes.copy_(unit_keys(torch.randn(self.codes.shape, dtype=self.codes.dtype))))
        start(self.counts, self.counts.zero_)
        start(self.totals, self.totals.zero_)

"""S4's state space as a module: parameters, taps that are kept while nothing changes them, chunks, steps.

What is trained is C itself, not C (1 - A^L): taps of any length and the step of decoding come from the same numbers,
and nothing has to be recovered after training.
Legend: B rows, T tokens, M channels, N numbers of a state, n = N / 2 pairs.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.layers.base import InPlace, Past, StateTensor
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.pre_norm import start
from swat_lm.layers.precise import Precise, precise_dtype
from swat_lm.layers.state_space_settings import RATES, StateSpaceSettings
from swat_lm.ops.long_convolution import long_convolution
from swat_lm.ops.memory import check_fits
from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.sequences import Sequences, unpack
from swat_lm.ops.structured_state import spans
from swat_lm.ops.structured_state.cauchy import taps_by_cauchy, taps_by_powers
from swat_lm.ops.structured_state.products import product, squares
from swat_lm.ops.structured_state.system import Discrete, System, discretise, hippo_legs, reading

# numbers in float64 beside the taps themselves: transforms, blocks of both products, and their gradients
NUMBERS_PER_TAP = 8
# of taps that a layer keeps; longer ones are made for every pass, which costs about what their transform does
KEPT_BYTES = 2**28


class StructuredState(Precise):
    """`y = C x + D u` over a state space per channel; in brackets S4's letters."""

    log_decay: Tensor
    angle: Tensor
    low_rank: Tensor | None
    entry: Tensor
    log_step: Tensor

    def __init__(self, settings: StateSpaceSettings, width: int, kind: str = "spade") -> None:
        """`kind`: of the layer that it is a part of, for messages."""
        super().__init__()
        self.settings, self.width, self.kind = settings, width, kind
        pairs, sides = settings.state_size // 2, 2 if settings.bidirectional else 1
        # a step of 8 bits would let poles wander by the thousandth, and a memory of a thousand tokens with them
        precise = precise_dtype()
        shapes: dict[str, tuple[int, ...]] = {
            "log_decay": (width, pairs),  # log(-Re w)
            "angle": (width, pairs),  # Im w
            "low_rank": (width, pairs, 2),  # p
            "entry": (width, pairs, 2),  # B
            "log_step": (width,),  # log dt
        }
        if settings.ssm == "s4d":
            del shapes["low_rank"]
            self.low_rank = None
        self.frozen = tuple(
            name for rate, names in RATES.items() if not getattr(settings, rate) for name in names if name in shapes
        )
        for name, shape in shapes.items():
            if name in self.frozen:
                self.register_buffer(name, torch.zeros(shape, dtype=precise))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=precise)))
        self.exit = nn.Parameter(torch.zeros(sides, width, pairs, 2, dtype=precise))  # C
        self.skip = nn.Parameter(torch.zeros(width, dtype=precise))  # D
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def state_spec(self) -> tuple[StateTensor, ...]:
        """The state, real parts before imaginary ones, in float32 at least."""
        return (StateTensor("ssm", (self.width, self.settings.state_size), "summary", dtype=torch.float32),)

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None) -> Tensor:
        """Mix a chunk `[B, T, M]`; the past, if any, is moved on.

        Raises:
            ValueError: a frozen parameter that is asked to train, or taps that memory cannot hold.
        """
        self._check_frozen()
        real = chunk.real
        if real is not None:
            hidden = hidden.masked_fill(~real[..., None], 0.0)
        precise = sum_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.to(precise)
            found = self._convolved(inputs, chunk) if past is None else self._after(inputs, chunk, past)
            found = found + inputs * self.skip.to(precise)
        return found.to(hidden.dtype)

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Mix one token per row, `[B, 1, M]`, in place over slots."""
        state = past.kept["ssm"]
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden[:, 0].to(state.dtype)
            matrix, entry, row = self._stepped(state.dtype)
            read, moved = spans.step(inputs, matrix, entry, row, state[past.slot], chunk.batch_invariant)
            state[past.slot] = moved
            found = read + inputs * self.skip.to(inputs.dtype)
        return found[:, None].to(hidden.dtype)

    def _convolved(self, inputs: Tensor, chunk: Chunk) -> Tensor:
        """A whole row, or its documents each by itself."""
        sequences = sequences_of(chunk, inputs)
        if sequences is None:
            return self._long(inputs, self.taps(inputs.shape[1]))
        output = torch.zeros_like(inputs)
        longest = max((group.place.shape[1] for group in sequences.groups), default=0)
        taps = self.taps(longest) if longest else None
        for group in sequences.groups:
            assert taps is not None
            output = group.put(self._long(group.take(inputs), taps), output)
        return output

    def _long(self, inputs: Tensor, taps: Tensor) -> Tensor:
        return long_convolution(inputs, taps[0], later=taps[1] if self.settings.bidirectional else None)

    def _after(self, inputs: Tensor, chunk: Chunk, past: Past) -> Tensor:
        """A chunk after its past, as products over spans."""
        batch, num_tokens = inputs.shape[:2]
        made = self._spans(spans.span_length(num_tokens), inputs.dtype)
        sequences = sequences_of(chunk, inputs)
        if sequences is None:
            output, own = spans.run(inputs, None, made)
            going_on, goes_on = torch.full((batch,), num_tokens, device=inputs.device), None
        else:
            output, own = self._documents(inputs, sequences, made)
            going_on, goes_on = sequences.going_on, (sequences.last == 0)[:, None, None]

        def join(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
            moved = spans.passed(before["ssm"].to(inputs.dtype), going_on, num_tokens, made)[1]
            # exactly nothing goes from one document to the next
            moved = moved if goes_on is None else torch.where(goes_on, moved, 0.0)
            return {"ssm": moved + after["ssm"]}

        before = past.merge({"ssm": own}, join)["ssm"].to(inputs.dtype)
        if sequences is None:
            return output + spans.passed(before, going_on, num_tokens, made)[0]
        for group in sequences.groups:
            first = group.document == 0
            if bool(first.any()):
                group = group._replace(**{name: getattr(group, name)[first] for name in group._fields})
                length = group.place.shape[1]
                output = group.put(spans.passed(before[group.row], group.count, length, made)[0], output)
        return output

    def _documents(self, inputs: Tensor, sequences: Sequences, made: spans.Spans) -> tuple[Tensor, Tensor]:
        """Each document after nothing; and the states that the last ones of the rows leave, `[B, M, N]`."""
        output = torch.zeros_like(inputs)
        own = inputs.new_zeros(inputs.shape[0], self.width, self.settings.state_size)
        for group in sequences.groups:
            result, states = spans.run(group.take(inputs), group.count, made)
            output = group.put(result, output)
            ends = group.document == sequences.last[group.row]
            own = own.index_put((group.row[ends],), states[ends])
        return output, own

    def taps(self, length: int) -> Tensor:
        """The first `length` taps at least, `[1 or 2, M, L]` in float64; kept for as long as nothing changes them.

        A power of two of them, so that a row of one length is the same to the bit whatever was asked for before.

        Raises:
            ValueError: they do not fit into memory.
        """
        length = 1 << (length - 1).bit_length()
        size = length * (NUMBERS_PER_TAP + self.settings.state_size // 2) + self.settings.state_size**2 * 32
        if not torch.compiler.is_compiling():
            check_fits(
                size * self.width * self.exit.shape[0] * 8, self.exit.device,
                f"{self.kind}: {length:,} taps of {self.width:,} channels",
                "read the text in chunks after a state, or train on shorter rows",
            )  # fmt: skip

        def make() -> Tensor:
            discrete, powers = self._discrete(length.bit_length())
            system = self.system() if self.settings.taps == "cauchy" else None
            found = []
            for row in reading(self.exit.double()).unbind(0):
                if system is None:
                    found.append(taps_by_powers(row, discrete.entry, powers[: length.bit_length()], length))
                else:
                    found.append(taps_by_cauchy(system, row, powers, length))
            return torch.stack(found)

        found = self._keep(("taps", length), (*self._fixed(), self.exit), make)
        self._forget_taps()
        return found

    def system(self) -> System:
        """The continuous system in float64."""
        low_rank = None if self.low_rank is None else self.low_rank.double()
        return System(
            self.log_decay.double().exp(), self.angle.double(), low_rank, self.entry.double(),
            self.log_step.double().exp(),
        )  # fmt: skip

    def _discrete(self, count: int) -> tuple[Discrete, list[Tensor]]:
        """The discrete system, and at least so many squares of its matrix."""

        def make() -> tuple[Discrete, list[Tensor]]:
            discrete = discretise(self.system())
            return discrete, squares(discrete.matrix, count)

        sources = self._fixed()
        # many and large: kept where training asks for them again and again, and where they are all that is fixed
        frozen = not any(isinstance(source, nn.Parameter) for source in sources)
        discrete, powers = self._keep("discrete", sources, make) if frozen else make()
        while len(powers) < count:
            with torch.inference_mode(False):
                powers.append(product(powers[-1], powers[-1]))
        return discrete, powers

    def _spans(self, length: int, dtype: torch.dtype) -> spans.Spans:
        def make() -> spans.Spans:
            discrete, powers = self._discrete(length.bit_length())
            made = spans.make_spans(discrete, reading(self.exit[0].double()), powers, length, dtype)
            return made._replace(powers=self._shared(made.powers, dtype))

        return self._keep(("spans", length, dtype), (*self._fixed(), self.exit), make)

    def _stepped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix `[M, N, N]`, entry and reading row `[M, N]` of one token."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            discrete, _ = self._discrete(1)
            found = discrete.matrix, discrete.entry, reading(self.exit[0].double())
            matrix, entry, row = (tensor.to(dtype) for tensor in found)
            return self._shared([matrix], dtype)[0], entry, row

        return self._keep(("step", dtype), (*self._fixed(), self.exit), make)

    def _fixed(self) -> tuple[Tensor, ...]:
        """What the discrete system follows from."""
        held = (self.log_decay, self.angle, self.low_rank, self.entry, self.log_step)
        return tuple(tensor for tensor in held if tensor is not None)

    def _keeps(self, sources: tuple[Tensor, ...]) -> bool:
        trained = any(isinstance(source, nn.Parameter) for source in sources)
        learns = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        return not (torch.compiler.is_compiling() or learns or (self.training and trained))

    def _keep(self, name: Any, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """What follows from `sources`: kept until one of them is written to, and made anew while they are trained."""
        if not self._keeps(sources):
            return make()
        held = self._kept.get(name)
        if held is None or not held[0].is_of(sources):
            # outlives the pass, so it is made as what later passes may save for their gradients
            with torch.inference_mode(False), torch.no_grad():
                held = self._kept[name] = Signature(sources), make()
        return held[1]

    def _shared(self, powers: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The first powers of the matrix; where they are kept, the same memory for spans of all lengths and steps."""
        sources = self._fixed()
        if not self._keeps((*sources, self.exit)):
            return powers
        held = self._keep(("powers", dtype), sources, list)
        held.extend(powers[len(held) :])
        return held[: len(powers)]

    def _forget_taps(self) -> None:
        """Those of the lengths that were first asked for, as far as all together are more than may be kept."""
        held = {name: found[1].nbytes for name, found in self._kept.items() if name[0] == "taps"}
        total = sum(held.values())
        for name, size in held.items():
            if total <= KEPT_BYTES:
                break
            del self._kept[name]
            total -= size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def train(self, mode: bool = True) -> "StructuredState":
        """What was kept is forgotten: weights that are gathered for a pass change without a trace."""
        self._kept.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "StructuredState":
        self._kept.clear()
        return super()._apply(fn, recurse)

    def _check_frozen(self) -> None:
        for name in self.frozen:
            if getattr(self, name).requires_grad:
                rate = next(rate for rate, names in RATES.items() if name in names)
                raise ValueError(
                    f"{self.kind}: {name} is frozen ({rate}: 0) and asked for a gradient; set {rate} above 0 to train "
                    "it"
                )

    def init_weights(self) -> None:
        """HiPPO-LegS for every channel, with steps of many sizes."""
        begin, settings = hippo_legs(self.settings.state_size), self.settings
        start(self.log_decay, lambda: self.log_decay.copy_(begin.decay.log().expand_as(self.log_decay)))
        start(self.angle, lambda: self.angle.copy_(begin.angle.expand_as(self.angle)))
        start(self.entry, lambda: self.entry.copy_(begin.entry.expand_as(self.entry)))
        if (low_rank := self.low_rank) is not None:
            start(low_rank, lambda: low_rank.copy_(begin.low_rank.expand_as(low_rank)))
        shortest, longest = math.log(settings.time_step_min), math.log(settings.time_step_max)
        start(self.log_step, lambda: self.log_step.uniform_(shortest, longest))
        # a complex number of variance 1
        start(self.exit, lambda: nn.init.normal_(self.exit, std=math.sqrt(0.5)))
        start(self.skip, lambda: nn.init.normal_(self.skip))

    def optimizer_options(self) -> dict[str, dict[str, Any]]:
        """Rates of their own, and nothing pulls them to zero; what is frozen is no parameter."""
        found = {}
        for rate, names in RATES.items():
            options = {"weight_decay": 0.0, "learning_rate_factor": getattr(self.settings, rate)}
            found |= {name: options for name in names if isinstance(getattr(self, name), nn.Parameter)}
        return found


class Signature:
    """Of which tensors something was made, and what was in them.

    A write through `.data`, or into memory that is gathered for a pass, leaves no trace on a tensor but its numbers:
    some of them are looked at again.
    """

    GLIMPSE = 8

    def __init__(self, sources: tuple[Tensor, ...]) -> None:
        self.sources, self.traces, self.seen = sources, self.traces_of(sources), self.glimpse(sources)

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors with the same numbers, as far as can be seen."""
        same = len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources))
        return same and self.traces_of(sources) == self.traces and self.glimpse(sources) == self.seen

    @staticmethod
    def traces_of(sources: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
        """Where the numbers lie, and how often PyTorch has seen them written to."""
        return [(one.data_ptr(), 0 if one.is_inference() else one._version, one.dtype) for one in sources]

    @classmethod
    def glimpse(cls, sources: tuple[Tensor, ...]) -> list[Any]:
        """Some of the numbers of each; none where looking would stop a device that records its work."""
        place = sources[0].device.type
        if place == "meta" or (place == "cuda" and torch.cuda.is_current_stream_capturing()):
            return []
        rows = [one.detach().reshape(-1)[:: max(1, one.numel() // cls.GLIMPSE)].to(torch.float64) for one in sources]
        return torch.cat(rows).tolist()


def sequences_of(chunk: Chunk, inputs: Tensor) -> Sequences | None:
    """The documents of a chunk's rows, made once for all layers; None where every row is one, and all of it real."""
    segments, real = chunk.segments, chunk.real
    if segments is None and real is None:
        return None
    return chunk._once("sequences", lambda: unpack(segments, real, inputs.shape[0], inputs.shape[1], inputs.device))

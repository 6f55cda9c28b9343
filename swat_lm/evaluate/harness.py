"""A causal model as lm-evaluation-harness sees it: tokens and truncation as its own Hugging Face model has them.

Windowed models read contexts of any length, since that costs what their window costs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swat_lm.evaluate.limits import check_length, position_limit
from swat_lm.evaluate.prefixes import Request
from swat_lm.evaluate.scoring import Scorer
from swat_lm.words import counted

__all__ = ["HarnessModel", "Rolling", "check_max_length"]

Rolling = Literal["windows", "whole"]


class HarnessModel(TemplateLM):
    """Answers the harness's requests.

    Args:
        model, tokenizer: belong together.
        max_length: tokens that a prediction may see; longer contexts lose their beginning. None: of an endless model
            (see `Scorer.is_endless`) nothing is cut; of another, what its configuration says, as the harness does.
        batch_size: rows per batch; None: what fits.

    Attributes:
        rolling: how whole texts are scored. "windows": the harness's way, disjoint windows of `window_length` tokens,
            each with one token before it. "whole": in one stream, every token seeing all that the model can keep.
        on_progress: called with tokens read and tokens in all of the request at hand.

    Raises:
        ValueError: a tokenizer without a token to begin texts with.
    """

    rolling: Rolling = "windows"
    on_progress: Callable[[int, int], None] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer  # type: ignore[assignment]
        self._scorer = Scorer(model, batch_size)
        self._prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self._prefix is None:
            raise ValueError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token: the first token of a text "
                "cannot be predicted; give a tokenizer that has one with --tokenizer"
            )
        if max_length is not None:
            check_max_length(model, max_length)
        self.window_length: int = max_length or resolve_max_length(model.config, tokenizer)
        self.max_length: int | None = None if max_length is None and self._scorer.is_endless else self.window_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id  # type: ignore[union-attr]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text's first."""
        return self._prefix  # type: ignore[return-value]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of texts in a chat template."""
        return self.tokenizer.name_or_path.replace("/", "__")  # type: ignore[union-attr]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them by itself, unless the text has its own."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self._prefix)):  # type: ignore[union-attr]
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)  # type: ignore[union-attr]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for (context, text), before, continuation in requests:
            if not continuation:
                raise ValueError(f"nothing to predict: {text!r} after {context[-40:]!r} has no tokens of its own")
            if self.max_length is not None:
                if len(continuation) > self.max_length:
                    raise ValueError(
                        f"a continuation of {counted(len(continuation), 'token')} is longer than the "
                        f"{self.max_length:,} that the model may see"
                    )
                # one more than is read, since the last token is only predicted
                before = before[max(0, len(before) + len(continuation) - self.max_length - 1) :]
            rows.append(Request(before, continuation))
        return [(score.log_likelihood, score.is_greedy) for score in self._scorer.score(rows, self.on_progress)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text as a whole; see `rolling`."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if self.rolling == "whole":
                pairs = [([self.prefix_token_id], tokens)] if tokens else []
                check_length(self._scorer.streaming, len(tokens), 1)
            else:
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.window_length, context_len=1)
                pairs = [make_disjoint_window(pair) for pair in windows]
            rows += [Request(*pair) for pair in pairs]
            owners += [owner] * len(pairs)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(rows, self.on_progress), strict=True):
            sums[owner] += score.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Each request's text, greedy unless it asks otherwise, up to its stop strings."""
        asked: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]  # type: ignore[misc]
        # the harness's Collator takes the stop string "ab" for the stop strings "a" and "b"
        alike: dict[str, list[int]] = {}
        # of like length together: with left padding every row costs what the longest does
        for index in sorted(range(len(asked)), key=lambda index: -len(asked[index][0])):
            alike.setdefault(repr(asked[index][1]), []).append(index)
        texts: dict[int, str] = {}
        size = self._scorer.batch_size or 8
        for indices in alike.values():
            for part in (indices[begin : begin + size] for begin in range(0, len(indices), size)):
                made = self._generate([asked[index][0] for index in part], asked[part[0]][1])
                texts |= zip(part, made, strict=True)
                if self.on_progress:
                    self.on_progress(len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, default_max_gen_toks=256))
        tokenizer: Any = self.tokenizer
        eos = None if self.eot_token_id is None else tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        most = int(options.pop("max_gen_toks"))
        options.pop("max_length", None)
        if not options.get("do_sample"):
            options.pop("temperature", None)
            options["do_sample"] = False
        room = None if self.max_length is None else self.max_length - most
        if room is not None and room < 1:
            raise ValueError(
                f"no room to generate {counted(most, 'token')}: the model sees only {self.max_length:,}; "
                "raise --max-length"
            )
        # a context without tokens begins as a text does
        rows = [self.tok_encode(context)[-room if room else None :] or [self.prefix_token_id] for context in contexts]
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.prefix_token_id
        tokens = pad_sequence([torch.tensor(ids) for ids in rows], True, padding, "left")
        mask = pad_sequence([torch.ones(len(ids), dtype=torch.int64) for ids in rows], True, 0, "left")
        longest = tokens.shape[1]
        made = cast(Any, self.model).generate(
            input_ids=tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=most,
            pad_token_id=padding,
            stopping_criteria=stop_sequences_criteria(tokenizer, until, longest, len(rows)),
            **options,
        )
        return [
            postprocess_generated_text(tokenizer.decode(ids, skip_special_tokens=True), until, None)
            for ids in made[:, longest:].tolist()
        ]


def check_max_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise ValueError for a length that a model, which may be without weights, cannot read or be asked about."""
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
    positions = position_limit(model)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length: {type(model).__name__} has {counted(positions, 'position')}, got {max_length}")

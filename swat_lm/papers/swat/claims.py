"""SWAT's claims as data (arXiv 2502.18845), its printed numbers, and what is doubtful in them."""

from collections.abc import Mapping

from swat_lm.papers.loss_claims import Claim, Loss

__all__ = ["CLAIMS", "DOUBTFUL", "PRINTED"]

TEXT, BOOKS = "text", "books"
SOFTMAX, ALIROPE = "sliding-softmax", "sliding-alirope"

CLAIMS: Mapping[str, tuple[Claim, ...]] = {
    "table2": (
        Claim("a model trained on W tokens without a window is worse at the greatest length than at W",
              "OpenWebText 3.25 at 128, 4.84 at 16,384",
              Loss("vanilla-softmax-short", TEXT), Loss("vanilla-softmax-short", TEXT, "W")),
        Claim("trained behind a window (W, L), the loss at the greatest length is below that at W",
              "OpenWebText 3.36 at 128, 3.01 at 16,384", Loss(SOFTMAX, TEXT, "W"), Loss(SOFTMAX, TEXT)),
        Claim("the same for window L and length XL",
              "OpenWebText 3.44 at 128, 2.91 at 16,384",
              Loss("sliding-softmax-xl", TEXT, "W"), Loss("sliding-softmax-xl", TEXT)),
        Claim("at the greatest length, training behind the window beats training on W tokens",
              "OpenWebText 3.01 against 4.84", Loss("vanilla-softmax-short", TEXT), Loss(SOFTMAX, TEXT)),
        Claim("a training length of four windows is better than eight",
              "stated in the text: best at about four times the window",
              Loss(SOFTMAX, TEXT), Loss("sliding-softmax-4w", TEXT)),
    ),
    "table3": (
        Claim("vanilla sigmoid with RoPE fails beside vanilla softmax",
              "OpenWebText 14.26 against 4.84",
              Loss("vanilla-sigmoid-short", TEXT), Loss("vanilla-softmax-short", TEXT)),
        Claim("sliding-window training beats vanilla training, both softmax",
              "OpenWebText 3.01 against 4.84", Loss("vanilla-softmax-short", TEXT), Loss(SOFTMAX, TEXT)),
        Claim("AliRope-6:6 beats the softmax window on books",
              "PG-19 4.31 against 4.78", Loss(SOFTMAX, BOOKS), Loss(ALIROPE, BOOKS)),
        Claim("on text like the training text the softmax window is a little better than AliRope-6:6",
              "OpenWebText 3.01 against 3.05", Loss(ALIROPE, TEXT), Loss(SOFTMAX, TEXT)),
        Claim("RoPE helps balanced ALiBi on books",
              "PG-19 4.31 against 4.99", Loss("sliding-alibi-6-6", BOOKS), Loss(ALIROPE, BOOKS)),
        Claim("ALiBi-8:4 beats ALiBi-6:6 on books",
              "PG-19 4.64 against 4.99", Loss("sliding-alibi-6-6", BOOKS), Loss("sliding-alibi-8-4", BOOKS)),
        Claim("ALiBi-12:0 beats ALiBi-6:6 on text like the training text",
              "OpenWebText 3.01 against 3.05", Loss("sliding-alibi-6-6", TEXT), Loss("sliding-alibi-12-0", TEXT)),
        Claim("a window of L is better than one of W for AliRope on text like the training text",
              "OpenWebText 2.97 against 3.05", Loss(ALIROPE, TEXT), Loss("alirope-wide", TEXT)),
        Claim("on books the window of W is the better one",
              "PG-19 4.31 against 4.39", Loss("alirope-wide", BOOKS), Loss(ALIROPE, BOOKS)),
        Claim("AliRope behind a window of W beats vanilla softmax trained on L tokens, on books",
              "PG-19 4.31 against 4.54", Loss("vanilla-softmax-long", BOOKS), Loss(ALIROPE, BOOKS)),
    ),
    "figure2": (
        Claim("behind a window of W it was not trained with, a softmax model worsens from length W to the "
              "greatest", "a heat map without numbers",
              Loss("vanilla-softmax-long", TEXT, "last", "W"), Loss("vanilla-softmax-long", TEXT, "W", "W")),
        Claim("the same behind a window of its training length",
              "a heat map without numbers",
              Loss("vanilla-softmax-long", TEXT, "last", "L"), Loss("vanilla-softmax-long", TEXT, "L", "L")),
    ),
}  # fmt: skip
"""By table or figure."""

DOUBTFUL = {
    "table2": (
        "The third row of Vanilla B repeats OpenWebText's numbers in PG-19's columns.",
        "Losses on OpenOrca of 0.14 to 0.5 for sigmoid against 5 to 8 for softmax drive the ablation's average; "
        "OpenOrca is left out here.",
    ),
    "table3": (
        "The printed average includes OpenOrca, where losses of 0.14 to 0.5 for sigmoid cannot be compared with "
        "5 to 8 for softmax; it is left out here.",
    ),
    "table1": (
        "SWAT (-) beats the balanced model of the title on average, and at 340M SWAT's perplexity is worse than "
        "Transformer++'s; both are as printed.",
    ),
}  # fmt: skip
"""What is doubtful in the paper's numbers, shown beside them."""

PRINTED: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]] = {
    "table2": {
        "vanilla-softmax-short": {TEXT: {"W": 3.25, "last": 4.84}},
        "sliding-softmax": {TEXT: {"W": 3.36, "last": 3.01}},
        "sliding-softmax-xl": {TEXT: {"W": 3.44, "last": 2.91}},
    },
    "table3": {
        "vanilla-softmax-short": {TEXT: {"last": 4.84}, BOOKS: {"last": 5.69}},
        "vanilla-sigmoid-short": {TEXT: {"last": 14.26}, BOOKS: {"last": 15.48}},
        "sliding-softmax": {TEXT: {"last": 3.01}, BOOKS: {"last": 4.78}},
        "sliding-alibi-12-0": {TEXT: {"last": 3.01}, BOOKS: {"last": 4.69}},
        "sliding-alibi-8-4": {TEXT: {"last": 3.04}, BOOKS: {"last": 4.64}},
        "sliding-alibi-6-6": {TEXT: {"last": 3.05}, BOOKS: {"last": 4.99}},
        "sliding-alirope": {TEXT: {"last": 3.05}, BOOKS: {"last": 4.31}},
        "alirope-wide": {TEXT: {"last": 2.97}, BOOKS: {"last": 4.39}},
        "vanilla-softmax-long": {TEXT: {"last": 2.96}, BOOKS: {"last": 4.54}},
        "vanilla-sigmoid-long": {TEXT: {"last": 2.97}, BOOKS: {"last": 5.07}},
    },
}
"""The paper's losses (arXiv 2502.18845), by experiment, variant, text and length: OpenWebText, PG-19; W is 128, the
greatest length 16,384."""

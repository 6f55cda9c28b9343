"""A real checkpoint behind windows: loss by length as measured, and decoding far into a stream, plan beside plan.

    python -m benchmarks.checkpoint MODEL CURVES --commit HASH [--record]

MODEL is a converted checkpoint with full attention. `swat-lm evaluate length` has left curves for names of PLANS in
CURVES/NAME/length.json, and one called `stream` for the plan that is read farthest (docs/experiments.md, commands).
Decoding is measured here: every plan has the same weights and a state filled as after CONTEXT tokens (with random
numbers, on which no speed depends), and a round is some tokens by each of them in turns.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from swat_lm import SwatForCausalLM
from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.plots import Series, plot_loss_by_length, short_bytes
from swat_lm.evaluate.windows import with_window
from swat_lm.files import write_text
from swat_lm.model import cost
from swat_lm.model.slots import Slots
from swat_lm.model.window_plan import with_full_layers

CONTEXT = 32768
STREAM = "stream"
RECORD = measure.REPOSITORY / "docs" / "results" / "smollm2.json"
PICTURE = measure.REPOSITORY / "docs" / "images" / "smollm2.png"
DRAWN = ("full", "w256s0", "w256s4", "w1024s4", "third4")


@dataclass(frozen=True)
class Plan:
    """What the layers of the checkpoint see."""

    label: str
    window: int | None = None
    sinks: int = 0
    full_layers: str = "none"


PLANS = {
    "full": Plan("full attention"),
    "w128s0": Plan("window 128", 128),
    "w256s0": Plan("window 256", 256),
    "w1024s0": Plan("window 1,024", 1024),
    "w128s4": Plan("window 128, first 4 kept", 128, 4),
    "w256s4": Plan("window 256, first 4 kept", 256, 4),
    "w1024s4": Plan("window 1,024, first 4 kept", 1024, 4),
    "third": Plan("window 256, every 3rd layer full", 256, 0, "every:3"),
    "third4": Plan("window 256, first 4 kept, every 3rd layer full", 256, 4, "every:3"),
}
"""By the names of their folders."""


def main() -> None:
    """Read the curves, measure decoding, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--commit", required=True, help="of the code that measured the curves")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="tokens of each plan in a round")
    parser.add_argument(
        "--keep-speeds", action="store_true", help="take decoding from the record, and measure only plans that it lacks"
    )
    parser.add_argument("--record", action="store_true", help=f"make the result {RECORD.name}, which documents show")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        curves = read_curves(arguments.curves)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.curves}: {error}")
    model = SwatForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    plans = {name: plan for name, plan in PLANS.items() if name in {"full", *curves}}
    before = json.loads(RECORD.read_text(encoding="utf-8")) if arguments.keep_speeds else {"plans": []}
    speeds = {plan["name"]: plan["decoding"] for plan in before["plans"]}
    lacking = {name: plan for name, plan in plans.items() if name not in speeds}
    if lacking:
        speeds = decode({"full": PLANS["full"], **lacking}, model, arguments.rounds, arguments.steps) | speeds
    found = {
        "commit": arguments.commit,
        "machine": before.get("machine") or measure.machine(),
        "model": {"parameters": cost.count_parameters(model.config).total, "layers": model.config.num_hidden_layers,
                  "trained_length": model.config.max_position_embeddings},
        "context": CONTEXT,
        "plans": [
            {"name": name, "label": plan.label, "curve": curves.get(name), "decoding": speeds[name]}
            for name, plan in plans.items()
        ],
        "stream": curves.get(STREAM),
    }  # fmt: skip
    path = measure.REPOSITORY / "runs" / "benchmarks" / RECORD.name
    for place in (path, RECORD) if arguments.record else (path,):
        write_text(place, json.dumps(found, indent=1) + "\n")
        sys.stdout.write(f"{place}\n")
    draw(found, PICTURE if arguments.record else path.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss of the later half of a context against its length, with what each plan keeps at the end."""
    series = []
    for plan in found["plans"]:
        if plan["name"] in DRAWN and plan["curve"] is not None:
            points = plan["curve"]["points"]
            # two columns of these stand above the picture
            name = plan["label"].replace("window ", "W = ").replace(", first 4 kept", " + 4 first")
            name = f"{name.replace('every 3rd layer', 'every 3rd')}: {short_bytes(plan['decoding']['state_bytes'])}"
            series.append(Series(name, [one["length"] for one in points], [one["tail_loss"] for one in points]))
    plot_loss_by_length(
        series, path, training_length=found["model"]["trained_length"], ylabel="loss of tokens N/2+1 .. N (nats)"
    )


def read_curves(folder: Path) -> dict[str, Any]:
    """The curves that are there, by name; raises ValueError for one of another plan, or where there is none."""
    found = {}
    for name in [*PLANS, STREAM]:
        path = folder / name / "length.json"
        if not path.exists():
            continue
        curve = LengthCurve.from_json(path.read_text(encoding="utf-8"))
        plan = PLANS.get(name)
        if plan is not None and curve.num_sinks != plan.sinks:
            raise ValueError(f"{name} was measured with {curve.num_sinks} first tokens kept, expected {plan.sinks}")
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"there is no curve of {', '.join(PLANS)}")
    return found


def decode(plans: dict[str, Plan], model: SwatForCausalLM, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Of each plan behind CONTEXT tokens: tokens per second, how many times those of full attention, bytes of state.

    Medians over rounds.
    """
    runs, kept = {}, {}
    for name, plan in plans.items():
        twin = planned(model, plan)
        twin.arrange_for_decoding()
        state = filled(twin, CONTEXT)
        kept[name] = cost.state_bytes(twin.config, context=CONTEXT, dtype_bytes=state.dtype.itemsize)
        runs[name] = partial(read_on, twin, state, steps)
    timings = measure.take_turns(runs, rounds)
    return {
        name: {
            "tokens_per_second": steps / timing.median, "times_full": timing.times_faster_than(timings["full"]),
            "state_bytes": kept[name],
        }
        for name, timing in timings.items()
    }  # fmt: skip


def planned(model: SwatForCausalLM, plan: Plan) -> SwatForCausalLM:
    """A model of this plan with the same weights."""
    twin = with_window(model, plan.window, plan.sinks or None)
    if plan.full_layers == "none":
        return twin
    with torch.device("meta"):
        hybrid = SwatForCausalLM(with_full_layers(twin.config, plan.full_layers))
    hybrid.load_state_dict(model.state_dict(), assign=True)
    hybrid.tie_weights()
    return hybrid.eval()


def filled(model: SwatForCausalLM, context: int) -> Slots:
    """The state of one stream after so many tokens, its keys and values drawn at random."""
    generator = torch.Generator().manual_seed(0)
    state = model.init_state(1)
    tensors: dict[str, Tensor] = {"position": torch.tensor([context]), "skipped": torch.tensor([0])}
    for index, spec in enumerate(state.specs):
        for name, entry in spec.items():
            places = {"summary": (), "window": (entry.items,), "growing": (context,)}[entry.kind]
            shape = (1, *places, *entry.shape)
            drawn = torch.randn(shape, generator=generator)
            if name == "sink_place":
                drawn = torch.arange(entry.shape[0])[None]
            elif name == "sink_span":
                drawn = torch.tensor([[context, 0]])
            tensors[f"layers.{index}.{name}"] = drawn
    state.restore(torch.tensor([0]), tensors)
    # one stream stands nowhere else than where it stands
    state.ragged = False
    return state


def read_on(model: SwatForCausalLM, state: Slots, steps: int) -> None:
    """Decode so many tokens greedily."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(steps):
        token = model.decode_step(token, state).argmax(-1, keepdim=True)


if __name__ == "__main__":
    main()

"""Plain `generate` of transformers as a process: batches of prompts from standard input, one after the other.

python -m benchmarks.serve_generate FOLDER

Each line that it reads is a job for `Process.generate` (serve_peers.py), each line that it writes what the job took.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria


class Clock(StoppingCriteria):
    """Notes when each token was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called after every token."""
        self.times.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    """Load, say that it is done, and answer until the input ends."""
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        answers = []
        for start in range(0, len(job["asked"]), job["concurrency"]):
            answers += batch(model, tokenizer, job["asked"][start : start + job["concurrency"]])
        sys.stdout.write(json.dumps({"answers": answers, "seconds": time.monotonic() - begin}) + "\n")
        sys.stdout.flush()


@torch.inference_mode()
def batch(model: Any, tokenizer: Any, asked: list[Any]) -> list[dict[str, Any]]:
    """One call for all; each answer counts only the tokens that were asked for, drawn is what the longest needs."""
    sent, clock = time.monotonic(), Clock()
    read = tokenizer([prompt for prompt, _ in asked], return_tensors="pt", padding=True)
    most = max(count for _, count in asked)
    drawn = model.generate(**read, max_new_tokens=most, do_sample=False, stopping_criteria=[clock])
    texts = tokenizer.batch_decode(drawn[:, read["input_ids"].shape[1] :])
    return [
        {"sent": sent, "texts": clock.times[:count], "prompt_tokens": int(mask.sum()), "tokens": count, "text": text}
        for (_, count), mask, text in zip(asked, read["attention_mask"], texts, strict=True)
    ]


if __name__ == "__main__":
    main()

"""A model whose weights torchao has quantised gives a loss, gradients, tokens and streams."""

from verification.workplace import CONSTRAINTS, REPOSITORY, Workplace

PROGRAM = """
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from swat_lm import SwatConfig, SwatForCausalLM

for layers in (None, ["mamba2", "attention"]):
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        sliding_window=16, initializer_range=0.1, layers=layers,
    )
    model, tokens = SwatForCausalLM(config).eval(), torch.randint(64, (2, 40))
    before = model(tokens, labels=tokens).loss
    quantize_(model, Int8WeightOnlyConfig())
    for learning in (False, True):
        loss = model.train(learning)(tokens, labels=tokens).loss
        assert abs(loss - before) < 0.05, (loss, before)
        loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0
    model.eval()
    logits = model(tokens).logits
    assert (model.prefill(tokens, model.init_state(2))[0] - logits[:, -1]).abs().max() < 1e-3
    assert model.generate(tokens, max_new_tokens=4).shape == (2, 44)
    print("difference", float(loss - before))
"""


def check(place: Workplace) -> dict[str, str]:
    """Install, quantise and compare; returns the version."""
    programs = place.environment("quantiser")
    install = [programs / "python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS]
    place.run([*install, "torch"])
    place.run([*install, f"{REPOSITORY}[model]", "torchao"])
    for line in place.run([programs / "python", "-c", PROGRAM]).splitlines():
        if line.startswith("difference"):
            place.done(f"the loss differs by {float(line.split()[1]):.4f}")
    said = place.run([programs / "python", "-m", "pip", "freeze"])
    return dict(pin.split("==") for pin in said.splitlines() if pin.startswith("torchao=="))

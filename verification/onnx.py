"""Plans of attention export to ONNX with the reference's equation, and onnxruntime computes what the model does."""

from verification.workplace import CONSTRAINTS, REPOSITORY, Workplace

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROGRAM = """
import onnxruntime, torch
from swat_lm import SwatConfig, SwatForCausalLM

capped = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "norm": "layer", "feed_forward": "plain"}
for changes in ({}, {"score_function": "softmax", "learned_sink": True, "sliding_window": [16, None]}, capped):
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        **{"sliding_window": 16, "initializer_range": 0.3, **changes}, attention_backend="reference",
    )
    model, tokens = SwatForCausalLM(config).eval(), torch.randint(64, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    graph = torch.export.export(model, (), inputs)
    torch.onnx.export(graph).save("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    mask[1, 10:12] = 0
    found = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0]
    difference = (torch.from_numpy(found) - model(**inputs).logits).abs().max().item()
    assert difference < 1e-4, difference
    print("difference", difference)
"""


def check(place: Workplace) -> dict[str, str]:
    """Install, export and compare, with a mask that the graph has not seen; returns the versions."""
    programs = place.environment("exporter")
    install = [programs / "python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS]
    place.run([*install, "torch"])
    place.run([*install, f"{REPOSITORY}[model]", *PACKAGES])
    for line in place.run([programs / "python", "-c", PROGRAM]).splitlines():
        if line.startswith("difference"):
            place.done(f"logits of onnxruntime differ by {line.split()[1]}")
    said = place.run([programs / "python", "-m", "pip", "freeze"])
    return dict(pin.split("==") for pin in said.splitlines() if pin.split("==")[0] in PACKAGES)

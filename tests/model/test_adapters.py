"""Beside PEFT and TRL, over every kind of plan: adapters, prompts and prefixes, trainers by a folder's path."""

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from .models import close, tokens
from .plans import PLANS, exported, planned
from .test_trainers import arguments

every_plan = pytest.mark.parametrize("plan", PLANS)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}


@every_plan
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config, LNTuningConfig])
def test_adapters_know_where_to_go(plan, kind):
    model, ids = planned(plan), tokens(2, 9)
    adapted = get_peft_model(model, kind(task_type=TaskType.CAUSAL_LM))
    learnt = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for index, layer in enumerate(model.model.layers):
        assert any(f"layers.{index}." in name for name in learnt), type(layer)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    if kind is not LNTuningConfig:
        adapted.eval()
        close(adapted.merge_and_unload()(ids).logits, planned(plan)(ids).logits)


def test_norms_behind_are_adapted_too():
    model = planned("attention", norm_placement="post")
    adapted = get_peft_model(model, LNTuningConfig(task_type=TaskType.CAUSAL_LM))
    learnt = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(learnt) == 2 * model.config.num_hidden_layers + 1


def test_plain_feed_forwards_are_adapted_too():
    model, ids = planned("attention", feed_forward="plain", mlp_bias=True), tokens(2, 9)
    expected = model(ids).logits
    adapted = get_peft_model(model, IA3Config(task_type=TaskType.CAUSAL_LM))
    assert sum("mlp.down_proj.ia3_l" in name for name, _ in adapted.named_parameters()) == 2
    close(adapted.merge_and_unload()(ids).logits, expected)


@every_plan
def test_a_learnt_prompt_before_padded_rows(plan):
    """Padding stands between the prompt and the text, a hole in the mask: each row as alone."""
    adapted = get_peft_model(planned(plan), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    _each_row_as_alone(adapted.eval())


def test_learnt_prefixes_before_padded_rows():
    adapted = get_peft_model(planned("attention"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    _each_row_as_alone(adapted.eval())


def _each_row_as_alone(adapted) -> None:
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = adapted(input_ids=ids, attention_mask=mask, labels=ids)
    whole.loss.backward()
    alone = adapted(input_ids=ids[1:], attention_mask=mask[1:])
    close(whole.logits[1:], alone.logits)
    found = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found[1:], adapted.generate(input_ids=ids[1:], attention_mask=mask[1:], **GREEDY))
    assert found.shape[1] == 14


PREFERRED = [{"prompt": "the window ", "chosen": "is good", "rejected": "is bad"}] * 8


@every_plan
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "reward"])
def test_trl_loads_by_path_and_makes_its_own_reference(tmp_path, plan, method):
    folder = exported(tmp_path / "model", plan)
    options = {**arguments(tmp_path / "out"), "max_steps": 1, "bf16": False, "logging_steps": 1}
    if method == "sft":
        data = Dataset.from_list([{"text": "the window " * 3}] * 8)
        trainer = SFTTrainer(folder, args=SFTConfig(**options, max_length=32), train_dataset=data)
    elif method == "dpo":
        data = Dataset.from_list(PREFERRED)
        trainer = DPOTrainer(folder, args=DPOConfig(**options, max_length=32), train_dataset=data)
    elif method == "grpo":
        data = Dataset.from_list([{"prompt": "the window "}] * 8)
        settings = GRPOConfig(**options, max_completion_length=8, num_generations=2, beta=0.1)
        trainer = GRPOTrainer(folder, reward_funcs=_letters, args=settings, train_dataset=data)
    else:
        data = Dataset.from_list(PREFERRED)
        trainer = RewardTrainer(folder, args=RewardConfig(**options, max_length=32), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(torch.isfinite(torch.tensor(float(loss))) for loss in losses)
    if method == "dpo":
        # before the first step the model is its own reference
        assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)


def _letters(completions: list[str], **_) -> list[float]:
    return [float(len(completion)) for completion in completions]

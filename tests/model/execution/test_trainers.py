"""Reverse chunks under what people train with: transformers.Trainer, PEFT and DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.layers.subject import close
from tests.model.models import tiny_model, tokens
from tests.model.test_trainers import arguments


def gradients_of_two_micro_batches(model, ids) -> dict[str, torch.Tensor]:
    for part in ids.split(1):
        model(input_ids=part, labels=part).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def same(found: list[dict[str, torch.Tensor]]) -> None:
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name, 1e-5)
        assert gradient.any()


def test_trainer_gives_the_losses_of_plain(tmp_path):
    rows = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (24, 40, 11, 15)]
    logs = []
    for name, settings in (("plain", {}), ("chunks", {"chunk_size": 8})):
        model = tiny_model()
        model.set_execution(name, **settings)
        # with checkpointing of the layers within a chunk, which Trainer asks for
        options = arguments(tmp_path, activation_checkpointing=name == "chunks")
        trainer = Trainer(
            model,
            TrainingArguments(**options),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorWithFlattening(),
        )
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 2
    close(torch.tensor(logs[1]), torch.tensor(logs[0]), tolerance=1e-4)


def test_adapters_and_ddp_get_the_gradients_of_plain(tmp_path):
    model, ids = tiny_model(), tokens(2, 40)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    adapted = get_peft_model(model, lora).train()
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora" in name:
                each.normal_(std=0.1)
    found = []
    for name, settings in (("plain", {}), ("chunks", {"chunk_size": 8})):
        model.set_execution(name, **settings)
        found.append(gradients_of_two_micro_batches(adapted, ids))
    assert len(found[0]) == 10
    same(found)

    model, found = tiny_model().train(), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # it counts how often the gradient of a parameter is ready, and takes more than once for an error
        replicated = torch.nn.parallel.DistributedDataParallel(model)
        for name, settings in (("plain", {}), ("chunks", {"chunk_size": 8})):
            model.set_execution(name, **settings)
            found.append(gradients_of_two_micro_batches(replicated, ids))
    finally:
        dist.destroy_process_group()
    same(found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_switches_of_checkpointing_and_the_execution_agree(tmp_path):
    model, ids = tiny_model().train(), tokens(1, 40)
    flags = [model.model, *model.model.layers]
    model.gradient_checkpointing_enable()
    assert model.execution.name == "checkpoint"
    model.set_execution("plain")
    assert not any(module.gradient_checkpointing for module in flags)
    # by its body, of which classifiers have no other
    model.model.activation_checkpointing_enable()
    assert model.execution.name == "checkpoint"
    model.gradient_checkpointing_disable()
    assert (model.execution.name, model.is_activation_checkpointing) == ("plain", False)

    model.set_execution("chunks", chunk_size=8)
    model.gradient_checkpointing_enable()
    assert (model.execution.name, model.is_activation_checkpointing) == ("chunks", True)
    model.set_execution("blockwise", block_size=8)
    assert not model.model.gradient_checkpointing
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: runs.append(given[0].shape[1]))
    for switch in (model, model.model):
        with pytest.raises(ValueError, match="blockwise computes layers again by itself"):
            switch.gradient_checkpointing_enable()
        switch.gradient_checkpointing_disable()
    model(ids, labels=ids)
    assert (model.execution.name, runs) == ("blockwise", [8] * 5)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, activation_checkpointing=True)),
        train_dataset=Dataset.from_list([{"input_ids": ids[0].tolist()}]),
        data_collator=DataCollatorWithFlattening(),
    )
    with pytest.raises(ValueError, match="leave it off"):
        trainer.train()

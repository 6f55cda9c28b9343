"""One step under what people train with: transformers.Trainer, TRL, PEFT; compiled, under autocast, checkpointed."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorWithFlattening, DynamicCache, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from swat_lm import AbsorbingCallback, SwatConfig, SwatForCausalLM

from .models import VOCABULARY, close, tiny_model, tokens


def arguments(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **changes,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    letters = {chr(32 + index): index for index in range(90)} | {"<pad>": 90, "<eos>": 91, "<unk>": 92}
    inner = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_trainer_sees_the_loss_per_token_over_the_accumulated_batch(tmp_path):
    model = tiny_model().train()
    rows = [tokens(1, length, seed=length)[0] for length in (6, 20, 11, 15)]
    expected_rows = [{"input_ids": row.tolist()} for row in rows]
    with torch.no_grad():
        sums = [model(row[None], labels=row[None], num_items_in_batch=1).loss for row in rows]
    expected = float(sum(sums)) / sum(len(row) - 1 for row in rows)
    collate = DataCollatorWithFlattening()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(expected_rows),
        data_collator=collate,
    )
    trainer.train()
    # flattened documents, uneven micro-batches: still every real token once
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_trl_sft_step_packed_without_padding(tmp_path):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = Dataset.from_list([{"text": "the window slides over the text " * (1 + index % 3)} for index in range(16)])
    options = arguments(tmp_path, max_length=64, packing=True, padding_free=True)
    trainer = SFTTrainer(model, args=SFTConfig(**options, bf16=False), train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["lm_head", "o_proj"]])
def test_lora_step_and_merge(tmp_path, targets):
    model, ids = tiny_model(), tokens(2, 20)
    plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        outputs = adapted(input_ids=ids, labels=ids)
        logits = adapted(input_ids=ids).logits
        close(outputs.loss, model.loss_function(logits=logits, labels=ids, vocab_size=VOCABULARY))
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    trained = adapted(input_ids=ids).logits
    assert (trained - plain).abs().max() > 0.1
    state = model.init_state(2)
    close(model.prefill(ids, state)[0], trained[:, -1])
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, SwatForCausalLM)
    close(merged(ids).logits, trained, 1e-4)


def test_activation_checkpointing_changes_no_gradient():
    model, ids = tiny_model(sliding_window=[3, None]).train(), tokens(2, 24)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.activation_checkpointing_enable()
    for actual, expected in zip(
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())), plain, strict=True
    ):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="fill the cache twice"):
        model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("plan", [None, ["mamba2", "attention"]], ids=str)
def test_every_second_layer_is_checkpointed(plan):
    model, ids = tiny_model(layers=plan, num_hidden_layers=4).train(), tokens(2, 24)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]
    runs = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert all(torch.equal(actual, expected) for actual, expected in zip(gradients, plain, strict=True))
    # hooks, such as FSDP's, stand outside of what is computed again
    assert runs == [0, 1, 2, 3]


def test_compiled_training_step_is_one_graph():
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 24)
    plain = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(plain, list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    close(loss, plain)
    for actual, expected in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        close(actual, expected)


def test_compiled_packed_rows():
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 24)
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2)
    # checking documents looks at values, so this is two graphs
    compiled = torch.compile(model, backend="eager")
    close(compiled(ids, labels=ids, document_ids=documents).loss, model(ids, labels=ids, document_ids=documents).loss)


def test_autocast_trains_float32_weights_in_bfloat16():
    model, ids = tiny_model(qk_norm=True, output_norm=True).train(), tokens(2, 24)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    close(loss, expected, 0.02)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    assert out.shape == (2, 32)


def test_bfloat16_model_generates_and_learns():
    model, ids = tiny_model().bfloat16(), tokens(2, 24)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 32)
    model.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("plan", [None, ["mamba2", "attention"]], ids=str)
def test_tools_find_every_module_that_stays_whole(plan):
    from accelerate.utils.dataclasses import get_module_class_from_name

    # FSDP under accelerate refuses a model that names a class it does not have
    model = tiny_model(hidden_size=64, layers=plan)
    for part in (model, model.model):
        assert {get_module_class_from_name(model, name) for name in part._no_split_modules} == set(
            map(type, model.model.stack)
        )


def quantised() -> SwatForCausalLM:
    torch.manual_seed(0)
    layer = {"kind": "longvq", "block": 4, "key_size": 8, "state_size": 4, "codes": 6, "dead_below": 0.0}
    config = SwatConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, layers=[layer]
    )  # fmt: skip
    return SwatForCausalLM(config)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_callback_has_a_codebook_absorb_what_a_step_has_seen(tmp_path, chunked: bool):
    """All micro-batches of it, once; evaluation and passes without gradients say nothing."""
    model = quantised()
    if chunked:
        model.set_execution("chunks", chunk_size=8)
    rows = Dataset.from_list([{"input_ids": one.tolist(), "labels": one.tolist()} for one in tokens(8, 20)])
    options = TrainingArguments(**arguments(tmp_path, eval_strategy="steps", eval_steps=1))
    trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows, callbacks=[AbsorbingCallback()])
    trainer.train()
    codebook = model.model.layers[0].mixer.codebook
    # two steps of four rows of 20, by the running average
    assert codebook.counts.sum().item() == pytest.approx(0.01 * 80 * 1.99, rel=1e-4)
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="expected a model of swat_lm, got Linear"):
        AbsorbingCallback().on_train_begin(options, trainer.state, trainer.control, model=torch.nn.Linear(1, 1))


def test_a_codebook_learns_under_trl_whose_forward_drops_what_layers_say(tmp_path):
    model = quantised()
    data = Dataset.from_list([{"text": "the window slides over the text " * 2} for _ in range(8)])
    options = SFTConfig(**arguments(tmp_path, max_length=64, max_steps=1), bf16=False)
    trainer = SFTTrainer(
        model, args=options, train_dataset=data, processing_class=tokenizer(), callbacks=[AbsorbingCallback()]
    )
    trainer.train()
    assert model.model.layers[0].mixer.codebook.counts.any()

"""Beside transformers' own models, over every kind of plan: Trainer, pipelines, `generate()`, graphs, Auto classes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.cache import SlotCache

from .models import VOCABULARY, close, tiny_model, tokens
from .plans import PAD, PLANS, exported, planned, rows, tokenizer
from .test_trainers import arguments

every_plan = pytest.mark.parametrize("plan", PLANS)


@every_plan
def test_trainer_evaluates_measures_and_keeps_the_best(tmp_path, plan):
    seen = []

    def measured(prediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = Dataset.from_list(rows())
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(
        planned(plan),
        TrainingArguments(**{**arguments(tmp_path), **options, "load_best_model_at_end": True}),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=measured,
    )
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_loss", "eval_right"} <= found.keys()
    assert found["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (8, 12, VOCABULARY)
    assert set(seen) == {(8, 12, VOCABULARY)}
    ids = torch.tensor([row["input_ids"] for row in rows()])
    with torch.no_grad():
        np.testing.assert_allclose(predicted.predictions, trainer.model(ids).logits.numpy(), rtol=0, atol=1e-4)


def test_label_smoothing_teaches_the_next_token(tmp_path):
    counting = [[(start + place) % 50 for place in range(16)] for start in range(50)]
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 16} for row in counting])
    changes = {"max_steps": 60, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    model = planned("mixed")
    options = {**arguments(tmp_path), **changes, "label_smoothing_factor": 0.1}
    Trainer(model, TrainingArguments(**options), train_dataset=data).train()
    ids = torch.tensor(counting[3:4])
    guessed = model.eval()(ids).logits.argmax(-1)
    assert (guessed[:, 4:-1] == ids[:, 5:]).float().mean() > 0.9
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["swat"] == "SwatForCausalLM"


@every_plan
def test_keywords_that_change_nothing_are_taken(plan):
    model, ids = planned(plan), tokens(1, 5)
    expected = model(ids).logits
    nothing = {"foo": None, "head_mask": None, "token_type_ids": torch.zeros_like(ids), "synced_gpus": False}
    assert torch.equal(model(ids, **nothing).logits, expected)
    for wrong in ("head_mask", "atention_mask", "foo"):
        with pytest.raises(TypeError, match=wrong):
            model(ids, **{wrong: torch.ones(1)})


@every_plan
def test_strings_stop_a_text_and_are_healed(tmp_path, plan):
    model, speller = planned(plan), tokenizer()
    ids = tokens(1, 5)
    # letters alone
    asked = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": list(range(PAD, VOCABULARY))}
    whole = model.generate(ids, **asked)
    word = speller.decode(whole[0, 7:9])
    stopped = model.generate(ids, **asked, stop_strings=[word], tokenizer=speller)
    assert speller.decode(stopped[0]).endswith(word)
    assert stopped.shape[1] <= 9
    letter = speller.decode(whole[0, 6])
    text = pipeline("text-generation", model=model, tokenizer=speller)
    found = text(speller.decode(ids[0]), **asked, stop_sequence=letter)
    assert found[0]["generated_text"].endswith(letter)
    # heals the last token of a prompt: with one letter a token there is nothing to heal
    assert torch.equal(model.generate(ids, **asked, token_healing=True, tokenizer=speller)[0, :5], ids[0])


def test_a_pipeline_finds_its_assistant_by_folder(tmp_path):
    folder = exported(tmp_path, "attention")
    text = pipeline("text-generation", model=folder, assistant_model=folder)
    alone = pipeline("text-generation", model=folder)
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert text("the window", **asked) == alone("the window", **asked)
    model = SwatForCausalLM.from_pretrained(folder)
    ids = tokens(1, 8)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, assistant_early_exit=1), expected)


def test_what_a_cache_still_holds_can_be_taken_back():
    """Without recording: everything while no window has gone round, then what is spare, and the rest is said."""
    model, ids = tiny_model(sliding_window=[12, None]), tokens(2, 30)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.generate(ids[:, :6], max_new_tokens=4, return_dict_in_generate=True).past_key_values
        assert cache.get_seq_length() == 9
        cache.crop(-3)
        close(model(ids[:, 6:9], past_key_values=cache).logits, whole[:, 6:9])
        model(ids[:, 9:20], past_key_values=cache)
        with pytest.raises(ValueError, match=r"only the last 1 tokens can be taken back, got 2; activate_past"):
            cache.crop(-2)
        cache.crop(-1)
        close(model(ids[:, 19:25], past_key_values=cache).logits, whole[:, 19:25])


def test_rows_that_were_padded_can_be_taken_back():
    model, ids = tiny_model(sliding_window=20), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache = SlotCache(model.config)
        model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        cache.crop(-2)
        close(model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits, whole[:, 6:])


@every_plan
def test_holes_and_padding_in_ordinary_use(plan):
    """A second turn after a row ended early, pad tokens in the text, prompts padded on the right: each row as alone."""
    model = planned(plan)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    ids = tokens(2, 8)
    right = torch.ones_like(ids)
    right[0, 5:] = 0
    padded = ids.masked_fill(right == 0, PAD)
    # accepted as by transformers' own, which warns: the padded row goes on from behind its padding
    found = model.generate(padded, attention_mask=right, **greedy)
    assert torch.equal(found[1:], model.generate(ids[1:], **greedy))
    inside = ids.clone()
    inside[0, 4] = PAD
    # without a mask transformers makes one, with a hole where the pad token stands
    hole = (inside != PAD).long()
    assert torch.equal(model.generate(inside, **greedy), model.generate(inside, attention_mask=hole, **greedy))
    first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=-1)
    ended = torch.cat((torch.ones(2, 14, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)), dim=1)
    ended[0, 10:14] = 0
    turn = torch.cat((first.sequences.masked_fill(ended[:, :14] == 0, PAD), tokens(2, 3, seed=5)), dim=1)
    again = model.generate(turn, attention_mask=ended, **greedy)
    assert torch.equal(again[1:], model.generate(turn[1:], **greedy))
    # on the cache of the first turn, which read what is hidden now
    if plan == "attention":
        on = model.generate(turn, attention_mask=ended, past_key_values=first.past_key_values, **greedy)
        assert torch.equal(on, again)
    else:
        with pytest.raises(ValueError, match="row 0 hides tokens that were read, and layers here keep a summary"):
            model.generate(turn, attention_mask=ended, past_key_values=first.past_key_values, **greedy)


@every_plan
def test_padding_on_the_right_is_the_same_with_and_without_a_cache(plan):
    model, ids = planned(plan), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, **greedy, use_cache=False))
    with torch.no_grad():
        close(model(ids, attention_mask=mask, use_cache=False).logits, model(ids, attention_mask=mask).logits)


@every_plan
def test_hooks_and_hidden_states_are_there_for_every_token(plan):
    model, ids = planned(plan), tokens(1, 6)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    asked = {"return_dict_in_generate": True, "output_hidden_states": True}
    assert [len(states) for states in model.generate(ids, **greedy, **asked).hidden_states] == [3] * 4
    model = planned(plan)
    push = 9 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    mixer = model.model.layers[0].get_submodule("self_attn" if plan == "attention" else "mixer")
    plain = model.generate(ids, **greedy)
    for module in (model.model.layers[1], mixer):
        handle = module.register_forward_hook(lambda _, given, out: _pushed(out, push))
        steered = model.generate(ids, **greedy)
        assert torch.equal(steered, model.generate(ids, **greedy, use_cache=False))
        assert not torch.equal(steered, plain)
        handle.remove()


def _pushed(out, push: torch.Tensor):
    return out + push if isinstance(out, torch.Tensor) else (out[0] + push, *out[1:])


@every_plan
def test_offloaded_weights_are_brought_where_they_are_used(tmp_path, plan):
    from accelerate import cpu_offload

    changes = {"score_function": "softmax", "learned_sink": True} if plan == "attention" else {}
    model, ids = planned(plan, **changes), tokens(2, 9)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    logits, loss, made = model(ids).logits, model(ids, labels=ids).loss, model.generate(ids, **greedy)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    on_disk = {"device_map": places | {"lm_head": "disk"}, "offload_folder": tmp_path / "offloaded"}
    cpu_offload(model, execution_device=torch.device("cpu"))
    for offloaded in (model, SwatForCausalLM.from_pretrained(tmp_path, **on_disk).eval()):
        with torch.no_grad():
            close(offloaded(ids).logits, logits)
            close(offloaded(ids, labels=ids).loss, loss)
        assert torch.equal(offloaded.generate(ids, **greedy), made)


@every_plan
def test_generation_in_the_middle_of_training(plan):
    model, ids = planned(plan), tokens(1, 6)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(ids, **greedy)
    model.train().activation_checkpointing_enable()
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert torch.equal(model.eval().generate(ids, **greedy, cache_implementation="dynamic"), expected)


def test_recorded_tokens_follow_the_beams():
    model, ids = tiny_model(sliding_window=5), tokens(2, 8)
    with torch.no_grad():
        for order in (torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])):
            cache = SlotCache(model.config)
            cache.activate_past_recording()
            model(ids, past_key_values=cache)
            cache.batch_select_indices(order)
            cache.crop(-3)
            close(model(ids[order, 5:], past_key_values=cache).logits, model(ids[order]).logits[:, 5:])


@every_plan
def test_other_heads(tmp_path, plan):
    config = planned(plan, num_labels=3).config
    config.num_labels = 3
    ids = tokens(2, 9)
    ids[0, 6:] = PAD
    mask = (ids != PAD).long()
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    for auto, labels in (
        (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}),
        (AutoModelForTokenClassification, {"labels": torch.randint(3, (2, 9))}),
        (AutoModelForQuestionAnswering, spans),
    ):
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        outputs = model(ids, attention_mask=mask, **labels)
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
        model.save_pretrained(tmp_path)
        again = auto.from_pretrained(tmp_path)(ids, attention_mask=mask)
        first = "start_logits" if auto is AutoModelForQuestionAnswering else "logits"
        assert torch.equal(again[first], outputs[first])
        if auto is AutoModelForSequenceClassification:
            # at its last token, whatever stands behind it
            close(outputs.logits[:1], model(ids[:1, :6]).logits)


@pytest.mark.parametrize("case", ["mask", "hole", "positions", "documents", "learning"])
def test_one_graph_whatever_values_say(case):
    model, ids = planned("mixed"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    hole = mask.clone()
    hole[1, 5:7] = 0
    hole[1, 10:] = 0
    given = {
        "mask": {"attention_mask": mask},
        "hole": {"attention_mask": hole},
        "positions": {"position_ids": torch.cat((torch.arange(5), torch.arange(7)))[None]},
        "documents": {"document_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 10 + [-1] * 2])},
        "learning": {"attention_mask": mask, "labels": ids},
    }[case]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, **given)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(input_ids=ids, **given)
        graph = torch.export.export(model, (), {"input_ids": ids, "use_cache": False, **given}, strict=False)
        written = graph.module()(input_ids=ids, use_cache=False, **given)
    for outputs in (compiled, written):
        close(outputs.logits, expected.logits)
        if case == "learning":
            close(outputs.loss, expected.loss)


@pytest.mark.parametrize(
    "changes", [{}, {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "norm": "layer"}], ids=str
)
def test_a_graph_serves_other_masks(changes):
    """It was made from a mask without a hole."""
    model, ids = planned("attention", **changes), tokens(2, 12)
    plain = torch.ones_like(ids)
    graph = torch.export.export(model, (), {"input_ids": ids, "attention_mask": plain, "use_cache": False}).module()
    for begin, end in ((0, 3), (4, 6), (9, 12)):
        mask = plain.clone()
        mask[1, begin:end] = 0
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        close(graph(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)


def test_a_graph_serves_other_lengths():
    model, ids = planned("attention"), tokens(2, 12)
    length = torch.export.Dim("length", min=2, max=4096)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    free = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    graph = torch.export.export(model, (), inputs, dynamic_shapes=free).module()
    for count in (5, 40):
        given = {"input_ids": tokens(2, count), "attention_mask": torch.ones(2, count, dtype=torch.long)}
        given["attention_mask"][0, :3] = 0
        close(graph(**given, use_cache=False).logits, model(**given, use_cache=False).logits)


# each case in a process of its own, forked from one that has imported what they use, but not this package
STRANGER = """
import os, sys, traceback
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import dynamic_module_utils
assert "swat_lm" not in sys.modules
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "swat_lm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def use(folder):
    print(type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__)
    print(type(AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)).__name__)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder + "/again")
    scorer = HFLM(pretrained=folder + "/again", tokenizer=folder, trust_remote_code=True, device="cpu")
    print(len(scorer.loglikelihood_rolling([type("Asked", (), {"args": ("the window",)})])))
for installed in ("no", "yes"):
    child = os.fork()
    if child == 0:
        dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] + installed
        sys.stdout = open(f"{sys.argv[2]}/{installed}.txt", "w")
        if installed == "no":
            sys.meta_path.insert(0, Absent())
        try:
            use(sys.argv[1])
        except ImportError as error:
            print(" ".join(str(error).split()))
        except BaseException:
            traceback.print_exc()
        sys.stdout.close()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_tools_that_do_not_know_the_model_find_it(tmp_path):
    folder = exported(tmp_path / "model", "mixed")
    named = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert named["AutoModelForCausalLM"] == "modeling_swat.SwatForCausalLM"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, folder, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    said = (tmp_path / "yes.txt").read_text().splitlines()
    assert said == ["SwatForCausalLM", "SwatForSequenceClassification", "1"], ran.stderr
    again = tmp_path / "model" / "again"
    assert json.loads((again / "config.json").read_text())["auto_map"] == named
    assert sorted(path.name for path in again.glob("*.py")) == ["modeling_swat.py"]
    # where this package is not installed
    (*_, last) = (tmp_path / "no.txt").read_text().splitlines()
    assert "swat_lm" in last, ran.stderr
    assert "pip install" in last


def test_a_configuration_is_pushed_with_the_module_that_it_names(tmp_path, monkeypatch):
    pushed = []

    def uploads(self, repo_id, **options) -> None:
        self.save_pretrained(tmp_path / "sent")
        pushed.append((repo_id, sorted(path.name for path in (tmp_path / "sent").iterdir())))

    monkeypatch.setattr(SwatConfig, "push_to_hub", uploads)
    planned("attention").config.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert pushed == [("mine", ["config.json", "modeling_swat.py"])]

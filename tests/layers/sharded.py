"""The contract under FSDP2 over two processes: one launch for many subjects, each judged by one process's gradients.

`main` is what each of them does, with `subjects.json` in the folder.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from swat_lm import SwatForCausalLM
from tests.forked import run_two
from tests.layers.in_training import IGNORED, LENGTH, loss_by_chunks, packed_rows, targets_of
from tests.layers.subject import Subject, close, gradients, tokens

CUTS = [5, 1, 10, 6]
# packed rows or whole ones; which tokens are learnt: all, or those of the last chunk alone, whose gradients reach older
# chunks by the carry only; activation checkpointing. Every two of them meet in each of their four ways
WAYS = ((False, 0, False), (False, LENGTH - CUTS[-1], True), (True, 0, True), (True, LENGTH - CUTS[-1], False))


def launch(subjects: list[Subject], folder: Path, prepare: str = "") -> dict[str, str]:
    """Try all subjects on two processes; what went wrong with each, by name, "" where nothing did.

    `prepare` is Python that every process runs first: it registers kinds that are not in LAYERS.
    """
    (folder / "subjects.json").write_text(json.dumps([asdict(subject) for subject in subjects]))
    (folder / "prepare.py").write_text(prepare)
    run_two("from tests.layers import sharded; sharded.main()", folder, folder=folder)
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {subject.name: said[0][subject.name] or said[1][subject.name] for subject in subjects}


def sharded(model: SwatForCausalLM) -> SwatForCausalLM:
    """Every layer and the rest by itself, as the trainer does."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def whole(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients gathered from all processes."""
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in gradients.items()}


def try_one(subject: Subject, rank: int) -> None:
    """Chunks of whole rows and packed ones, with activation checkpointing or not, against one pass of one process."""
    ids = tokens(2, LENGTH)
    for packed, beginning, checkpointing in WAYS:
        documents = packed_rows()[:2] if packed else None
        learnt = targets_of(ids, documents)
        learnt[:, :beginning] = IGNORED
        model = subject.model().train()
        loss = model(ids, shift_labels=learnt, num_items_in_batch=2, document_ids=documents).loss
        expected = gradients(model, loss)
        own = None if documents is None else documents[rank : rank + 1]
        model = subject.model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        sharded(model)
        mine = loss_by_chunks(model, ids[rank : rank + 1], learnt[rank : rank + 1], CUTS, "exact", own)
        for name, gradient in whole(gradients(model, mine)).items():
            close(gradient, expected[name], f"{name}, {packed=}, learnt from {beginning}, {checkpointing=}")


def main() -> None:
    """What one process does with the folder that is its only argument."""
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    init_process_group("gloo")
    exec(compile((folder / "prepare.py").read_text(), "prepare.py", "exec"), {})
    said = {}
    for values in json.loads((folder / "subjects.json").read_text()):
        subject = Subject(**values)
        try:
            try_one(subject, rank)
            said[subject.name] = ""
        except Exception:
            said[subject.name] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    destroy_process_group()

"""What the tests of the command line share: a working directory, a model folder, and the call itself."""

import gc
from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer

RECIPE = """
model: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, sliding_window: 8}
data: {sources: [text], sequence_length: 32, cache: tokens}
train: {steps: 6, batch_size: 2, warmup_steps: 1, evaluate_every: 3, evaluate_batches: 2, save_every: 3}
"""


# imports, graphs and models make objects by the hundred thousand, hardly any of them garbage: to look for it after
# every 700 takes about a tenth of the suite's time
gc.set_threshold(50_000, 20, 100)


# the longest, most of which wait for processes of their own; none that shares what was long to make
LONGEST = {
    "test_auto_classes_know_the_model_in_any_order_of_imports",
    "test_experiments_share_variants_and_continue",
    "test_interrupted_demo_saves_and_goes_on",
    "test_it_holds_over_two_processes",
    "test_killed_run_goes_on_bit_for_bit_and_serves",
    "test_two_processes_compute_what_one_does",
    "test_two_processes_reproduce_a_table",
    "test_two_processes_share_the_heads",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is busy with one when the other has nothing left to take over."""
    items.sort(key=lambda item: item.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Leave what was imported out of all later collections of garbage: benchmarks collect before every round."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "run.yaml").write_text(RECIPE)
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog\n" * 20)
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without any training."""
    folder = tmp_path_factory.mktemp("model") / "export"
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    SwatForCausalLM(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


class Ran:
    """What one call of the command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    """Call the command line in this process."""

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run_application([str(one) for one in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return call

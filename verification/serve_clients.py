"""Other people's clients against `swat-lm serve`: LangChain, schemathesis and lm-evaluation-harness over HTTP.

On a tiny model with random weights that is made here, so nothing but a package index is needed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swat_lm.files import write_text
from verification.lm_eval_tasks import local_name, write_task
from verification.lm_eval_truth import compare, read_samples
from verification.workplace import CONSTRAINTS, REPOSITORY, CheckFailedError, Workplace, require

PACKAGES = ("langchain-openai", "schemathesis", "tenacity")
TASK = "piqa"
DOCUMENTS = 40
# schemathesis counts what a schema allows as right, but a server has rules that no schema says: that token ids are the
# model's, or that of two fields one is given
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)

MAKE = """
import sys, torch
from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.data import load_tokenizer

torch.manual_seed(0)
SwatForCausalLM(SwatConfig(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, sliding_window=16,
    initializer_range=0.2,
)).save_pretrained(sys.argv[1])
tokens = load_tokenizer("bytes")
tokens.chat_template = "{% for one in messages %}{{ one.role }}: {{ one.content }}\\n{% endfor %}assistant:"
tokens.save_pretrained(sys.argv[1])
"""

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAI

letters = {"response_format": {"type": "regex", "regex": "[a-z]{12}"}}
shared = {"model": "tiny", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0, "temperature": 0}
text = OpenAI(**shared, max_tokens=20, extra_body=letters)
whole = text.invoke("abc")
assert len(whole) == 12 and whole.isalpha(), whole
assert "".join(text.stream("abc")) == whole
assert text.batch(["abc", "xyz", "abc"])[::2] == [whole, whole]
several = OpenAI(**shared, n=2, best_of=2, max_tokens=5, extra_body=letters).generate(["abc", "xyz"])
assert [len(found) for found in several.generations] == [2, 2]
assert several.llm_output["token_usage"]["completion_tokens"] == 20
chat = ChatOpenAI(**shared, max_tokens=20, extra_body=letters)
answer = chat.invoke([("system", "short"), ("user", "hi")])
assert len(answer.content) == 12 and answer.usage_metadata["output_tokens"] >= 12, answer
assert "".join(part.content for part in chat.stream([("system", "short"), ("user", "hi")])) == answer.content
"""


def check(place: Workplace) -> dict[str, str]:
    """Install the clients, serve, and let each of them ask; returns their versions."""
    programs = environment(place)
    model = place.folder / "tiny"
    place.run([sys.executable, "-c", MAKE, model], cwd=REPOSITORY)
    with serving(place, model) as address:
        place.run([programs / "python", "-c", LANGCHAIN, f"{address}/v1"])
        place.done("LangChain: OpenAI and ChatOpenAI invoke, stream, batch and generate")
        place.done(f"schemathesis: {schemathesis(place, programs, address)}")
        place.done(f"lm_eval --model local-completions: {harness(place, programs, address, model)}")
    place.done("after SIGTERM the server ended with 0")
    said = place.run([programs / "python", "-m", "pip", "freeze"])
    wanted = {*PACKAGES, "lm_eval", "openai"}
    return dict(pin.split("==") for pin in said.splitlines() if pin.partition("==")[0] in wanted)


def environment(place: Workplace) -> Path:
    """The clients, beside what this environment has; returns the folder of programs."""
    programs = place.environment("clients")
    (site,) = (place.folder / "clients" / "lib").glob("python*/site-packages")
    beside = [path for path in sys.path if path.endswith("site-packages")]
    write_text(site / "beside.pth", "".join(f"{path}\n" for path in beside))
    place.run([programs / "python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *PACKAGES])
    return programs


@contextmanager
def serving(place: Workplace, model: Path) -> Iterator[str]:
    """The server's address; it must end well when it is told to."""
    log = place.folder / "server.log"
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "swat_lm.cli", "serve", str(model), "--port", "0", "--max-new-tokens", "64"]
    with log.open("w", encoding="utf-8") as stream:
        server = subprocess.Popen(command, stderr=stream, env=variables, cwd=place.folder)
    try:
        end = time.monotonic() + 120
        while "ready: " not in (said := log.read_text(encoding="utf-8")):
            require(server.poll() is None and time.monotonic() < end, f"the server did not start\n{said[-2000:]}")
            time.sleep(0.1)
        found = re.search(r"listening on (\S+?),", said)
        assert found is not None
        yield found[1]
        server.send_signal(signal.SIGTERM)
        require(server.wait(60) == 0, f"the server ended with {server.returncode}\n{log.read_text()[-2000:]}")
        require(
            "Traceback" not in log.read_text(encoding="utf-8"), f"the server met a defect: {log.read_text()[-3000:]}"
        )
    finally:
        server.kill()
        server.wait()


def schemathesis(place: Workplace, programs: Path, address: str) -> str:
    """What the server answers to bodies that its document allows, and to such that it does not; returns the count."""
    said = place.run([
        programs / "schemathesis", "run", f"{address}/openapi.json", "--phases", "examples,coverage,fuzzing",
        "--checks", CHECKS, "--max-examples", "40", "--seed", "1", "--max-time", "120", "--generation-database", "none",
        "--no-color",
    ])  # fmt: skip
    found = re.search(r"([\d,]+) generated, ([\d,]+) passed", said)
    if found is None:
        raise CheckFailedError(f"schemathesis did not say what it did\n{said[-2000:]}")
    operations = re.search(r"Operations: +(\d+) selected", said)
    return f"{found[1]} requests over {operations[1] if operations else '?'} operations, none of which failed a check"


def harness(place: Workplace, programs: Path, address: str, model: Path) -> str:
    """A task over HTTP and by `swat-lm evaluate tasks`; returns how far apart the log-likelihoods are."""
    data, folders = place.folder / "data", {side: place.folder / side for side in ("over", "ours")}
    rows = [
        {"goal": f"Count to {number}", "sol1": f"say {number} words", "sol2": "jump " * (1 + number % 3),
         "label": number % 2} for number in range(DOCUMENTS)
    ]  # fmt: skip
    write_text(data / "commonsense" / "piqa_validation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_task(TASK, data, folders["over"] / "task")
    told = {
        "model": model.name, "base_url": f"{address}/v1/completions", "tokenizer": str(model),
        "tokenizer_backend": "huggingface", "num_concurrent": "2", "max_retries": "1", "max_length": "2048",
    }  # fmt: skip
    place.run([
        programs / "python", "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
        ",".join(f"{name}={value}" for name, value in told.items()), "--tasks", local_name(TASK), "--include_path",
        folders["over"] / "task", "--batch_size", "4", "--log_samples", "--output_path", folders["over"] / "results",
    ])  # fmt: skip
    place.run([
        sys.executable, "-m", "swat_lm.cli", "evaluate", "tasks", f"swat={model}", "--tasks", TASK, "--data", data,
        "--max-length", "2048", "--device", "cpu", "--log-samples", "--out", folders["ours"] / "results",
    ], cwd=REPOSITORY)  # fmt: skip
    found = compare(TASK, read_samples(folders["over"]), read_samples(folders["ours"]))
    require(found.documents == DOCUMENTS, f"{found.documents} documents, expected {DOCUMENTS}")
    return (
        f"{found.documents} documents, {found.requests} requests, the answers of swat-lm evaluate tasks; "
        f"log-likelihoods differ by at most {found.largest:.1e}"
    )

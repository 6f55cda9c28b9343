"""`reproduce` on two processes: one process prepares, measures and writes, the others wait; errors reach all."""

import json
import random
from pathlib import Path

from tests.forked import run_two

WORDS = ["the", "red", "blue", "slow", "quick", "fox", "dog", "tree", "runs", "sleeps", "sings", "over", "under", "but"]
# two variants of one table are enough; the first process is slow in what it does alone, as it is on a real text
PROGRAM = """
import dataclasses, json, os, sys, time
from pathlib import Path
from swat_lm.evaluate import length
from swat_lm.papers import PAPERS, reproduction, texts
from swat_lm.papers.watching import Watcher

tables = PAPERS["swat"]
tables["table2"] = dataclasses.replace(tables["table2"], names=tables["table2"].names[:2])
data, out = map(Path, sys.argv[1:])
rank = os.environ["RANK"]

def slowly(function):
    def later(*arguments, **named):
        time.sleep(1)
        return function(*arguments, **named)
    return later

texts.sample_text = slowly(texts.sample_text)
length.loss_on_same_text = slowly(length.loss_on_same_text)
for count in (1, 2):
    sources = reproduction.sources_from_folder(data, tables["table2"])
    found = reproduction.reproduce("table2", "miniature", sources, out, [0], Watcher())
    Path(f"{out}.rank{rank}.{count}").write_text(json.dumps(found))
try:
    reproduction.reproduce("table2", "tiny", sources, out, [0], Watcher())
except ValueError as error:
    Path(f"{out}.rank{rank}.error").write_text(str(error))
"""


def test_two_processes_reproduce_a_table(tmp_path: Path):
    source = random.Random(0)
    for name, count, words in (("corpus", 60, 200), ("books", 4, 900)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text(" ".join(source.choices(WORDS, k=words)))
    out = tmp_path / "out"
    run_two(PROGRAM, tmp_path, out, folder=tmp_path)
    for count in (1, 2):
        first, second = (json.loads(Path(f"{out}.rank{rank}.{count}").read_text()) for rank in (0, 1))
        assert first == second
        assert [claim["outcome"] for claim in first["claims"]].count("not measured") == 4
    assert json.loads((out / "table2.json").read_text()) == first
    assert len(list((out / "runs").glob("*/evaluation/*.json"))) == 4
    errors = [Path(f"{out}.rank{rank}.error").read_text() for rank in (0, 1)]
    assert all("holds another scale or text" in error for error in errors)

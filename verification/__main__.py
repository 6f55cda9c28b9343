"""Runs the heavy checks and writes that they ran, when, on what, and how each ended.

    python -m verification [NAME ...] [--record]

The report goes to `runs/verification.json`, which git ignores. With `--record` it also becomes the committed
`verification/record.json`; a check that was not named keeps its entry there. Checks that need data or weights, or take
very long, run only where they are named, with their options.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from swat_lm.files import write_text
from verification import (
    codebook_peer,
    execution_runs,
    lm_eval_truth,
    long_document,
    memory_slopes,
    onnx,
    packaging,
    segment_peers,
    serve_clients,
    serve_soak,
    site,
    torchao,
)
from verification.workplace import REPOSITORY, CheckFailedError, Workplace

CHECKS = {
    "packaging": packaging.check,
    "site": site.check,
    "onnx": onnx.check,
    "torchao": torchao.check,
    "serve_clients": serve_clients.check,
    "segment_peers": segment_peers.check,
    "codebook_peer": codebook_peer.check,
    "execution_runs": execution_runs.check,
    "memory_slopes": memory_slopes.check,
}
ON_REQUEST = {
    "lm_eval_truth": lm_eval_truth.check,
    "serve_soak": serve_soak.check,
    "long_document": long_document.check,
}
"""Checks of what the user brings along, or that take very long; they take the options of the command line."""
OWN = REPOSITORY / "runs" / "verification.json"
RECORD = REPOSITORY / "verification" / "record.json"


def main(arguments: list[str] | None = None) -> int:
    """Run checks; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = f"of {', '.join(CHECKS)}, which all run when none is named; or {', '.join(ON_REQUEST)}"
    parser.add_argument("checks", nargs="*", metavar="NAME", help=words)
    parser.add_argument("--record", action="store_true", help="also write verification/record.json, which is committed")
    lm_eval_truth.add_options(parser)
    serve_soak.add_options(parser)
    long_document.add_options(parser)
    options = parser.parse_args(arguments)
    for name in options.checks:
        if name not in {**CHECKS, **ON_REQUEST}:
            parser.error(f"no check is called {name!r}; expected {', '.join([*CHECKS, *ON_REQUEST])}")
    found = {name: run(name, options) for name in options.checks or CHECKS}
    write_text(OWN, json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{OWN}\n")
    if options.record:
        before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        write_text(RECORD, json.dumps({**before, **found}, indent=1) + "\n")
        sys.stdout.write(f"{RECORD}\n")
    else:
        sys.stdout.write("The committed record is as it was; --record writes it too\n")
    return 0 if all(entry["outcome"] == "passed" for entry in found.values()) else 1


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One check's entry: when, of which commit, on what, how it ended, and what it did."""
    begin = time.monotonic()
    entry: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory(prefix=f"verify-{name}-") as folder:
        place = Workplace(Path(folder), lambda line: say(f"{name}: {line}"))
        try:
            entry["versions"] = CHECKS[name](place) if name in CHECKS else ON_REQUEST[name](place, options)
            entry["outcome"] = "passed"
        except CheckFailedError as error:
            entry["outcome"] = "failed"
            sys.stderr.write(f"{name} failed: {error}\n")
        entry["did"] = place.did
    entry["seconds"] = round(time.monotonic() - begin)
    say(f"{name}: {entry['outcome']} after {entry['seconds']} s")
    return entry


def commit() -> str:
    """The commit of the working tree, and whether it has changes on top."""
    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if git("status", "--porcelain", "--", ":!verification/record.json") else "")


def git(*words: str) -> str:
    """What git says, or nothing where this is no clone."""
    ran = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

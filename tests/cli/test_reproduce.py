"""`swat-lm reproduce` as a stranger uses it: its plan in readable units, its options checked before anything is run."""

from pathlib import Path

import pytest

from swat_lm.words import lasting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0,x"), "--seeds: expected different whole numbers"),
        (("--data", "nothing"), "--data: no folder nothing"),
        (("--text", "nothing"), "nothing"),
        (("--out", "run.yaml"), "cannot write --out run.yaml: Not a directory"),
    ],
)
def test_a_dry_run_checks_its_options(cli, here: Path, options: tuple[str, ...], message: str):
    ran = cli("reproduce", "figure5", "--scale", "tiny", "--dry-run", *options)
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == ""


def test_a_plan_says_how_long(cli, here: Path):
    tiny = cli("reproduce", "figure2", "--scale", "tiny", "--dry-run", "--seeds", "0,1").out
    assert "1 run a seed, 2 seeds: " in tiny
    assert " 0 h" not in tiny
    assert " 0.0" not in tiny
    # none of its models is without a formula
    assert "* estimate" not in tiny
    assert [lasting(3600 * hours) for hours in (0.0001, 0.01, 0.2, 3, 1234)] == [
        "1 s",
        "36 s",
        "12 min",
        "3.0 h",
        "1,234 h",
    ]

"""The contract of layers as checks: what holds for a model of any plan, whatever its layers are.

A `Subject` is a plan; a check is a function of a subject and a folder of its own, and `CHECKS` are all of them. A test
that wants the whole suite for a kind that is not in LAYERS puts it there and parametrises over `CHECKS`:

    @pytest.mark.parametrize("check", CHECKS, ids=name_of)
    def test_it_keeps_the_contract(check, tmp_path, monkeypatch):
        monkeypatch.setitem(LAYERS, "mine", MyLayer)
        check(Subject("mine", ["mine"]), tmp_path)

What takes two processes is in `sharded.py`: one launch serves many subjects.
"""

from tests.layers import at_once, generating, in_slots, in_training, on_disk
from tests.layers.subject import Check, Subject, name_of

__all__ = ["CHECKS", "Check", "Subject", "name_of"]

CHECKS: tuple[Check, ...] = (
    *at_once.CHECKS,
    *in_slots.CHECKS,
    *in_training.CHECKS,
    *generating.CHECKS,
    *on_disk.CHECKS,
)

"""Values behind what is typed for options."""

import pytest

from swat_lm.cli.options import parse_windows, whole_numbers


def test_whole_numbers_are_those_of_python():
    assert whole_numbers("1_000, +32,2 ", "--lengths", 2, "256,1024") == [1000, 32, 2]
    for text in ("8,1", "8,", "", "8;16", "8.0", "-8", "2x"):
        with pytest.raises(ValueError, match=r"--lengths: expected whole numbers of .* with commas between") as caught:
            whole_numbers(text, "--lengths", 2, "256,1024")
        assert f"got {text!r}" in str(caught.value)
    assert whole_numbers("1,1", "--seeds", 0, "0,1") == [1, 1]
    with pytest.raises(ValueError, match="--seeds: expected different whole numbers"):
        whole_numbers("1,01", "--seeds", 0, "0,1", different=True)


def test_windows_are_numbers_or_words():
    assert parse_windows("64, none,own,64") == ["64", "none", "own"]
    for text in ("8;16", "8,", "8,0", "wide"):
        with pytest.raises(ValueError, match="`none` or `own`, with commas between") as caught:
            parse_windows(text)
        assert f"got {text!r}" in str(caught.value)

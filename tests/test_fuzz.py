"""Some cases of every kind of tests/fuzz.py, which finds more in more time: python -m tests.fuzz --minutes 10."""

import random

import pytest
from fuzz import KINDS, fuzz_file, fuzz_options, outcome

from vmrnn.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind, tmp_path):
    read, refused = fuzz_file(kind, random.Random(7), tmp_path, 25)
    assert read + refused == 25


def test_odd_options_are_taken_or_refused():
    taken, refused = fuzz_options(random.Random(7), 100)
    assert taken + refused == 100 and refused > taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_read(kind, tmp_path):
    """Without this a reader that refuses everything would pass."""
    write, read = KINDS[kind]
    write(tmp_path / f"whole.{kind}")
    assert outcome(lambda: read(tmp_path / f"whole.{kind}"), b"") == 0


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), UserError("two\nlines")])
def test_anything_else_than_a_refusal_in_one_line_is_found(error):
    def fail():
        raise error

    with pytest.raises(AssertionError, match="case"):
        outcome(fail, b"case")

"""A guest answers line by line; one that ends says why."""

import subprocess
import sys

import pytest

from qlib.bench.guests import Guest
from qlib.errors import UserError

ANSWERS = "print('{}', flush=True); input(); print('{\"Q4_0\": 3.0, \"rest\": 1.0}', flush=True); "


def guest(code: str) -> Guest:
    pipe = subprocess.PIPE
    return Guest(subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True))


def test_what_a_call_costs_beside_the_layer_is_taken_off():
    one = guest(ANSWERS)
    one.ask("decode")
    assert one.milliseconds("decode", "Q4_0", 5).tolist() == [2.0]
    one.process.wait()


@pytest.mark.parametrize(
    "end, why", (("import os; os.kill(os.getpid(), 11)", "ended with code -11"), ("raise SystemExit('no memory')", "no memory"))
)
def test_one_that_dies_is_an_error_and_not_a_bad_answer(end, why):
    one = guest(ANSWERS + end)
    one.ask("decode")
    with pytest.raises(UserError, match=why):
        one.ask("decode")
    with pytest.raises(UserError, match=why):
        guest(end)

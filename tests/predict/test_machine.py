"""Machines: read from files that are checked, measured once, and interpolated between sizes."""

import json
from contextlib import nullcontext

import pytest

from qlib.errors import UserError
from qlib.predict import machine as machines
from qlib.predict.machine import KINDS, read_machine, shipped_machines, this_machine

GOOD = {"name": "a", "measured": "now", "memory_bytes": 10**9, "rates": {"read": 1e10, "bf16": {"256": 1e11, "1024": 4e11}}}


def written(tmp_path, **changes):
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...}))
    return str(file)


def test_rates_between_two_sizes_lie_on_a_straight_line_of_logarithms(tmp_path):
    machine = read_machine(written(tmp_path))
    assert machine.rate("read", 77) == 1e10 and machine.rate("fp32") is None
    found = [machine.rate("bf16", size) for size in (1, 256, 512, 1024, 9999)]
    assert found == pytest.approx([1e11, 1e11, 2e11, 4e11, 4e11])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"memory_bytes": ...}, "machine.json: memory_bytes: is missing; allowed: int"),
        ({"memory_bytes": "80 GB"}, "machine.json: memory_bytes: '80 GB' is not allowed; allowed: int"),
        ({"memory": 1}, "machine.json: memory: unknown field (did you mean 'memory_bytes'?)"),
        ({"rates": {"reed": 1}}, "machine.json: rates.reed: unknown kind (did you mean 'read'?)"),
        ({"rates": {"read": 0}}, "machine.json: rates.read: 0: 0 is not allowed"),
        ({"rates": {"read": {"wide": 1}}}, "machine.json: rates.read: wide: 1 is not allowed; allowed: size: a number above 0"),
        ({"rates": {"read": {}}}, "machine.json: rates.read: is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        read_machine(written(tmp_path, **changes))
    assert words in str(error.value)


def test_a_file_that_is_not_there_is_refused_with_the_nearest_machine():
    with pytest.raises(UserError, match=r"--machine: 'a100' is no file \(did you mean 'a100-80g'\?\)"):
        read_machine("a100")


def test_shipped_machines_can_be_read_and_name_their_source():
    assert "a100-80g" in shipped_machines()
    for name in shipped_machines():
        machine = read_machine(name)
        assert machine.rate("read") > 0 and "data sheet" in machine.measured


def test_a_machine_is_measured_once_and_again_if_asked(monkeypatch, tmp_path):
    from qlib.predict import rates

    asked = []
    monkeypatch.setattr(machines, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(rates, "measure_rates", lambda device: asked.append(device) or {"read": {0: float(len(asked))}})
    monkeypatch.setattr(rates, "process_bytes", lambda: 5)
    assert [one.rate("read") for one in (this_machine(), this_machine(), this_machine(fresh=True))] == [1, 1, 2]
    with pytest.raises(UserError, match="--device: 'gpu' is unknown; allowed: cpu, cuda"):
        this_machine("gpu")


def test_every_kind_is_measured(monkeypatch):
    import torch

    from qlib.predict import rates

    monkeypatch.setattr(rates, "exclusive", nullcontext)  # these times are looked at by nobody
    small = {"WIDTHS": (128,), "WIDE": (128, 256), "TOKENS": 64, "FEW_TOKENS": 32, "NUMBERS": 2**12, "ROUNDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(rates, name, value)
    found = rates.measure_rates(torch.device("cpu"))
    assert set(found) == set(KINDS) and set(found["hessian"]) == {128, 256}
    assert all(rate > 0 for table in found.values() for rate in table.values())

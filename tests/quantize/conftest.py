"""Inputs of every linear of the reference model on a little calibration text, collected once per session."""

import pytest
import torch

WINDOWS = 8


@pytest.fixture(scope="session")
def reference_linears():
    """Path, weight `[out, in]` and calibration inputs `[tokens, in]` of every linear; those of a group share inputs."""
    from qlib.data.calibration import read_calibration
    from qlib.models.families import blocks_of
    from qlib.models.load import load
    from qlib.params import Calibration
    from qlib.walk import walk

    subject, seen = load("reference-2"), {}

    def listen(index, block, names):
        return seen.setdefault((index, names), []).append

    ids = read_calibration(subject.tokenizer, Calibration(samples=WINDOWS), seed=0)
    walk(subject.model, ids, listen, lambda index, block, names: None)
    found = []
    for (index, names), batches in seen.items():
        inputs = torch.cat(batches)
        for name in names:
            weight = blocks_of(subject.model)[index].get_submodule(name).weight.detach()
            found.append((f"{index}.{name}", weight, inputs))
    return found

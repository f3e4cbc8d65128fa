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
    from qlib.models.families import family_of
    from qlib.walk import feed_groups, walk

    subject, seen = load("reference-2"), {}

    ids = read_calibration(subject.tokenizer, Calibration(samples=WINDOWS), seed=0)
    for visit in walk(subject.model, ids):
        groups = {names: seen.setdefault((visit.index, names), []).append for names in family_of(subject.config).groups}
        feed_groups(visit.block, visit.inputs, groups)
    found = []
    for (index, names), batches in seen.items():
        inputs = torch.cat(batches)
        for name in names:
            weight = blocks_of(subject.model)[index].get_submodule(name).weight.detach()
            found.append((f"{index}.{name}", weight, inputs))
    return found

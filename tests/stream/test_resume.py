"""A killed stream goes on to the same bytes, and only with the same parameters; memory does not grow with depth."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from driver import IDS, RECIPE

from qlib.errors import UserError
from qlib.stream.run import stream

ROOT = Path(__file__).parents[2]
RTN = [{"pass": "rtn", "bits": 4, "group_size": 32}]


def drive(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def hashes(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*") if file.is_file()
    }  # fmt: skip


def test_killed_anywhere_and_often_it_ends_with_the_same_bytes(model_folder, tmp_path):
    model = model_folder(shard="60KB", num_hidden_layers=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the children: the manifest tells how many, for what is solved depends on it
    try:
        stream(str(model), RECIPE, tmp_path / "whole", IDS, seed=5)
    finally:
        torch.set_num_threads(threads)
    before = hashes(model)
    # In the embedding; in the states behind the first block; inside its shard; between shard and manifest; ...
    points = [1, 5, 13, 30, 2, 24, 41, 60, 7, 33, 45, 3]
    [deaths] = drive("killed", model, tmp_path / "killed", ",".join(map(str, points)))
    assert deaths >= 9
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole") and hashes(model) == before


def test_memory_does_not_grow_with_depth_nor_mapped_with_text(model_folder):
    sizes = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=4, head_dim=128)
    models = [model_folder(hidden_size=128, head_dim=32, name="tiny")]
    models += [model_folder(shard="3MB", name=f"{depth}", num_hidden_layers=depth, **sizes) for depth in (2, 8)]
    block = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)
    shallow, deep, kept, mapped = drive("memory", *models)
    assert 2 * block < shallow and abs(deep - shallow) < block, (shallow / 1e6, deep / 1e6, block / 1e6)
    states = 2 * 128 * 32 * 8 * 256
    assert kept - mapped > 1.2 * states, (kept / 1e6, mapped / 1e6)  # what reaches a block, and what leaves it: less noise


def test_another_number_of_threads_is_refused_where_text_is_read(model_folder, tmp_path):
    model, threads = str(model_folder(shard="60KB")), torch.get_num_threads()
    for recipe, name in ((RECIPE, "solved"), (RTN, "rounded")):
        stream(model, recipe, tmp_path / name, IDS, seed=5)
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UserError, match=f"threads: {threads} -> {threads + 1}"):
            stream(model, RECIPE, tmp_path / "solved", IDS, seed=5)
        assert stream(model, RTN, tmp_path / "rounded", IDS, seed=5).complete
    finally:
        torch.set_num_threads(threads)

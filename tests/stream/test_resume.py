"""A killed stream goes on to the same bytes, and only with the same parameters; memory does not grow with depth."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from driver import IDS, RECIPE

from qlib.errors import UserError
from qlib.stream.run import stream

ROOT = Path(__file__).parents[2]


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
    stream(str(model), RECIPE, tmp_path / "whole", IDS, seed=5)
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
    assert kept - mapped > 1.5 * states, (kept / 1e6, mapped / 1e6)  # what reaches a block, and what leaves it

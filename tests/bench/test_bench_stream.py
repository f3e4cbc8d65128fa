"""The benchmark of streams: its checkpoint loads at every depth, its peaks are those of a stream, its limit is one."""

import os
import sys

import pytest
import torch

from qlib.bench import bench_packing, bench_stream
from qlib.bench.bench_packing import pack_block
from qlib.bench.bench_stream import RTN, keep_layers, peaks_of
from qlib.bench.limited import run_limited
from qlib.bench.subjects import write_random_checkpoint
from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.load import load
from qlib.models.shapes import Shape

SHAPE = Shape("small", 8, 128, 1, 1, 256, 1024)
HOLD = "import time; block = bytearray({} * 2**20); print(len(block) >> 20)"


def test_a_checkpoint_is_written_layer_by_layer_and_cut_down(tmp_path):
    write_random_checkpoint(tmp_path / "model", SHAPE, 4)
    whole = load(str(tmp_path / "model")).model
    assert len(whole.model.layers) == 4 and len(list((tmp_path / "model").glob("layer-*"))) == 4
    weights = whole.model.layers[2].mlp.up_proj.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05) and bool((whole.model.norm.weight == 1).all())
    keep_layers(tmp_path / "model", 3)
    cut = load(str(tmp_path / "model")).model
    assert len(cut.model.layers) == 3 and torch.equal(cut.model.layers[2].mlp.up_proj.weight, weights)


def test_peaks_are_told_at_the_third_layer_and_at_the_end(tmp_path, monkeypatch):
    write_random_checkpoint(tmp_path / "model", SHAPE, 5)
    monkeypatch.setattr(bench_stream, "SAMPLES", 2)
    monkeypatch.setattr(bench_stream, "LENGTH", 16)
    before, third, end = peaks_of(str(tmp_path / "model"), str(tmp_path / "out"), [{"pass": "wanda"}])
    assert 0 < before <= third <= end
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_is_timed_is_what_a_stream_does(tmp_path, monkeypatch):
    write_random_checkpoint(tmp_path / "model", SHAPE, 1)
    packed, plain = [], bench_packing.checkpoint_tensors

    def keep(model):
        packed.append(plain(model)[0])
        return packed[-1], {}

    monkeypatch.setattr(bench_packing, "checkpoint_tensors", keep)
    assert pack_block(tmp_path / "model") > 0
    codes = packed[0]["model.layers.0.mlp.down_proj.codes"]
    layer = compress(load(str(tmp_path / "model")), RTN).model.model.layers[0].mlp.down_proj
    from qlib.layers.storage import to_tensors

    assert torch.equal(codes, to_tensors(layer.compressed())["codes"])


def test_a_program_within_its_limit():
    done = run_limited([sys.executable, "-c", HOLD.format(50)], 2**30)
    assert done.output == "50\n" and not done.killed and (done.peak is None or 50 * 2**20 < done.peak < 2**30)


def test_a_program_beyond_its_limit_is_ended():
    done = run_limited([sys.executable, "-c", HOLD.format(300)], 100 * 2**20)
    if done.peak is None:
        pytest.skip("no control group of memory can be made here")
    assert done.killed and done.output == ""
    assert not [name for name in os.listdir("/sys/fs/cgroup") if name.startswith("qlib-")]


def test_an_error_of_the_program_is_told():
    with pytest.raises(UserError, match="ended with 3"):
        run_limited([sys.executable, "-c", "raise SystemExit(3)"], 2**30)

"""Faults as the command tells them: exit code 2, one line that names file and tensor, finished blocks kept; then it goes on."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import hashes

from qlib import cli
from qlib.runs.state import hold
from qlib.stream import formats, run

LATE = "model.layers.2.mlp.up_proj.weight"
TENSOR = f"{{file}}: tensor '{LATE}'"


@pytest.fixture
def model(model_folder):
    return model_folder(shard="60KB", num_hidden_layers=3)


@pytest.fixture
def command(model, tmp_path, capsys):
    """Run the command; returns its exit code and the last line of what it said."""

    def call(output=tmp_path / "streamed", *more):
        told = ["stream", "rtn-int4", "--model", str(model), "--output", str(output), "-p", "recipe.0.group_size=32", *more]
        code = cli.main(told)
        return code, (capsys.readouterr().err.splitlines() or [""])[-1]

    return call


def shard_of(model, name=LATE):
    return model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: what a full disk is like to those who write, as a limit of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file):
    save_file(load_file(file) | {LATE: torch.zeros(127, 64, dtype=torch.bfloat16)}, file, {"format": "pt"})


def other_type(file):
    save_file(load_file(file) | {LATE: torch.zeros(128, 64, dtype=torch.int8)}, file, {"format": "pt"})


def other_header(file):
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"BF61"'))


#: What is done to a shard, what is said before anything was written, and what when it happens between two blocks.
BROKEN = {
    "truncated": (cut_off, "{file}: is truncated (", "{file}: is truncated ("),
    "missing": (lambda file: file.unlink(), "{file}: is missing although the index names it for tensor '", "{file}: is missing; tensor '"),
    "shape": (other_shape, f"{TENSOR} has shape [127, 64]", f"{TENSOR} became BF16 [127, 64]"),
    "type": (other_type, f"{TENSOR} is stored as I8", f"{TENSOR} became I8 [128, 64]"),
    "header": (other_header, "{file}: tensor ", "{file}: tensor "),
}  # fmt: skip


@pytest.mark.parametrize("change, words, later", BROKEN.values(), ids=BROKEN)
def test_a_broken_shard_at_the_start_and_between_two_blocks(model, command, tmp_path, monkeypatch, change, words, later):
    file, output = shard_of(model), tmp_path / "streamed"
    whole, compress_one = file.read_bytes(), run._compress_one
    change(file)
    code, said = command()
    assert code == 2 and said.startswith(words.format(file=file)) and not output.exists()
    file.write_bytes(whole)

    def break_behind_the_second(index, *told):
        if index == 2:
            change(file)
        return compress_one(index, *told)

    monkeypatch.setattr(run, "_compress_one", break_behind_the_second)
    code, said = command()
    assert code == 2 and said.startswith(later.format(file=file))
    kept = {name: told for name, told in hashes(output).items() if name.startswith("model-")}
    assert len(kept) == len(json.loads((output / "stream.json").read_text())["shards"]) == 3
    monkeypatch.undo()
    file.write_bytes(whole)
    assert command() == (0, "streaming: 3/3, 0 s left") and command(tmp_path / "whole")[0] == 0
    assert kept.items() <= hashes(output).items() and hashes(output) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("size, finished", [(500, 0), (30_000, 0), (45_000, 1)])  # an embedding takes 38,400
def test_a_disk_that_is_really_full(command, tmp_path, size, finished):
    output = tmp_path / "streamed"
    with largest_file(size):
        code, said = command(output, "--format", "dense")
    assert code == 2 and "cannot be written (File too large); finished blocks are kept" in said
    assert not list(output.rglob("*.tmp")) and len(list(output.glob("model-*"))) == finished
    assert command(output, "--format", "dense")[0] == 0 and command(tmp_path / "whole", "--format", "dense")[0] == 0
    assert hashes(output) == hashes(tmp_path / "whole")


def test_a_disk_that_is_full_when_one_file_is_made_of_the_parts(command, tmp_path):
    output = tmp_path / "streamed"
    with largest_file(60_000):
        code, said = command(output, "--format", "gguf")
    assert code == 2 and said == f"{output}: cannot be written (File too large); finished blocks are kept"
    assert len(list(output.rglob("*.safetensors"))) == 5 and not (output / "model.gguf").exists()
    assert command(output, "--format", "gguf")[0] == 0 and command(tmp_path / "whole", "--format", "gguf")[0] == 0
    assert hashes(output) == hashes(tmp_path / "whole")


def test_a_disk_that_fills_up_behind_the_last_block(command, tmp_path, monkeypatch):
    output, rest = tmp_path / "streamed", formats.write_rest

    def write(*told):
        with largest_file(1000):
            rest(*told)

    monkeypatch.setattr(formats, "write_rest", write)
    code, said = command()
    assert code == 2 and said.startswith(f"{output}: cannot be written (") and not (output / "config.json").exists()
    monkeypatch.undo()
    assert command()[0] == 0 and command(tmp_path / "whole")[0] == 0
    assert hashes(output) == hashes(tmp_path / "whole")


def test_where_nobody_may_write(command):
    code, said = command("/sys/streamed")
    assert code == 2 and said.startswith("/sys/streamed: cannot be written (")


def test_the_model_itself_as_output(model, command):
    before = hashes(model)
    for format in ("packed", "dense"):
        code, said = command(model, "--format", format)
        assert code == 2 and said.startswith(f"output: {model} is there already and holds no stream.json")
    assert hashes(model) == before


def test_two_at_once(command, tmp_path):
    output = tmp_path / "streamed"
    work = output / run.WORK
    work.mkdir(parents=True)
    with hold(work):
        assert command() == (2, f"{output}: is being written by another process")
    assert [file.name for file in output.rglob("*") if file.is_file()] == [".lock"]
    assert command()[0] == 0 and command(tmp_path / "whole")[0] == 0
    assert hashes(output) == hashes(tmp_path / "whole")

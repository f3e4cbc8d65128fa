"""The next block is read while the present one is compressed: by a thread for a GPU, into the page cache for the CPU."""

import threading

import pytest
import torch

from qlib.errors import UserError
from qlib.models.load import locate
from qlib.stream.ahead import ReadAhead, to_device
from qlib.stream.run import stream
from qlib.stream.source import open_model
from test_same_tensors import IDS, RECIPES, assert_same

BLOCK = "model.layers.{}."


class Meta(ReadAhead):
    """Reads as for another device, and leaves tensors where they are: there is none here."""

    def __init__(self, stored):
        super().__init__(stored, torch.device("meta"))
        self.device = torch.device("cpu")


def test_a_thread_reads_the_block_that_comes_next(model_folder, monkeypatch):
    _, stored = open_model(locate(str(model_folder(shard="60KB"))))
    plain, readers = stored.read, []

    def read(prefix):
        readers.append((prefix, threading.current_thread().name))
        return plain(prefix)

    monkeypatch.setattr(stored, "read", read)
    ahead = Meta(stored)
    first, second = ahead.read(BLOCK.format(0), BLOCK.format(1)), ahead.read(BLOCK.format(1), BLOCK.format(2))
    again = ahead.read(BLOCK.format(0), BLOCK.format(1))  # a second walk: what was begun is for nothing
    ahead.thread.shutdown()
    by_thread = [prefix for prefix, thread in readers if "read-ahead" in thread]
    assert by_thread == [BLOCK.format(number) for number in (1, 2, 1)]
    assert [prefix for prefix, thread in readers if "read-ahead" not in thread] == [BLOCK.format(0)] * 2
    for found, number in ((first, 0), (second, 1), (again, 0)):
        expected = plain(BLOCK.format(number))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_wrong_with_the_next_block_is_said_when_it_is_asked_for(model_folder):
    _, stored = open_model(locate(str(model_folder(shard="60KB"))))
    ahead = Meta(stored)
    for file in {entry.file for name, entry in stored.entries.items() if ".layers.1." in name}:
        file.write_bytes(file.read_bytes()[:-4])
    ahead.read(BLOCK.format(0), BLOCK.format(1))
    with pytest.raises(UserError, match="truncated"):
        ahead.read(BLOCK.format(1), BLOCK.format(2))


def test_the_system_is_told_which_bytes_come_next(model_folder, monkeypatch):
    _, stored = open_model(locate(str(model_folder(shard="60KB"))))
    told = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, begin, size, advice: told.append((begin, size)))
    ReadAhead(stored, torch.device("cpu")).read(BLOCK.format(0), BLOCK.format(1))
    entries = {name: entry for name, entry in stored.entries.items() if name.startswith(BLOCK.format(1))}
    contents = {entry.file: entry.file.read_bytes() for entry in entries.values()}
    assert len(told) == len(entries)
    for (begin, size), (name, entry) in zip(told, [(name, entries[name]) for name in stored.names if name in entries]):
        data = torch.frombuffer(bytearray(contents[entry.file][begin : begin + size]), dtype=torch.bfloat16)
        assert torch.equal(data.view(entry.shape), stored.mapped(name))


def test_arguments_of_a_block_move_with_their_tuples():
    moved = to_device({"a": torch.ones(2), "b": (torch.ones(1), None), "c": True}, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1] is None and moved["c"] is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mapped", (False, True))
def test_a_stream_on_cuda_writes_what_the_model_there_would_be(model_folder, tmp_path, mapped):
    model = str(model_folder(shard="60KB"))
    stream(model, RECIPES["rtn"], tmp_path / "streamed", IDS, seed=5, mapped=mapped, device="cuda")
    assert_same(tmp_path / "streamed", model, RECIPES["rtn"], tmp_path / "saved")
    stream(model, RECIPES["gptq"], tmp_path / "solved", IDS, seed=5, mapped=mapped, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model_folder, tmp_path, capsys):
    from qlib.cli import main

    code = main(["stream", "rtn-int4", "--model", str(model_folder()), "--output", str(tmp_path / "out"), "--device", "cuda"])
    assert code == 2 and "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()

"""A checkpoint is recognized by content and not by time or place; any other one, also of the same shapes, is not."""

import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from qlib.stream.fingerprint import PAGE, STRIDE, fingerprint


def test_copies_are_equal_and_other_weights_are_not(model_folder, tmp_path):
    folder = model_folder(shard="60KB")
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(next((tmp_path / "copy").glob("*.safetensors")), (1, 1))
    assert fingerprint(tmp_path / "copy") == before
    for file in sorted((tmp_path / "copy").glob("*.safetensors")):
        tensors = load_file(file)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})
        assert fingerprint(tmp_path / "copy") != before
        save_file(tensors, file, {"format": "pt"})
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert fingerprint(tmp_path / "copy") != before


def test_of_a_large_file_only_pages_are_read(tmp_path, monkeypatch):
    save_file({"a": torch.arange(5 * STRIDE // 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    read, plain = [], type(tmp_path).open

    def counted(path, *told):
        stream = plain(path, *told)

        class Counted:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                stream.close()

            def __getattr__(self, name):
                return getattr(stream, name)

            def read(self, size):
                read.append(size)
                return stream.read(size)

        return Counted()

    monkeypatch.setattr(type(tmp_path), "open", counted)
    before = fingerprint(tmp_path)
    monkeypatch.undo()
    assert sum(read) < 9 * PAGE
    save_file({"a": torch.arange(5 * STRIDE // 4, dtype=torch.int32) + 1}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before

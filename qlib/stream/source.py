"""A checkpoint on disk as a model without weights, of which one block at a time is read."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch

from qlib.errors import UserError
from qlib.models.checkpoint import TensorEntry, check_entries, read_config, read_entries, read_header, read_tensor
from qlib.models.families import CONVERTED, blocks_of, family_of
from qlib.models.load import Source, Subject, empty_model, expected_shapes, load_tokenizer
from qlib.models.packed import rebuild_buffers
from qlib.models.qwen1 import STORED, convert_tensor, describe_original, qwen2_names
from qlib.stream.shards import Shards

__all__ = ["Stored", "open_model"]

PIECE = 2**22  # numbers of the embedding or the head that are converted together


@dataclass
class Stored:
    """Where the tensors of a checkpoint lie, by the names that our model has for them.

    Attributes:
        entries: by their names in the files. names: name in the files of each tensor of the model; several tensors may
            be parts of one.
        original: whether they are those of an original Qwen, of which a tensor may hold several of ours.
        twin: name in the files of a head that must be the embedding once more, if there is one.
        shards: what brings files that are not on this disk. beside: a folder that is removed when this is closed.
    """

    entries: dict[str, TensorEntry]
    names: dict[str, str]
    original: bool
    twin: str | None = None
    shards: Shards | None = None
    beside: Any = field(default=None, repr=False)

    def expect(self, parts: list[str]) -> None:
        """Say what will be read from now on: names of tensors, or what those of a block begin with."""
        if self.shards:
            self.shards.expect([(part, self._files(part)) for part in parts])

    def close(self) -> None:
        """Fetch nothing more."""
        if self.shards:
            self.shards.close()
            self.beside.cleanup()

    def move(self, name: str, file: Path) -> None:
        """Read a tensor of the model from the file that it was written to, from now on."""
        self.entries = self.entries | {name: read_header(file)[name]}
        self.names = self.names | {name: name}

    def check_twin(self, name: str) -> None:
        """Make sure, once, that the head that is stored beside the embedding `name`, to which it is tied, is the same.

        Raises:
            UserError: it is not.
        """
        if self.twin:
            self._bring(name, self.twin)
            pairs = zip(self._mapped(self.twin).view(-1).split(PIECE), self._mapped(self.names[name]).view(-1).split(PIECE))
            if not all(torch.equal(ours.bfloat16(), theirs.bfloat16()) for ours, theirs in pairs):
                file = self.entries[self.twin].file
                raise UserError(f"{file}: tensor '{self.twin}' differs from '{name}', to which config.json ties it")
            self.twin = None

    def read(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors in bf16 whose names begin with `prefix`; one tensor of the files is read at a time.

        Raises:
            UserError: a file is missing, truncated or changed, or values are not finite; it names file and tensor.
        """
        self._bring(prefix)
        found = {}
        for name in dict.fromkeys(old for new, old in self.names.items() if new.startswith(prefix)):
            tensor = self._mapped(name)
            parts = convert_tensor(name, tensor) if self.original else {name: tensor}
            found |= {new: torch.empty_like(part, dtype=torch.bfloat16).copy_(part) for new, part in parts.items()}
        return found

    def announce(self, prefix: str) -> None:
        """Tell the system that tensors whose names begin with `prefix` are read soon; it may fetch them from the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in dict.fromkeys(old for new, old in self.names.items() if new.startswith(prefix)):
            entry = self.entries[name]
            if entry.file.is_file():
                with entry.file.open("rb") as file:
                    data, (begin, end) = 8 + int.from_bytes(file.read(8), "little"), entry.bytes
                    os.posix_fadvise(file.fileno(), data + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor of the model that is whole in the files, in their type, without taking memory."""
        self._bring(name)
        return self._mapped(self.names[name])

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape in the model."""
        return torch.bfloat16, self.entries[self.names[name]].shape

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same in bf16, piece by piece."""
        return (piece.bfloat16() for piece in self.mapped(name).view(-1).split(PIECE))

    def _files(self, part: str) -> list[Path]:
        found = (self.entries[old].file for new, old in self.names.items() if new.startswith(part))
        return [file for file in dict.fromkeys(found) if self.shards.brings(file)]

    def _bring(self, part: str, *others: str) -> None:
        """Wait for the files of tensors of the model, and of others by their names in the files."""
        if self.shards:
            files = dict.fromkeys([*self._files(part), *(self.entries[name].file for name in others)])
            if files:  # what was moved is here for good
                self.shards.need((part, list(files)))

    def _mapped(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if not entry.file.is_file():
            raise UserError(f"{entry.file}: is missing; tensor '{name}' was to be read from it")
        if (now := read_header(entry.file).get(name)) != entry:  # mapping a file that was cut off would end the process
            found = "is gone" if now is None else f"became {now.dtype} {list(now.shape)}"
            was = f"it was {entry.dtype} {list(entry.shape)}"
            raise UserError(f"{entry.file}: tensor '{name}' {found} since it was looked at; {was}")
        return read_tensor(name, entry)


def open_model(source: Source) -> tuple[Subject, Stored]:
    """A model of which only shapes are in memory, and where its tensors are; files were checked by their headers.

    Raises:
        UserError: as `qlib.load`; or the weights are packed already.
    """
    raw = read_config(source.folder)
    where = source.folder / "config.json"
    if raw.get("model_type") in CONVERTED:
        network, tokenizer, entries, details = describe_original(source.folder, raw)
        config, names = network.config, {new: old for old in entries for new in qwen2_names(old)}
    else:
        from transformers import AutoConfig

        family_of(type("Raw", (), raw), str(where))
        if method := raw.get("quantization_config", {}).get("quant_method"):
            raise UserError(
                f"{where}: quantization_config.quant_method: '{method}' cannot be streamed; allowed: plain weights"
            )
        entries, details = read_entries(source.folder), {}
        tokenizer = load_tokenizer(source.folder)
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        expected = expected_shapes(config, entries)
        check_entries(entries, expected, source.folder)
        names = {name: name for name in expected}
        _check_types({name: entries[name] for name in names})
        network = empty_model(config)
        rebuild_buffers(network, config)
        _read_generation(network, source.folder)
    stored = Stored(entries, names, raw["model_type"] in CONVERTED)
    if config.tie_word_embeddings:
        stored.twin = stored.names.pop(f"{family_of(config).head}.weight", None)
    network.eval().requires_grad_(False)
    blocks_of(network)
    return Subject(network, tokenizer, config, source, details=details), stored


def _check_types(entries: dict[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if entry.dtype not in STORED:
            raise UserError(f"{entry.file}: tensor '{name}' is stored as {entry.dtype}; allowed: {', '.join(STORED)}")


def _read_generation(network: Any, folder: Path) -> None:
    """Take over generation_config.json, as transformers does when it loads a model."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)

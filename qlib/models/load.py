"""Load a causal language model and its tokenizer: the shipped one, a folder or a hub id; safetensors only."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn

from qlib.errors import UserError
from qlib.models.checkpoint import TensorEntry, check_entries, check_tokenizer, read_config, read_entries
from qlib.models.families import CONVERTED, family_of
from qlib.models.vector_math import call_once
from qlib.paths import MODELS, shipped_model

__all__ = ["Subject", "Source", "load", "locate", "empty_model", "expected_shapes", "load_tokenizer"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "vocab*", "merges*", "*.tiktoken"]


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: what the params said. folder: where its files lie. revision: the hub's commit, None for a folder.
    """

    name: str
    folder: Path
    revision: str | None


@dataclass
class Subject:
    """A model that is compressed and measured.

    Attributes:
        model: an ordinary Hugging Face module in bf16; compressed linears are packed layers.
        measurements: what happened to it so far, under the record's fixed names.
        details: per-layer figures and the like, for the record.
    """

    model: nn.Module
    tokenizer: Any
    config: Any
    source: Source
    measurements: dict[str, dict] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def locate(model: str, revision: str | None = None) -> Source:
    """Find the files of a model: "reference", a local folder, or a hub id (downloaded to the hub's cache).

    Raises:
        UserError: neither a folder nor a hub id; the hub does not know it or cannot be reached.
    """
    if shipped := shipped_model(model):
        return Source(shipped, MODELS / shipped, None)
    if Path(model).is_dir():
        return Source(str(model), Path(model), None)
    if not HUB_ID.fullmatch(model):
        raise UserError(f"model: '{model}' is neither 'reference', nor an existing folder, nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise UserError(f"model: the hub has no '{model}' (or it is private); or did you mean a folder?") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model: '{model}' is no local folder and could not be fetched from the hub: {reason}") from None
    return Source(model, folder, folder.name)


def load(model: str = "reference", device: str = "cpu", revision: str | None = None) -> Subject:
    """Load `model` in bf16 for inference, after its files were checked against its configuration.

    A checkpoint that `qlib.save` wrote in its packed format comes back with packed layers, an original Qwen as a Qwen2.

    Raises:
        UserError: unknown model, unsupported architecture, or a file that is missing, truncated, mis-shaped or holds
            values that are not finite; it names file and tensor.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = locate(model, revision)
    raw = read_config(source.folder)
    where = str(source.folder / "config.json")
    if raw.get("model_type") in CONVERTED:
        from qlib.models.qwen1 import load_original

        network, tokenizer, details = load_original(source.folder, raw)
        network.eval().requires_grad_(False)
        return Subject(network.to(device), tokenizer, network.config, source, details=details)
    family = family_of(type("Raw", (), raw), where)
    packed = raw.get("quantization_config", {}).get("quant_method")
    if packed not in (None, "qlib"):
        raise UserError(f"{where}: quantization_config.quant_method: '{packed}' is not supported; allowed: qlib")
    entries = read_entries(source.folder)
    tokenizer = load_tokenizer(source.folder)
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    if packed:
        from qlib.models.packed import load_packed, share_codes

        network = load_packed(source.folder, config, entries)
    else:
        check_entries(entries, expected_shapes(config, entries), source.folder)
        with _without_bar():
            network = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False
            )
    check_finite(network, entries, source.folder)
    network.get_submodule(family.blocks)
    network.eval().requires_grad_(False)
    network.to(device)
    if packed:
        share_codes(network)
    return Subject(network, tokenizer, config, source)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Keep transformers' own progress bar out of notebooks; afterwards it is as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def empty_model(config: Any) -> nn.Module:
    """The module tree of a configuration on the meta device: shapes without memory. What is loaded begins as one."""
    call_once()
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)


def expected_shapes(config: Any, entries: dict[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that must be there; a tied head need not be."""
    shapes = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters(remove_duplicate=False)}
    head = f"{family_of(config).head}.weight"
    if config.tie_word_embeddings and head not in entries:
        shapes.pop(head, None)
    return shapes


def check_finite(model: nn.Module, entries: dict[str, TensorEntry], folder: Path) -> None:
    """Refuse NaN and infinity in any parameter or buffer of floats, naming file and tensor."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            file = entries[name].file if name in entries else folder
            raise UserError(f"{file}: tensor '{name}' holds values that are not finite (NaN or infinity)")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; no code of its own is run.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None

"""What a model consists of, read off its configuration: the tensors of a block and of the rest, without any weight."""

from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from qlib.errors import UserError, nearest
from qlib.models.checkpoint import read_config, read_json
from qlib.models.families import CONVERTED, FAMILIES, family_of
from qlib.models.load import HUB_ID, Source, Subject, empty_model
from qlib.models.qwen1_config import convert_config
from qlib.models.shapes import SHAPES, Shape, layer_config
from qlib.paths import MODELS, REFERENCE, shipped_model

__all__ = ["Anatomy", "read_anatomy", "anatomy_of", "empty_subject"]

#: Fields that config.json must name: for those that are missing transformers would take some default.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Anatomy:
    """A model by its tensors.

    Attributes:
        config: of transformers. model: a tree of modules on the meta device, in which one block stands for all.
        outer: name -> shape of each tensor outside of the blocks, a tied head not among them.
        block: the same of one block, by the names inside of it.
        linears: those of `block` that are compressed, without ``.weight``: `[out, in]`.
        buffers: bytes that no checkpoint holds, but memory does (rotary frequencies).
    """

    config: Any
    model: nn.Module
    outer: dict[str, tuple[int, ...]]
    block: dict[str, tuple[int, ...]]
    linears: dict[str, tuple[int, int]]
    buffers: int

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same inputs."""
        return family_of(self.config).groups

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.linears["self_attn.k_proj"][0] // self.kv_heads

    @property
    def linear_weights(self) -> int:
        """Weights in the linears of one block."""
        return sum(rows * width for rows, width in self.linears.values())


def read_anatomy(model: str | Shape) -> Anatomy:
    """Anatomy of a model by the name of a shape, of a shipped model, a folder or a hub id (of which config.json is read).

    Raises:
        UserError: no such model; a field of its configuration is missing or wrong; an architecture that is not supported.
    """
    if isinstance(model, Shape):
        return anatomy_of(layer_config(model, model.layers))
    if model in SHAPES:
        return anatomy_of(layer_config(SHAPES[model], SHAPES[model].layers))
    folder = Path(model).expanduser()
    if shipped := shipped_model(model):
        folder = MODELS / shipped
    if folder.is_dir():
        return anatomy_of(_configuration(read_config(folder), folder / "config.json"))
    known = [*SHAPES, REFERENCE]
    if not HUB_ID.fullmatch(model):
        raise UserError(
            f"model: '{model}' is unknown{nearest(model, known)}; allowed: {', '.join(known)}, a folder, a hub id (owner/name)"
        )
    file = _fetch(model)
    return anatomy_of(_configuration(read_json(file), f"{model}/config.json"))


def _fetch(model: str) -> Path:
    """config.json of a hub id, downloaded to the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model: '{model}' is no local folder, and its config.json could not be fetched: {reason}") from None


def _configuration(raw: dict[str, Any], where: Any) -> Any:
    """The configuration of transformers; an original Qwen's becomes a Qwen2's."""
    from transformers import AutoConfig

    kind = raw.get("model_type")
    if kind in CONVERTED:
        raw = convert_config(raw, str(where))
    family_of(type("Raw", (), raw), str(where))
    for name in SIZES:
        if type(raw.get(name)) is not int or raw[name] < 1:
            found = f"{raw[name]!r} is not allowed" if name in raw else "is missing"
            raise UserError(f"{where}: {name}: {found}; allowed: a whole number above 0")
    if method := (raw.get("quantization_config") or {}).get("quant_method"):
        raise UserError(f"{where}: quantization_config.quant_method: '{method}' is compressed already; allowed: plain weights")
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(raw["model_type"], **fields)
    except Exception as error:  # whatever the architecture's own checks raise
        raise UserError(f"{where}: {' '.join(str(error).split())}; allowed: what {', '.join(FAMILIES)} accept") from None


def anatomy_of(config: Any) -> Anatomy:
    """Anatomy of the model that a configuration of transformers describes."""
    single = copy(config)
    single.num_hidden_layers = 1
    if getattr(single, "layer_types", None):
        single.layer_types = list(single.layer_types)[:1]
    model, family = empty_model(single), family_of(config)
    prefix = f"{family.blocks}.0."
    tied = f"{family.head}.weight" if config.tie_word_embeddings else None
    named = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False) if name != tied}
    block = {name.removeprefix(prefix): shape for name, shape in named.items() if name.startswith(prefix)}
    linears = {name: block[f"{name}.weight"] for group in family.groups for name in group}
    model.config = config
    model.set_submodule(family.blocks, nn.ModuleList(list(model.get_submodule(family.blocks)) * config.num_hidden_layers))
    outer = {name: shape for name, shape in named.items() if not name.startswith(prefix)}
    return Anatomy(config, model, outer, block, linears, sum(one.nbytes for one in model.buffers()))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from qlib.models.load import load_tokenizer

    return load_tokenizer(MODELS / REFERENCE)


def empty_subject(anatomy: Anatomy, name: str) -> Subject:
    """A subject without weights, for the checks that passes make before they change anything."""
    return Subject(anatomy.model, _tokenizer(), anatomy.config, Source(name, Path(), None))

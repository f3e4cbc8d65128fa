"""What the adapters in `qlib.tools.adapters` have in common. An adapter is a module with

- ``ABOUT``, an `About`: what is known of its tool. Importing the module imports nothing of the tool; its functions do;
- ``quantize(folder, ids, options) -> Quantized``: folder of a Hugging Face model, calibration token ids int64
  `[samples, length]` that are the same for all tools, options of the pass `qlib.quantize.tool`;
- ``open_runtime(folder, options) -> Runtime``: the model of a folder in the tool's own kernels (see `qlib.tools.runtime`);
  options None: uncompressed, and as exact as the runtime can; else compressed as the options say but by the shortest way
  to that format, without calibration, because only its speed is asked for.

It runs in its tool's environment.
"""

from dataclasses import dataclass
from importlib import metadata
from typing import Any, Mapping

import torch
from torch import nn

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.runs.provenance import version_of
from qlib.tools.about import about
from qlib.tools.environments import environment_of
from qlib.tools.runtime import Runtime

__all__ = ["Quantized", "bits_per_weight", "facts", "load_model", "on_grid", "put_weights", "versions"]


@dataclass(frozen=True)
class Quantized:
    """What a tool made of a model.

    Attributes:
        weights: name of each quantized linear -> the fp32 values `[out, in]` that its stored format stands for; empty where
            activations are rounded, too, so that only the tool's own kernels tell what the model is: then `runtime`.
        seconds: of the quantization step alone: without imports, loading, packing and saving.
        bits_per_weight: of these linears, with scales and zeros in the tool's format.
        settings: what the tool was told, and what it has by default and decides the result.
        disk_bytes: of the one file that holds the whole model, where the tool writes one.
        seen: hash of the token ids that reached the tool (see `qlib.tools.witness`); None if it reads none.
        runtime: what was made, in the tool's own kernels; scored instead of `weights` where these are empty.
    """

    weights: dict[str, torch.Tensor]
    seconds: float
    bits_per_weight: float
    settings: dict[str, Any]
    disk_bytes: int | None = None
    seen: str | None = None
    runtime: Runtime | None = None


def load_model(folder: Any) -> nn.Module:
    """The model in the dtype of its checkpoint, as the tools' own loaders have it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()


def on_grid(
    weight: torch.Tensor, scales: torch.Tensor, index: torch.Tensor | None = None, stored: torch.Tensor | None = None
) -> torch.Tensor:
    """The exact fp32 values of a weight that a tool has put on its grid and then kept in a coarser dtype.

    Zeros do not matter: each value is a whole multiple of its scale.

    Args:
        weight: `[out, in]`. scales: `[out, groups]`, with which the codes were computed.
        index: group of each column `[in]`; None: equal groups in order.
        stored: the scales as they are written to disk, if they are rounded for that.
    """
    if index is None:
        index = torch.arange(weight.shape[1]) // (weight.shape[1] // scales.shape[1])
    codes = (weight.float() / scales.float()[:, index]).round()
    return codes * (scales if stored is None else stored).float()[:, index]


def bits_per_weight(
    weights: Mapping[str, torch.Tensor], options: Options, zeros: bool = True, index: bool = False
) -> float:
    """Codes, 16-bit scales, zeros as wide as codes, and with `index` the 32-bit group of each column, per weight."""
    total = sum(weight.numel() for weight in weights.values())
    stored = 0
    for rows, columns in (weight.shape for weight in weights.values()):
        groups = columns // (options.group_size or columns)
        stored += options.bits * rows * columns + (16 + options.bits * zeros) * rows * groups + 32 * columns * index
    return stored / total


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace the weights of linears, in place; the scorer computes in fp32, so they stay what they are.

    Raises:
        UserError: a linear is not in the model, or has another shape.
    """
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        if name not in modules or modules[name].weight.shape != weight.shape:
            raise UserError(f"weights: '{name}' {list(weight.shape)} has no place in this model")
        device = modules[name].weight.device
        modules[name].weight = nn.Parameter(weight.float().to(device), requires_grad=False)


def versions(name: str) -> dict[str, str]:
    """Versions of the tool and of what computes for it, by distribution."""
    others = (*about(name).beside, "torch", "transformers", "tokenizers", "numpy")
    found = {one: version_of(one) for one in (distribution_of(name), *others)}
    return {one: version for one, version in found.items() if version}


def distribution_of(name: str) -> str:
    """The distribution that a tool's package came with."""
    package = about(name).package
    return next(iter(metadata.packages_distributions().get(package, [name])))


def facts(name: str) -> dict[str, str]:
    """Distribution, licence and Python versions of a tool, as its own package states them, and when it was released.

    The day stands in the lock's comments as ``# released: 2026-01-31``, and so does a licence (``# licence: MIT``) that the
    package does not state; what is not stated is empty.
    """
    told = metadata.metadata(distribution_of(name))
    trove = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or [] if line.startswith("License ::")]
    words = next((one for one in (told.get("License-Expression"), *trove, told.get("License")) if one), "")
    lines = environment_of(name).lock.read_text(encoding="utf-8").splitlines()
    noted = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith(("# released: ", "# licence: ")))
    words = words or noted.get("licence", "")
    return {
        "distribution": distribution_of(name),
        "licence": words.strip().splitlines()[0][:60] if words else "",
        "python": told.get("Requires-Python") or "",
        "released": noted.get("released", "").strip(),
    }

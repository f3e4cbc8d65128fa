"""llm-compressor: its GPTQ, for the format compressed-tensors that vLLM loads."""

import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

from qlib.quantize.tool import Options
from qlib.tools.about import About
from qlib.tools.adapter import Quantized, bits_per_weight, load_model, on_grid
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="llmcompressor",
    idea="The toolkit beside vLLM: recipes of modifiers (here its GPTQ) write the format compressed-tensors, which vLLM runs with "
    "fast kernels on GPUs.",
    method="GPTQ",
    runtime="transformers, which decompresses its weights to bf16 on a CPU",
    loads=("vLLM", "transformers"),
    documentation="https://docs.vllm.ai/projects/llm-compressor/en/latest/guides/compression_schemes/",
    takes=frozenset({"damp", "act_order"}),
)


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. The time is that of its one-shot call, which packs nothing."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme = _scheme(options)
    asked = {} if options.damp is None else {"dampening_frac": options.damp}
    if options.act_order is not None:
        asked["actorder"] = "static" if options.act_order else None
    modifier = GPTQModifier(
        config_groups={"linears": scheme},
        ignore=["lm_head"],
        **asked,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    folder = Path(folder).resolve()
    model = load_model(folder)
    with tempfile.TemporaryDirectory() as elsewhere, chdir(elsewhere):  # it writes logs where it stands
        witness = Witness(model)
        begun = time.perf_counter()
        oneshot(
            model=model,
            processor=str(folder),
            dataset=rows,
            recipe=[modifier],
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
        )
        seconds = time.perf_counter() - begun
    weights = {
        name: on_grid(layer.weight.detach(), layer.weight_scale.detach(), getattr(layer, "weight_g_idx", None))
        for name, layer in model.named_modules()
        if getattr(layer, "weight_scale", None) is not None
    }
    used = {"dampening_frac": modifier.dampening_frac, "block_size": modifier.block_size}
    numbers = scheme.weights
    used |= {"actorder": getattr(numbers.actorder, "value", numbers.actorder), "observer": str(numbers.observer)}
    size = bits_per_weight(weights, options, zeros=not options.symmetric)
    return Quantized(weights, seconds, size, used, seen=witness.close())


def _scheme(options: Options) -> Any:
    """What it calls a scheme: every linear, weights alone."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    numbers = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        symmetric=options.symmetric,
        strategy="group" if options.group_size else "channel",
        group_size=options.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=numbers)


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Rounded to nearest and packed; its own hook unpacks all of it before the first pass."""
    from compressed_tensors.compressors import ModelCompressor
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    modifier = QuantizationModifier(config_groups={"linears": _scheme(options)}, ignore=["lm_head"])
    with tempfile.TemporaryDirectory() as elsewhere, chdir(elsewhere):
        model = oneshot(model=model, recipe=[modifier], pipeline="datafree")
        ModelCompressor.from_pretrained_model(model).compress_model(model)
    return ModuleRuntime(model)

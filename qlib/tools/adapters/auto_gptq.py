"""auto-gptq, the tool the article names: its last release, whole, on a machine without a GPU."""

import time
from pathlib import Path
from typing import Any, Callable

import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import About
from qlib.tools.adapter import Quantized, bits_per_weight, load_model, on_grid
from qlib.tools.packed import block_linears, fill
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="auto_gptq",
    idea="GPTQ as its authors wrote it, made a library: column after column of a linear is rounded, and what was lost is made "
    "up for by the columns that are still to come, with the inverse Hessian of the layer's inputs. Archived since 2024; what "
    "it taught lives on in gptqmodel.",
    method="GPTQ",
    runtime="its QuantLinear in torch, which dequantizes the whole weight for every call",
    loads=("transformers", "vLLM", "gptqmodel", "auto-round"),
    by_hand="pin transformers 4.46, peft 0.10 and Python 3.11; without CUDA build the model object oneself, set its CUDA device "
    "to the CPU and silence torch.cuda.synchronize",
    documentation="https://github.com/AutoGPTQ/AutoGPTQ#quick-tour",
    takes=frozenset({"damp", "act_order"}),
)


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Static groups go with activation order, so that groups stay in order."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling._const import SUPPORTED_MODELS
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    order = bool(options.act_order)
    config = BaseQuantizeConfig(
        bits=options.bits,
        group_size=options.group_size or -1,
        sym=options.symmetric,
        desc_act=order,
        static_groups=order,
        **({} if options.damp is None else {"damp_percent": options.damp}),
    )
    network = load_model(folder)
    if network.config.model_type not in SUPPORTED_MODELS:
        raise UserError(f"model: {network.config.model_type} is not supported by auto-gptq")
    if network.config.pad_token_id is None:
        network.config.pad_token_id = network.config.eos_token_id or 0
    for layer in network.model.layers:
        layer.forward = _in_tuple(layer.forward)
    torch.nn.Module.attention_type = "full_attention"  # later transformers ask it of what stands in for the first block
    model = GPTQ_CAUSAL_LM_MODEL_MAP[network.config.model_type](network, False, config)
    kept = _without_cuda()
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    witness = Witness(network)
    begun = time.perf_counter()
    model.quantize(rows, batch_size=1, cache_examples_on_gpu=False)
    seconds = time.perf_counter() - begun
    modules = dict(network.named_modules())
    weights = {
        name: on_grid(modules[name].weight, scale.float(), index.long(), stored=scale.half())
        for name, (_, scale, _, index) in kept.items()
    }
    size = bits_per_weight(weights, options)
    used = {name: getattr(config, name) for name in ("damp_percent", "desc_act", "static_groups", "true_sequential")}
    return Quantized(weights, seconds, size, used | {"batch_size": 1}, seen=witness.close())


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Linears are those it makes for a checkpoint, in the model's own dtype."""
    from auto_gptq.modeling._utils import autogptq_post_init, make_quant

    network, order = load_model(folder), bool(options and options.act_order)
    if options is None:
        return ModuleRuntime(network.float())
    names = list(block_linears(network))
    make_quant(network, names, options.bits, options.group_size or -1, desc_act=order)
    for name in names:
        fill(network.get_submodule(name), options.bits)
    return ModuleRuntime(autogptq_post_init(network, use_act_order=order))


def _in_tuple(forward: Callable[..., Any]) -> Callable[..., Any]:
    """auto-gptq takes the first of what a block returns; blocks of later transformers return one tensor."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        found = forward(*arguments, **named)
        return (found,) if isinstance(found, torch.Tensor) else found

    return wrapped


def _without_cuda() -> dict[str, tuple]:
    """Let it compute on the CPU, and catch what it would pack: name -> quantizer, scales, zeros, groups of columns."""
    import auto_gptq.modeling._base as base

    base.CUDA_0 = torch.device("cpu")
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    kept: dict[str, tuple] = {}
    base.pack_model = lambda model=None, quantizers=None, **_: kept.update(quantizers)
    return kept

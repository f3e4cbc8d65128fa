"""gptqmodel, what auto-gptq became."""

import os
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

from qlib.quantize.tool import Options
from qlib.tools.about import About
from qlib.tools.adapter import Quantized, bits_per_weight, load_model
from qlib.tools.packed import block_linears, fill, replace
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="gptqmodel",
    idea="The successor of auto-gptq: the same solver with orders of columns that keep groups together, several kernels to "
    "run its checkpoints, and newer methods beside it.",
    method="GPTQ",
    runtime="its torch kernels for packed weights",
    loads=("transformers", "vLLM", "auto-round"),
    by_hand="set GPTQMODEL_CPU_WORKERS=2 on machines with fewer than two free cores",
    documentation="https://github.com/ModelCloud/GPTQModel#quantization-and-inference",
    takes=frozenset({"damp", "act_order"}),
)


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. It packs while it goes on; the time it says it packed for is left out."""
    _allow_import()
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    asked = {"damp_percent": options.damp, "desc_act": options.act_order}
    asked |= {} if options.group_size else {"act_group_aware": False}  # its default needs groups
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size or -1,
        sym=options.symmetric,
        format="gptq_v2",  # the same numbers; its first version stores zeros less one
        offload_to_disk=False,
        **{name: value for name, value in asked.items() if value is not None},
    )
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    folder = Path(folder).resolve()
    with tempfile.TemporaryDirectory() as elsewhere, chdir(elsewhere):  # it writes logs where it stands
        model = GPTQModel.load(str(folder), config, device="cpu")
        witness = Witness(model.model)
        begun = time.perf_counter()
        model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
        seconds = time.perf_counter() - begun
    weights, packing = {}, _packing_seconds(model)
    for name, layer in model.model.named_modules():
        if hasattr(layer, "qweight"):
            layer.scales = layer.scales.float()  # so that nothing is rounded once more
            weights[name] = layer.dequantize_weight().T.contiguous()
    used = {name: getattr(config, name, None) for name in ("desc_act", "act_group_aware", "damp_percent", "mse")}
    used |= {"true_sequential": config.true_sequential, "batch_size": 1, "packing_seconds": packing}
    size = bits_per_weight(weights, options, index=bool(config.desc_act))
    return Quantized(weights, seconds - packing, size, used, seen=witness.close())


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Its selector chooses the kernel, as it does for a checkpoint on a CPU, in bf16."""
    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    _allow_import()
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    model = model.bfloat16()
    told = {"bits": options.bits, "group_size": options.group_size or -1, "sym": options.symmetric}
    told["desc_act"] = bool(options.act_order)
    place = {"format": "gptq_v2", "quant_method": "gptq", "device_map": {"": "cpu"}}
    kernel = hf_select_quant_linear_v2(**told, **place, pack=False)
    for name, linear in block_linears(model).items():
        shape = {"in_features": linear.in_features, "out_features": linear.out_features}
        layer = kernel(**told, **shape, bias=linear.bias is not None)
        fill(layer, options.bits)
        layer.scales = layer.scales.bfloat16()  # what its loader makes of them on a CPU
        if layer.bias is not None:
            layer.bias = layer.bias.bfloat16()
        layer.eval().post_init()
        replace(model, name, layer)
    runtime = ModuleRuntime(model)
    for _ in range(2):  # its torch kernel is compiled at the first pass, and once more when zeros are cached
        runtime.prefill(torch.arange(2))
    return runtime


def _allow_import() -> None:
    """It asks for two workers even where there is one core, and refuses to be imported if it does not get them."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, len(os.sched_getaffinity(0)))))


def _packing_seconds(model: Any) -> float:
    """What its own timer says that packing took; 0 where it keeps none."""
    timer = getattr(model, "quant_region_timer", None)
    regions = timer.snapshot() if timer is not None else {}
    return float(regions.get("submodule_finalize_pack", {}).get("total", 0.0))

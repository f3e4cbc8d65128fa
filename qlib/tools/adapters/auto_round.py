"""auto-round: rounding and clipping of each block optimised by signed gradients (SignRound)."""

import tempfile
import time
from contextlib import chdir
from pathlib import Path

import torch

from qlib.quantize.tool import Options
from qlib.tools.about import About
from qlib.tools.adapter import Quantized, bits_per_weight, load_model, on_grid
from qlib.tools.packed import block_linears, fill
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="auto_round",
    idea="SignRound: whether each weight is rounded up or down, and where its range is clipped, is learnt block by block with "
    "200 steps of signed gradients, so that the block's outputs stay what they were. Slower than GPTQ by far, and the "
    "best of the tools at few bits.",
    method="SignRound",
    runtime="transformers with the kernels it chooses: those of auto-round-lib in C++ for codes of 2, 4 and 8 bits, torch for 3",
    loads=("transformers", "vLLM", "gptqmodel"),
    documentation="https://github.com/intel/auto-round/blob/main/docs/step_by_step.md",
    takes=frozenset({"iterations"}),
    beside=("auto-round-lib",),
)

ITERATIONS, BATCH = 200, 8  # its own defaults


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Its own random numbers start from its own seed."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    folder = Path(folder).resolve()
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    iterations = options.iterations or ITERATIONS
    with tempfile.TemporaryDirectory() as elsewhere, chdir(elsewhere):  # it writes caches where it stands
        rounding = AutoRound(
            model,
            tokenizer,
            bits=options.bits,
            group_size=options.group_size or -1,
            sym=options.symmetric,
            iters=iterations,
            batch_size=BATCH,
            nsamples=len(ids),
            seqlen=ids.shape[1],
            dataset=[row[None] for row in ids],
            device_map="cpu",
            enable_torch_compile=False,  # compiling takes a minute here, and another for every shape
        )
        witness = Witness(model)
        begun = time.perf_counter()
        model, _ = rounding.quantize()
        seconds = time.perf_counter() - begun
    weights = {
        name: on_grid(layer.weight.detach(), layer.scale.reshape(len(layer.weight), -1))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and getattr(layer, "scale", None) is not None
    }
    used = {name: getattr(rounding, name, None) for name in ("amp", "lr", "seed")}
    used |= {"iterations": iterations, "batch_size": BATCH, "enable_torch_compile": False}
    return Quantized(weights, seconds, bits_per_weight(weights, options), used, seen=witness.close())


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. It chooses among its kernels as for a checkpoint that transformers loads for it."""
    from auto_round.inference.convert_model import convert_hf_model, post_init
    from transformers import AutoRoundConfig

    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    names, group = list(block_linears(model)), options.group_size or -1
    model.config.quantization_config = AutoRoundConfig(
        bits=options.bits,
        group_size=group,
        sym=options.symmetric,
        packing_format="auto_round:auto_gptq" if options.symmetric else "auto_round",  # as it saves them
    )
    model, used = convert_hf_model(model, "cpu")
    for name in names:
        fill(model.get_submodule(name), options.bits)
    post_init(model, used)
    return ModuleRuntime(model)

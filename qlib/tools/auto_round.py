"""auto-round: rounding and clipping of each block optimised by signed gradients (SignRound)."""

import tempfile
import time
from contextlib import chdir
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from qlib.quantize.tool import Options
from qlib.tools.adapter import Quantized, bits_per_weight, load_model, on_grid, refuse

__all__ = ["quantize"]

ITERATIONS, BATCH = 200, 8  # its own defaults


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Its own random numbers start from its own seed."""
    refuse(options, "damp", "act_order")
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
    return Quantized(weights, seconds, bits_per_weight(weights, options), used)

"""llama.cpp: every linear in one of its types, errors weighed by its importance matrix of the same calibration text."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from qlib.export.gguf import export, importance
from qlib.export.gguf_file import TENSORS
from qlib.models.families import family_of
from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools.about import About, Kind
from qlib.tools.adapter import Quantized
from qlib.tools.witness import hash_rows

__all__ = ["ABOUT", "quantize"]

WEIGHTED = "RTN, errors weighed by an importance matrix"
ABOUT = About(
    package="llama_cpp",
    idea="A C program without dependencies. Weights lie in small blocks with their scales, in types made for its kernels; "
    "rounding weighs errors by how strong each input is on a calibration text (the importance matrix). It also "
    "rounds activations to 8 bits when it runs.",
    runtime="its own C kernels",
    loads=("Ollama", "LM Studio", "transformers (turned back into 16 bits)"),
    by_hand="a C++ compiler and cmake; with gcc 12 on processors with AMX: -fno-tree-dse",
    documentation="https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
    kinds={
        "Q8_0": Kind(8, 32, True, "RTN"),
        "Q4_0": Kind(4, 32, True, WEIGHTED),
        "IQ4_NL": Kind(4, 32, True, WEIGHTED),
        "Q2_0": Kind(2, 64, True, WEIGHTED),
    },
)

OUTER = "F16"  # embedding and head stay as they are, as with all other tools


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. The values are read back from the file by llama.cpp itself."""
    from gguf import GGUFReader

    from qlib.tools.llama_quantize import dequantize
    from qlib.tools.llama_quantize import quantize as into_type

    subject, threads = load(str(folder)), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        names = ("exact.gguf", "matrix.npz", "packed.gguf", "plain.gguf")
        exact, matrix, packed, plain = (Path(place) / name for name in names)
        architecture = export(subject, exact, dense="f32")["architecture"]
        begun = time.perf_counter()
        np.savez(matrix, **importance(subject.model, list(ids.split(16))))
        told = into_type(exact, packed, options.kind, matrix, OUTER, threads=threads)
        seconds = time.perf_counter() - begun
        dequantize(packed, plain, threads)
        stored = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(plain).tensors}
    config, family, weights = subject.config, family_of(subject.config), {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index in range(config.num_hidden_layers):
        for path in (path for group in family.groups for path in group):
            weight = stored[f"blk.{index}.{TENSORS[path]}.weight"]
            if architecture == "llama" and TENSORS[path] in heads:  # where channels rotated together are neighbours
                weight = weight.unflatten(0, (heads[TENSORS[path]], -1, 2)).transpose(1, 2).flatten(0, 2)
            weights[f"{family.blocks}.{index}.{path}"] = weight
    used = {"kind": options.kind, "imatrix": f"{ids.numel()} tokens", "embedding and head": OUTER}
    used |= {"types": told["types"], "warnings": told["warnings"]}
    return Quantized(weights, seconds, told["bits_per_weight"], used, told["bytes"], hash_rows(ids))

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
from qlib.tools.runtime import Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

WEIGHTED = "RTN, errors weighed by an importance matrix"
CODEBOOK = "nearest in a fixed codebook, errors weighed by an importance matrix"
ABOUT = About(
    package="llama_cpp",
    idea="A C program without dependencies. Weights lie in small blocks with their scales, in types made for its "
    "kernels; rounding weighs errors by how strong each input is on a calibration text (the importance matrix). In the "
    "plain types (Q8_0, Q4_0, Q2_0, and IQ4_NL with its unequal steps) every block of 32 or 64 has a 16-bit scale. "
    "K-quants have superblocks of 256: scales of 4 to 6 bits for blocks of 16 or 32, and a 16-bit one for them all. IQ2 "
    "and IQ3 take 8 or 4 weights at once from a fixed codebook. Q4_K_M, Q3_K_M, Q2_K and IQ2_S are mixtures: linears "
    "that suffer most, such as v and down, get a wider type. When it runs, it rounds activations to 8 bits, too.",
    runtime="its own C kernels",
    loads=("Ollama", "LM Studio", "transformers (turned back into 16 bits)"),
    by_hand="a C++ compiler and cmake; with gcc 12 on processors with AMX: -fno-tree-dse; K-quants and IQ types fall "
    "back to others where rows are no multiple of 256, so short rows are taken together before they are quantized",
    documentation="https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
    kinds={
        "Q8_0": Kind(8, 32, True, "RTN"),
        "Q4_0": Kind(4, 32, True, WEIGHTED, reads_text=True),
        "IQ4_NL": Kind(4, 32, True, WEIGHTED, reads_text=True),
        "Q2_0": Kind(2, 64, True, WEIGHTED, reads_text=True),
        "Q4_K_M": Kind(4, 32, False, WEIGHTED, reads_text=True),
        "Q3_K_M": Kind(3, 16, True, WEIGHTED, reads_text=True),
        "Q2_K": Kind(2, 16, False, WEIGHTED, reads_text=True),
        "IQ3_S": Kind(3, 32, True, CODEBOOK, reads_text=True),
        "IQ2_S": Kind(2, 16, True, CODEBOOK, reads_text=True),
    },
)

SHORT = ("Q8_0", "Q4_0", "IQ4_NL", "Q2_0")  # kinds without superblocks
OUTER = "F16"  # embedding and head stay as they are, as with all other tools


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. The values are read back from the file by llama.cpp itself."""
    from gguf import GGUFReader

    from qlib.tools.llama_fold import fold
    from qlib.tools.llama_quantize import dequantize
    from qlib.tools.llama_quantize import quantize as into_type

    subject, threads, taken = load(str(folder)), torch.get_num_threads(), {}
    with tempfile.TemporaryDirectory() as place:
        names = ("exact.gguf", "matrix.npz", "packed.gguf", "plain.gguf")
        exact, matrix, packed, plain = (Path(place) / name for name in names)
        architecture = export(subject, exact, dense="f32")["architecture"]
        witness, begun = Witness(subject.model), time.perf_counter()
        weighed = importance(subject.model, list(ids.split(16)))
        seconds = time.perf_counter() - begun
        if options.kind not in SHORT:
            weighed, taken = fold(exact, weighed)
        np.savez(matrix, **weighed)
        begun = time.perf_counter()
        told = into_type(exact, packed, options.kind, matrix, OUTER, threads=threads)
        seconds += time.perf_counter() - begun
        dequantize(packed, plain, threads)
        stored = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(plain).tensors}
    config, family, weights = subject.config, family_of(subject.config), {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index in range(config.num_hidden_layers):
        for path in (path for group in family.groups for path in group):
            name = f"{family.blocks}.{index}.{path}"
            weight = stored[f"blk.{index}.{TENSORS[path]}.weight"]
            weight = weight.reshape(subject.model.get_submodule(name).weight.shape)  # [out, in], folded or not
            if architecture == "llama" and TENSORS[path] in heads:  # where channels rotated together are neighbours
                weight = weight.unflatten(0, (heads[TENSORS[path]], -1, 2)).transpose(1, 2).flatten(0, 2)
            weights[name] = weight
    used = {"kind": options.kind, "imatrix": f"{ids.numel()} tokens", "embedding and head": OUTER}
    used |= {"types": told["types"], "warnings": told["warnings"]}
    used |= {f"rows of {columns}": f"{count} taken together for a superblock" for columns, count in taken.items()}
    return Quantized(weights, seconds, told["bits_per_weight"], used, told["bytes"], witness.close())


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Compressed: random weights in the types llama.cpp chooses for the kind, whole rows."""
    from qlib.tools.llama_runtime import open_exact, open_random

    return open_random(folder, options.kind, OUTER) if options else open_exact(folder)

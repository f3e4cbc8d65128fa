"""Runs in the environment of another program: loads checkpoints with it, and writes down what they compute there.

``python reader.py JOBS``: a JSON list of ``{how, folder, target}``; logits on the ids beside the folder and the weights
of all linears in blocks go to ``target``, or one line that says why not.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

__all__ = ["LOADERS"]


def transformers(folder, **more):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    if "config_groups" in str(getattr(model.config, "quantization_config", "")):
        model.hf_quantizer.compressor.decompress_model(model=model)  # fp4 becomes bf16, whatever the model is
    return torch.nn.Module.float(model)


def auto_round(folder):
    from transformers import AutoRoundConfig

    # its compiled kernels, which it may choose by itself, keep weights in an order of their own
    return transformers(folder, device_map="cpu", quantization_config=AutoRoundConfig(backend="torch"))


def gptqmodel(folder):
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def auto_gptq(folder):
    from auto_gptq import AutoGPTQForCausalLM

    loaded = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", torch_dtype=torch.float32, use_safetensors=True)
    return loaded.model


LOADERS = {one.__name__: one for one in (transformers, auto_round, gptqmodel, auto_gptq)}


def read(how, folder):
    model = LOADERS[how](folder).eval()
    with torch.inference_mode():
        logits = model(torch.load(Path(folder).parent / "ids.pt")).logits
    linears = {name: one for name, one in model.named_modules() if name.endswith("_proj")}
    weights = {name: weight_of(one) for name, one in linears.items()}
    return {"logits": logits, "weights": weights, "kinds": sorted({type(one).__name__ for one in linears.values()})}


def weight_of(layer):
    if hasattr(layer, "dequantize_weight"):
        layer.scales = layer.scales.float()  # so that nothing is rounded once more
        return layer.dequantize_weight().T.contiguous()
    if hasattr(layer, "qweight"):
        layer.bias = None
        return layer(torch.eye(layer.infeatures)).T.contiguous()
    return layer.weight.detach()


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        try:
            found = read(job["how"], job["folder"])
        except Exception as error:  # whatever it is, the test tells it
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, job["target"])

"""torchao's tensors taken apart: what they store, what it stands for, and the same codes in a model in fp32."""

import torch
from torch import nn

__all__ = ["computing_in_fp32", "is_packed", "stored_bits", "values"]

ROWS = 256  # of the unit matrix that asks a kernel for its weights


def is_packed(layer: nn.Module) -> bool:
    """Whether it is a linear whose weight torchao has replaced."""
    from torchao.utils import TorchAOBaseTensor

    return isinstance(layer, nn.Linear) and isinstance(layer.weight, TorchAOBaseTensor)


def stored_bits(weight: torch.Tensor) -> int:
    """Of all plain tensors that the tensor consists of: codes, scales and zeros as they are kept and saved."""
    return sum(8 * getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def values(weight: torch.Tensor) -> torch.Tensor:
    """What the stored codes stand for in fp32, by torchao itself; products in bf16 round them once more."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization import Int8Tensor

    if isinstance(weight, Int8Tensor):
        return weight.dequantize(torch.float32)
    if not isinstance(weight, Int4OpaqueTensor):
        return weight.to(torch.float32).dequantize()
    # Only its kernel reads these codes: fp32 activations that are 1 in one place give the weights themselves.
    exact = Int4OpaqueTensor(weight.qdata, weight.scale_and_zero.float(), weight.block_size, weight.shape)
    units = torch.eye(weight.shape[1]).split(ROWS)
    return torch.cat([nn.functional.linear(rows, exact) for rows in units]).T.contiguous()


def computing_in_fp32(model: nn.Module) -> nn.Module:
    """The same codes and scales of int8, in place, computing in fp32: nothing but activations is rounded on the way."""
    from torchao.quantization import Int8Tensor

    for layer in filter(is_packed, model.modules()):
        told = layer.weight
        exact = Int8Tensor(
            told.qdata,
            told.scale,
            told.block_size,
            torch.float32,
            zero_point=told.zero_point,
            act_quant_kwargs=told.act_quant_kwargs,
            reduce_range=told.reduce_range,
        )
        layer.weight = nn.Parameter(exact, requires_grad=False)
    for layer in model.modules():
        for name, one in layer.named_parameters(recurse=False):
            if not is_packed(layer) or name != "weight":
                one.data = one.data.float()
    return model

"""What all packed layers share: they stand in for `nn.Linear`, hold codes instead of weights, and say what they run."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers import native_blocks
from qlib.quantize.formats import ELEMENTS
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["PackedLinear", "channels_at_once", "hold_bits", "round_tokens", "SCRATCH_BYTES"]

#: What a layer may use for weights it has dequantized at one time, on a CPU and elsewhere; they are never kept.
ADAPTER = ("adapter_down", "adapter_up")  # what a low-rank product beside the codes is called
SCRATCH_BYTES, GPU_SCRATCH_BYTES = 8 * 2**20, 512 * 2**20


class PackedLinear(nn.Module):
    """A linear layer that holds packed codes.

    bf16 activations run the kernel that `kernel` names for their number of rows. All others (fp32 for quality, and
    whatever needs gradients) run the exact path: the dequantized weight in the activations' type, multiplied. Where the
    grid rounds activations, both do.

    Attributes:
        grid: the number format.
        in_features, out_features: as in `nn.Linear`.
        bias: `[out]` or None, the very parameter of the linear it replaces.
        adapter_down, adapter_up: bf16 `[rank, in]` and `[out, rank]`, a low-rank product that is added to the weight and
            kept apart from the codes (LoRA); None.
    """

    #: Up to this many rows `multiply` is faster than `expand_multiply`; 0: there is no packed kernel.
    packed_rows = 0

    def __init__(self, grid: Grid, shape: tuple[int, int], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)
        self.register_buffer("adapter_down", None)
        self.register_buffer("adapter_up", None)

    def adapt(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Add the product of `up [out, rank]` and `down [rank, in]` to the weight from now on."""
        self.adapter_down, self.adapter_up = (one.detach().bfloat16().contiguous() for one in (down, up))

    def effective_weight(self) -> torch.Tensor:
        """The fp32 weight `[out, in]` that the layer computes with: that of its codes, and the adapter's."""
        weight = self.compressed().dequantize()
        return weight if self.adapter_up is None else weight.addmm_(self.adapter_up.float(), self.adapter_down.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in]` -> `[..., out]` in the type of `x`."""
        if x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and x.requires_grad):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            if self.grid.activations:
                codes, scales = round_tokens(x.detach(), self.grid.activations)
                x = x + (codes * scales - x).detach().to(x.dtype)  # gradients pass as if nothing had been rounded
            return F.linear(x, self.effective_weight().to(x.dtype), bias)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = self.multiply(rows) if self.runs_packed(rows.shape[0]) else self.expand_multiply(rows)
        if self.adapter_up is not None:
            out = out + F.linear(F.linear(rows, self.adapter_down), self.adapter_up)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    def runs_packed(self, rows: int) -> bool:
        """Whether `rows` rows of activations are multiplied with the codes as they are."""
        return rows <= self.packed_rows

    def compressed(self) -> CompressedWeight:
        """The weight this layer was made of, bit by bit, without its adapter."""
        raise NotImplementedError

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x [rows, in]` times the codes as they are -> `[rows, out]`."""
        raise NotImplementedError

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantize a few output channels at a time, multiply `x [rows, in]` with them -> `[rows, out]`."""
        raise NotImplementedError

    def row_kernel(self) -> native_blocks.RowKernel | None:
        """What multiplies one row inside `native_blocks.Blocks`, without the bias; None: only this layer itself can."""
        return None

    def kernel(self, rows: int) -> str:
        """Name of the kernel that `rows` rows of bf16 activations run."""
        raise NotImplementedError

    def resident_bytes(self) -> int:
        """Bytes this layer keeps in memory, bias included."""
        tensors = [*self.buffers(recurse=False), *self.parameters(recurse=False)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.grid.name}"


def round_tokens(x: torch.Tensor, element: str = "int8") -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token of `x [..., in]`, ties to even.

    Args:
        element: "int8": to whole numbers of its largest magnitude / 127; "fp8": to e4m3 numbers of its largest / 448.

    Returns:
        fp32 codes `[..., in]`, whole numbers from -127 to 127 or e4m3 numbers, and fp32 scales `[..., 1]`.
    """
    scales = x.abs().amax(-1, keepdim=True).float() / (127 if element == "int8" else ELEMENTS["fp8"].largest)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = x.float() / scales
    return codes.round() if element == "int8" else codes.to(torch.float8_e4m3fn).float(), scales


def channels_at_once(in_features: int, device: torch.device = torch.device("cpu")) -> int:
    """Output channels whose bf16 weights fit into the scratch memory, a multiple of 64 for the sake of the matmul."""
    room = SCRATCH_BYTES if device.type == "cpu" else GPU_SCRATCH_BYTES
    return max(1, room // (2 * 64 * in_features)) * 64


def hold_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A float tensor as integers of the same bits, for buffers that ``module.float()`` must not convert.

    A part of a larger tensor is copied: linears that were solved together are parts of one, which would stay in memory
    whole, and safetensors saves no tensors that share memory.
    """
    part = tensor.untyped_storage().nbytes() > tensor.nbytes
    tensor = tensor.clone(memory_format=torch.contiguous_format) if part else tensor.contiguous()
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])

"""fp8 weights and activations, multiplied as they are by torch's scaled product where the device has one."""

import torch

from qlib.layers import gpu
from qlib.layers.base import round_tokens
from qlib.layers.codes import CodesLinear
from qlib.quantize.grid import Grid

__all__ = ["Fp8DynamicLinear"]

STEP = 16  # torch's product wants multiples of it
CAPABILITY = (8, 9)  # of the first NVIDIA cards that multiply fp8 numbers


class Fp8DynamicLinear(CodesLinear):
    """e4m3 weights with a scale per output channel or one in all; activations rounded to e4m3 token by token.

    On a GPU: out = sum of products (fp8 tensor cores) * scale of the token * scale of the channel, summed the fast way: a
    few bits of the running sum are lost, far fewer than fp8 loses, and a quarter of the time is saved. Elsewhere
    both are turned back into bf16: torch has an fp8 product for CPUs, but it is slower than that.
    """

    @staticmethod
    def fits(grid: Grid) -> bool:
        """Whether weights and activations of this grid are e4m3 numbers."""
        return grid.element == "fp8" and grid.activations == "fp8"

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = gpu.round_tokens(x, "fp8") if x.is_cuda else round_tokens(x, "fp8")
        weight = self.codes.view(torch.float8_e4m3fn).t()
        channels = self.scales.view(torch.bfloat16).float().view(1, -1).expand(1, self.out_features).contiguous()
        codes = codes.to(weight.dtype)
        return torch._scaled_mm(
            codes, weight, scales, channels, self.bias, out_dtype=x.dtype, use_fast_accum=x.is_cuda
        )

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = round_tokens(x, "fp8")
        return super().expand_multiply((codes * scales).bfloat16())

    def runs_packed(self, rows: int) -> bool:
        whole = self.in_features % STEP == 0 and self.out_features % STEP == 0
        return whole and self.codes.is_cuda and torch.cuda.get_device_capability(self.codes.device) >= CAPABILITY

    def kernel(self, rows: int) -> str:
        if self.runs_packed(rows):
            return "fp8 x fp8 (torch _scaled_mm)"
        return "activations rounded to fp8, fp8 codes to bf16, then matmul"

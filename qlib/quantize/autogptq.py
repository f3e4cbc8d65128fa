"""The solver of the auto-gptq package (0.7.1) as a pass: their code, our walk and our packed layers.

Only their solver is imported, because the rest of the package needs older libraries than this environment has. On
equal settings its codes are those of `qlib.quantize.gptq`, a check of both, but for the few rows in which fp32 does not
tell which of two codes is nearer.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Iterator, Literal

import torch
from torch import nn

from qlib.errors import UserError
from qlib.quantize.formats import GridOptions
from qlib.quantize.grid import CompressedWeight, round_to_grid

__all__ = ["Options", "SCOPE", "Statistic", "check", "solve"]

SCOPE = "linear"


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a pass with auto-gptq's solver; the same as those of gptq.

    Args:
        damp: what is added to the diagonal of the Hessian, as a share of its mean.
        block_size: columns after which the columns further right, and the weights scales are fitted to, are brought up
            to date.
        act_order: start with the columns of the largest inputs; scales are then fitted before anything is rounded.
    """

    damp: float = field(default=0.01, metadata={"minimum": 0})
    block_size: Literal[32, 64, 128, 256] = 128
    act_order: bool = False


def check(subject: Any, options: Options) -> None:
    """Refuse what auto-gptq does not know, and the pass where it is not installed.

    Raises:
        UserError: either.
    """
    if options.element != "int" or options.clip != "none":
        field = "element" if options.element != "int" else "clip"
        raise UserError(f"{field}: {getattr(options, field)} is nothing that auto-gptq's solver knows; use pass gptq")
    _package()


class Statistic:
    """The Hessian of the inputs, accumulated by auto-gptq itself on behalf of a linear that nobody solves."""

    def __init__(self, width: int, options: Options):
        self.width = width
        self.solver: Any = None

    def feed(self, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, in]`, each token a sample, so that batches of unequal length weigh what they should."""
        if self.solver is None:
            self.solver = _solver(torch.zeros(1, self.width, device=inputs.device))
        with _undisturbed():
            self.solver.add_batch(inputs[:, None], None)

    def free(self) -> None:
        """Forget everything."""
        self.solver = None


def solve(
    weight: torch.Tensor, options: Options, mask: torch.Tensor | None = None, statistic: Statistic | None = None
) -> CompressedWeight:
    """Round `weight` `[out, in]` with auto-gptq's solver.

    It knows no masks: where `mask` is false, the zero's code is put into the result.

    Raises:
        UserError: nothing was fed, or their solver cannot factorize the Hessian.
    """
    if statistic is None or statistic.solver is None:
        raise UserError("calibration: no text reached a linear that auto-gptq was to solve")
    solver = _solver(weight.detach().float().clone())
    solver.H, solver.nsamples = statistic.solver.H.clone(), statistic.solver.nsamples  # it works in place on H
    solver.quantizer = _stored_quantizer()()
    solver.quantizer.configure(options.bits, perchannel=True, sym=options.symmetric, mse=False)
    settings = {"actorder": options.act_order, "static_groups": options.act_order}
    try:
        with _undisturbed():
            scales, zeros, _ = solver.fasterquant(
                options.block_size, options.damp, group_size=options.group_size or -1, **settings
            )
    except torch.linalg.LinAlgError:
        raise UserError(
            f"damp: {options.damp} leaves the Hessian of {statistic.width} inputs singular for auto-gptq; "
            "allowed: more damping, or more calibration samples"
        ) from None
    # Its weights are on the grid already: the nearest code is the one it chose.
    result = round_to_grid(solver.layer.weight.data, options.grid, scales.bfloat16(), zeros.to(torch.uint8))
    if mask is not None:
        places = result.zeros.repeat_interleave(weight.shape[1] // result.zeros.shape[1], 1)
        result.codes = torch.where(mask, result.codes, places)
    return result


def _solver(weight: torch.Tensor) -> Any:
    """auto-gptq's solver of a linear with this weight, made without drawing random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return _package()[0](linear)


@lru_cache(maxsize=1)
def _stored_quantizer() -> type:
    """auto-gptq's quantizer, but with the scales we store.

    Theirs are fp32 while codes are chosen and are rounded when they are saved. Ours are rounded to bf16 first, and the
    zero is fitted to the rounded scale, so that what is measured is what is stored.
    """

    class StoredQuantizer(_package()[1]):
        def find_params(self, x: torch.Tensor, weight: bool = False) -> None:
            super().find_params(x, weight)
            self.scale = self.scale.bfloat16().float()
            if not self.sym:
                low = x.amin(1, keepdim=True).clamp(max=0)
                self.zero = torch.round(-low / self.scale).clamp(0, self.maxq)

    return StoredQuantizer


@lru_cache(maxsize=1)
def _package() -> tuple[type, type]:
    """The classes `GPTQ` and `Quantizer` of auto-gptq, imported without what else the package imports.

    Raises:
        UserError: auto-gptq is not installed.
    """
    spec = find_spec("auto_gptq")
    if spec is None:
        raise UserError("pass: 'autogptq' needs the package auto-gptq; install it with: pip install auto-gptq==0.7.1")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "auto_gptq"}
    precision = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # it sets both at import
    if "auto_gptq" not in before:
        sys.modules["auto_gptq"] = ModuleType("auto_gptq")  # in place of its __init__, which imports everything
        sys.modules["auto_gptq"].__path__ = list(spec.submodule_search_locations or [])
    try:
        from auto_gptq.quantization.gptq import GPTQ
        from auto_gptq.quantization.quantizer import Quantizer
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = precision
        for name in [name for name in sys.modules if name.partition(".")[0] == "auto_gptq"]:
            if name not in before:  # so that `import auto_gptq` still means the whole package
                del sys.modules[name]
    return GPTQ, Quantizer


@contextmanager
def _undisturbed() -> Iterator[None]:
    """While their code runs, waiting for a GPU is no error where there is none, and DEBUG makes it keep no inputs."""
    synchronize, debug = torch.cuda.synchronize, os.environ.pop("DEBUG", None)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize
        if debug is not None:
            os.environ["DEBUG"] = debug

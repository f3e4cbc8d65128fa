"""Our own CPU kernels (kernels/*.c): built once with the machine's C compiler, and called by name.

Where there is no compiler, or a processor without the instructions they use, `missing` says so and the layers run
torch's own operators: slower, never different in what they compute. QLIB_NATIVE=0 asks for that.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from qlib.paths import cache_folder

__all__ = ["missing", "call", "may_use_tiles"]

SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
#: Contracting a product and a sum would make numbers depend on the compiler.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120
#: What every function takes: pointers, counts, a float; the number of threads comes last.
ARGUMENTS = {
    "quantize_rows": "ppppnn", "int8_dot": "pppppppnnn", "int8_rows": "ppppppnnnn", "int4_row": "pppppnnn",
    "int2_rows": "pppppnnnn", "int2_widen": "ppn",
    "int4_expand": "pppnnnnnnnn", "rms_norm": "pppfnn", "attend": "ppppppppnnnnn", "decode": "ppppnn",
    "group_ranges": "pppnn", "group_codes": "ppppnnnn", "join_pairs": "ppn", "split_pairs": "ppn", "join_blocks": "ppnn",
    "split_blocks": "ppnn", "round_columns": "pppppppnnn", "causal_softmax": "pnnnn", "causal_softmax_backward": "ppnnnn", "amx_ready": "", "keep_tiles": "p", "restore_tiles": "p", "int8_tiles": "ppppppnnn",
    "int8_wide_tiles": "ppppppnnn", "int4_tiles": "ppppnnnnnn", "attend_windows": "ppppppfnnnnn", "attend_windows_backward": "pppppppppfnnnnn",
}  # fmt: skip
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float}


@lru_cache(maxsize=None)
def _build() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason in a few words."""
    if os.environ.get("QLIB_NATIVE") == "0":
        return None, "QLIB_NATIVE=0"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler"
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256("\n".join([*(one.read_text() for one in SOURCES), compiler, *FLAGS, flags]).encode()).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{key}.so"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [compiler, *FLAGS, *(str(one) for one in SOURCES if one.suffix == ".c"), "-o", f"{folder}/kernels.so", "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
            except (subprocess.SubprocessError, OSError) as error:
                lines = (getattr(error, "stderr", None) or str(error)).splitlines()
                return None, next((line for line in lines if "error" in line), lines[0])
            os.replace(f"{folder}/kernels.so", path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, str(error)
    for name, letters in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*(TYPES[letter] for letter in letters), ctypes.c_int], None
    library.amx_ready.restype = ctypes.c_int
    return library, ""


def missing() -> str:
    """Why there are no kernels of our own here; empty if there are."""
    return _build()[1]


missing._dynamo_marked_constant = True  # torch.compile takes its answer, and does not look inside


def call(name: str, *arguments: torch.Tensor | float | None) -> int:
    """Run a kernel on addresses and numbers, with as many threads as torch uses. What it takes: see `ARGUMENTS`."""
    values = [one if one is None or isinstance(one, (int, float)) else one.data_ptr() for one in arguments]
    return getattr(_build()[0], name)(*values, torch.get_num_threads())


@lru_cache(maxsize=None)
def may_use_tiles() -> bool:
    """Whether the system lets this process use the tile registers of its processor; asked once."""
    return bool(call("amx_ready"))

"""What a machine does per second, measured here in half a minute or read from a file, and what it holds."""

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Mapping

from qlib.errors import UserError, nearest
from qlib.paths import cache_folder, write_atomic

__all__ = ["Machine", "this_machine", "read_machine", "shipped_machines", "KINDS"]

HERE = Path(__file__).parent / "machines"
#: Kind of work -> in what it is counted.
KINDS = {
    "read": "bytes", "bf16": "FLOP", "fp32": "FLOP", "hessian": "FLOP", "factor": "FLOP", "elementwise": "numbers",
    "dequantize": "numbers", "int4": "FLOP", "int8": "FLOP", "int8-a8": "FLOP", "calls": "calls",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What one machine can do.

    Attributes:
        device: cpu or cuda. threads: of a CPU.
        memory_bytes: of the device, all of it. disk_bytes: free, where it is known.
        process_bytes: memory of a process before it loads a model; 0 where it is not known.
        rates: kind -> size (a width; 0: any) -> so many a second.
        runs: what was measured on it in whole models, to fit to; see `qlib.predict.fit`.
        measured: when, or the source of what was not measured here.
    """

    name: str
    device: str
    threads: int
    memory_bytes: int
    process_bytes: int
    rates: Mapping[str, Mapping[int, float]]
    measured: str
    disk_bytes: int | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)

    def rate(self, kind: str, size: float = 0) -> float | None:
        """How many a second at a size, between two measured sizes by their logarithms; None if the kind is not known."""
        table = sorted((int(at), rate) for at, rate in self.rates.get(kind, {}).items())
        if not table:
            return None
        if len(table) == 1 or size <= table[0][0]:
            return table[0][1]
        for (low, slow), (high, fast) in zip(table, table[1:]):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return slow * (fast / slow) ** share
        return table[-1][1]


def this_machine(device: str = "cpu", fresh: bool = False) -> Machine:
    """This machine; what was measured before serves as long as processor, threads and torch are the same.

    Raises:
        UserError: there is no such device.
    """
    import torch

    from qlib.runs.provenance import gpu, provenance

    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: '{device}' is unknown; allowed: cpu, cuda")
    if device == "cuda" and not gpu():
        raise UserError("--device: cuda is asked for, but there is no GPU that this build of torch can use; allowed: cpu")
    told = provenance()
    name = told["cpu"] if device == "cpu" else gpu()
    key = json.dumps([name, told["cores"], torch.get_num_threads(), torch.__version__, device, sorted(KINDS)])
    file = cache_folder() / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if fresh or not file.is_file():
        from qlib.predict.rates import measure_rates, process_bytes

        memory = told["memory_bytes"] if device == "cpu" else torch.cuda.get_device_properties(0).total_memory
        when = time.strftime("%Y-%m-%d %H:%M")
        found = Machine(
            name, device, torch.get_num_threads(), memory, process_bytes(), measure_rates(torch.device(device)), when
        )
        write_atomic(file, json.dumps(asdict(found), indent=1) + "\n")
    return _from_file(file, free=shutil.disk_usage(Path.cwd()).free)


def shipped_machines() -> dict[str, Path]:
    """Machines that are described in the package, by name."""
    return {file.stem: file for file in sorted(HERE.glob("*.json"))}


def read_machine(given: str) -> Machine:
    """A machine that a JSON file describes, or one of the package by name.

    Raises:
        UserError: no such file, or a field that is missing or wrong; it names file and field.
    """
    known = shipped_machines()
    file = known.get(given) or Path(given).expanduser()
    if not file.is_file():
        raise UserError(f"--machine: '{given}' is no file{nearest(given, known)}; allowed: a JSON file, {', '.join(known)}")
    return _from_file(file)


def _from_file(file: Path, free: int | None = None) -> Machine:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: is not JSON ({error})") from None
    fields = Machine.__dataclass_fields__
    for name in raw if isinstance(raw, dict) else ():
        if name not in fields:
            raise UserError(f"{file}: {name}: unknown field{nearest(name, fields)}; allowed: {', '.join(fields)}")
    values = {"device": "cuda", "threads": 0, "process_bytes": 0} | (raw if isinstance(raw, dict) else {})
    for name, kind in {"name": str, "measured": str, "memory_bytes": int, "rates": dict}.items():
        if not isinstance(values.get(name), kind):
            found = f"{values[name]!r} is not allowed" if name in values else "is missing"
            raise UserError(f"{file}: {name}: {found}; allowed: {kind.__name__}")
    values["rates"] = {kind: _table(file, kind, table) for kind, table in values["rates"].items()}
    return Machine(**values | ({"disk_bytes": free} if free is not None else {}))


def _table(file: Path, kind: str, table: Any) -> dict[int, float]:
    if kind not in KINDS:
        raise UserError(f"{file}: rates.{kind}: unknown kind{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    table = table if isinstance(table, dict) else {"0": table}
    for size, rate in table.items():
        if type(rate) not in (int, float) or not 0 < rate < math.inf or not str(size).isdigit():
            raise UserError(f"{file}: rates.{kind}: {size}: {rate!r} is not allowed; allowed: size: a number above 0")
    if not table:
        raise UserError(f"{file}: rates.{kind}: is empty; allowed: a number a second, or one for each size")
    return {int(size): float(rate) for size, rate in table.items()}

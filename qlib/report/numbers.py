"""How a measurement is written: value, unit, interval and n, with as many digits as the interval supports.

All functions return plain text; whoever puts it into HTML escapes it. Sizes are decimal (1 GB = 1,000,000,000 bytes).
"""

import math
import re

__all__ = ["number", "write", "interval", "speedup", "meets", "keeps", "column", "ratio", "bind"]

ABSENT = "not measured"
SAME = "no measurable difference"
SPACE = "\N{NO-BREAK SPACE}"  # between a number and what belongs to it
OPEN = "not resolved"

#: unit -> (from this value on, divide by, symbol), largest first.
SCALES = {
    "bytes": ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "bytes")),
    "ms": ((1e4, 1e3, "s"), (0, 1, "ms")),
    "seconds": ((0, 1, "s"),),
    "percent": ((0, 1, "%"),),
    "fraction": ((0, 0.01, "%"),),
    "ratio": ((0, 1, "×"),),
    "perplexity": ((0, 1, ""),),
    "joules": ((0, 1, "J"),),
}
WHOLE = ("tokens", "bytes", "items", "documents")  # units of things that are counted
#: Decimals shown even where the interval is wider: two strategies differ by less than that, because they are paired.
LEAST = {"perplexity": 2}


def number(measurement: dict | None, field: str = "value") -> float | None:
    """A field as a finite float, or None where it is absent or no number."""
    value = (measurement or {}).get(field)
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def _scale(unit: str, magnitude: float) -> tuple[float, str]:
    for least, factor, symbol in SCALES.get(unit, ()):
        if magnitude >= least:
            return factor, symbol
    return 1, unit or ""


def _decimals(value: float, half_width: float | None, unit: str, factor: float) -> int:
    """Decimals that leave one or two digits of the interval's half width, or three significant ones without it."""
    if unit in WHOLE and factor == 1:
        return 0
    size = math.floor(math.log10(abs(value))) if value else 0
    if not half_width:
        return min(max(2 - size, 0), 5)
    order = math.floor(math.log10(half_width))
    decimals = -order + (half_width / 10**order < 2)
    return min(max(decimals, LEAST.get(unit, 0)), max(4 - size, 0), 5)


def _plain(value: float, decimals: int, signed: bool = False) -> str:
    text = f"{abs(value):,.{decimals}f}"
    zero = not any(digit in text for digit in "123456789")
    sign = "" if zero else "\N{MINUS SIGN}" if value < 0 else "+" if signed else ""
    return sign + text


def _half(measurement: dict) -> float | None:
    low, high = number(measurement, "low"), number(measurement, "high")
    return (high - low) / 2 if low is not None and high is not None else None


def _parts(measurement: dict, field: str = "value") -> tuple[str, str]:
    """A field's number and its unit's symbol, both scaled as the value is."""
    unit, value = str(measurement.get("unit") or ""), number(measurement)
    factor, symbol = _scale(unit, abs(value))
    half = _half(measurement)
    decimals = _decimals(value / factor, half and half / factor, unit, factor)
    return _plain(number(measurement, field) / factor, decimals, unit == "points"), symbol


def interval(measurement: dict | None) -> str:
    """``16.9 to 17.5`` in the unit of the value, or an empty string."""
    if number(measurement) is None or _half(measurement) is None:
        return ""
    return _range(_parts(measurement, "low")[0], _parts(measurement, "high")[0])


def _range(low: str, high: str) -> str:
    return f"{low}{SPACE}to{SPACE}{high}"


def write(measurement: dict | None, field: str | None = None, n: bool = False) -> str:
    """``90.8 % (89.9 to 91.6)``, or one field of it; ``not measured`` where there is none.

    Args:
        field: ``value``, ``low`` or ``high`` (with unit), ``interval``, or any other field as it stands.
        n: also tell how many observations the interval rests on.
    """
    if field not in (None, "value", "low", "high", "interval"):
        content = (measurement or {}).get(field)
        plain = isinstance(content, (int, float)) and not isinstance(content, bool)
        return ABSENT if content in (None, "") else f"{content:,}" if plain else str(content)
    if number(measurement) is None:
        return ABSENT
    if field == "interval":
        return interval(measurement) or ABSENT
    if field in ("low", "high") and number(measurement, field) is None:
        return ABSENT
    text, symbol = _parts(measurement, field or "value")
    text += f"{SPACE}{symbol}" if symbol and symbol != "×" else symbol
    notes = [] if field else [interval(measurement)] if interval(measurement) else []
    count = number(measurement, "n")
    if n and not field and count is not None:
        notes.append(f"n = {count:,.0f}")
    return text + (f" ({', '.join(notes)})" if notes else "")


def speedup(measurement: dict | None) -> str:
    """A paired ratio; ``no measurable difference`` where its interval holds 1."""
    low, high = number(measurement, "low"), number(measurement, "high")
    if number(measurement) is not None and low is not None and high is not None and low <= 1 <= high:
        return SAME
    return write(measurement)


def meets(measurement: dict | None, target: float, better: str) -> str:
    """``yes`` if the interval's bad end meets the target, ``no`` if its good end misses it, else ``not resolved``.

    Args:
        better: ``higher`` or ``lower``.
    """
    if number(measurement) is None:
        return ABSENT
    low, high = number(measurement, "low"), number(measurement, "high")
    if low is None or high is None:
        return OPEN
    if better == "lower":
        low, high, target = -high, -low, -target
    return "yes" if low >= target else "no" if high < target else OPEN


def keeps(delta: dict | None, baseline: dict | None, share: float = 0.99) -> str:
    """Does a strategy keep that share of the baseline's accuracy? Decided by the paired interval of the change."""
    accuracy = number(baseline)
    return ABSENT if accuracy is None else meets(delta, -(1 - share) * accuracy, "higher")


def ratio(larger: dict | None, smaller: dict | None) -> str:
    """``2.0×`` or ``1.47×`` from two values of one unit, or an empty string."""
    top, bottom = number(larger), number(smaller)
    if not top or not bottom:
        return ""
    times = top / bottom
    return f"{times:.{2 if times < 2 else 1}f}×"


def column(measurements: list[dict | None]) -> tuple[str, list[tuple[str, str]]]:
    """Write a table's column with one unit and one number of decimals, so that decimal points align.

    Returns:
        the unit's symbol, and per measurement its number (or ``not measured``) and its interval (or nothing).
    """
    known = [m for m in measurements if number(m) is not None]
    if not known:
        return "", [(ABSENT, "") for _ in measurements]
    unit = str(known[0].get("unit") or "")
    factor, symbol = _scale(unit, max(abs(number(m)) for m in known))
    wanted = [_decimals(number(m) / factor, (_half(m) or 0) / factor, unit, factor) for m in known]
    decimals = min(max(wanted), 3)

    def written(measurement: dict | None) -> tuple[str, str]:
        if number(measurement) is None:
            return ABSENT, ""
        plain = [
            _plain(number(measurement, field) / factor, decimals, unit == "points")
            for field in ("value", "low", "high")
            if number(measurement, field) is not None
        ]
        return plain[0], _range(*plain[1:]) if len(plain) == 3 else ""

    return symbol, [written(m) for m in measurements]


def bind(text: str) -> str:
    """Keep numbers and percent signs on one line."""
    return re.sub(r"(?<=\d) (?=%)", SPACE, text)

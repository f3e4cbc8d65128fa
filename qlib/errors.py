"""The one exception a user is meant to see: a single line that says what is wrong and what is allowed."""

from difflib import get_close_matches
from typing import Iterable

__all__ = ["UserError", "nearest"]


class UserError(ValueError):
    """Bad input. The command line prints it without a traceback and exits with code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""

"""One adapter for each outside tool, found by its name; `qlib.tools.adapter` says what an adapter is."""

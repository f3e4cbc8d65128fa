"""Targets, measured side by side with other tools. A benchmark is a module of this folder with `TARGETS` and `measure`."""

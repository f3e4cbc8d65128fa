"""Compress a model far larger than the memory: block by block from a checkpoint on disk into another one."""

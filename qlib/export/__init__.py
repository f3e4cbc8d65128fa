"""Files that other programs load, a module for each format.

`gptq` and `compressed_tensors` say what a Hugging Face checkpoint holds; `gguf` writes a file of its own.
"""

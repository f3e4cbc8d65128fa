"""Ways to train a model in place, by name. Each is a module with

- ``check(subject, options)``: refuses options of a fine-tuning pass that do not fit;
- ``describe(options)``: what the record tells of the way besides its name;
- ``trainable(model, options, seed)``: a context manager. Inside it, parameters that learn require a gradient; it yields what
  must be called after each step. Afterwards the model has the modules it had before. Parameters are fp32 all the while.
"""

from qlib.train.ways import full, lora, scales

__all__ = ["WAYS"]

WAYS = {"full": full, "lora": lora, "scales": scales}

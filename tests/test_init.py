"""The package itself: light to import, and its verbs stay verbs."""

import subprocess
import sys
from importlib import import_module

import qlib


def test_verbs_survive_the_import_of_modules_of_the_same_name():
    assert callable(qlib.compress)
    import_module("qlib.evaluate.verb")
    import_module("qlib.record")
    assert all(callable(getattr(qlib, verb)) for verb in ("load", "compress", "evaluate", "save", "record"))


def test_every_verb_is_there():
    for verb in qlib.VERBS:
        assert callable(getattr(qlib, verb)), verb


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, qlib, qlib.cli; print([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

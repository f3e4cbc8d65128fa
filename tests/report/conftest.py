"""A project in a temporary folder: runs that finished, failed, were published, and one whose texts are hostile."""

import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HERE = Path(__file__).resolve().parents[2]
EVIL = '<script>alert("x")</script>'


def number(value, unit, spread=None, conditions="cpu, 2 threads"):
    """A measurement; `spread` is half the width of its interval."""
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    found = {"value": value, "unit": unit, "n": 3120, "low": low, "high": high}
    return found | {"method": "bootstrap over documents", "conditions": conditions}


def quality(accuracy, delta, perplexity, megabytes, bits, family="weight_quantization"):
    """The measurements of a strategy."""
    found = {
        "quality.accuracy": number(accuracy, "percent", 0.9),
        "quality.perplexity": number(perplexity, "perplexity", 0.32),
        "quality.bits_per_byte": number(perplexity / 17, "bits", 0.01),
        "size.disk_bytes": number(megabytes * 1e6, "bytes"),
        "size.resident_bytes": number(megabytes * 1.01e6, "bytes"),
        "size.bits_per_weight_total": number(megabytes * 8 / 1.5, "bits"),
    }
    if family == "baseline":
        return found
    return found | {
        "quality.accuracy_delta": number(delta, "points", 0.35),
        "quality.kl": number(abs(delta) / 50 + 0.004, "nats", 0.001),
        "quality.top1_agreement": number(97 + delta, "percent", 0.4),
        "size.bits_per_weight": number(bits, "bits"),
        "compress.seconds": number(12.5 * abs(delta) + 1, "seconds"),
        "compress.peak_rss_bytes": number(4.1e8, "bytes"),
    }


def record(name, family, measurements, **more):
    """A record.json as the runner writes it."""
    accuracy = measurements.get("quality.accuracy", {}).get("value")
    levels = [{"level": f"l{i}"} | number(accuracy - 4 * i, "percent", 1.1) for i in (1, 2, 3)] if accuracy else []
    recipe = [] if family == "baseline" else [{"pass": "rtn", "bits": 4, "group_size": 128}]
    return {
        "format": 1,
        "name": name,
        "title": {"en": name.upper().replace("-", " "), "zh": "压缩"},
        "family": family,
        "tier": "core",
        "model": "reference-2",
        "device": "cpu",
        "params": {"name": name, "family": family, "notebook": f"{family}.ipynb", "seed": 7, "recipe": recipe},
        "measurements": measurements,
        "protocol": "reference-2 evaluation split, 700 documents, context 256",
        "shape_format": "bf16",
        "kept": {"heads": 1.0, "ffn": 1.0, "layers": 1.0},
        "subject": {"source": "reference-2", "parameters": 1_500_000},
        "data_sha256": "ab" * 32,
        "details": {"levels": levels},
        "key": "c0ffee" * 6,
        "key_parts": {},
        "duration_seconds": 83.2,
        "peak_memory_bytes": {"value": 512_000_000, "method": "anonymous RSS"},
        "provenance": {
            "commit": "0123456789abcdef",
            "dirty": True,
            "lock_sha256": "fe" * 32,
            "cpu": "Zen 5",
            "threads": 2,
            "python": "3.11.7",
            "seed": 7,
            "started": "2025-01-02T03:04:05",
        },
    } | more


def speed(model, device, scale=1.0):
    """A speed record: int4 decodes faster, int8's prefill cannot be told from bf16's."""
    formats = {}
    for name, size, decode, prefill, bits, fraction, factor in (
        ("bf16", 144.6e9, 6000, 44000, 16, 0.5, 1.0),
        ("int8", 73e9, 1600, 45000, 8.03, 0.92, 0.99),
        ("int4-g128", 38e9, 950, 46000, 4.16, 0.83, 0.93),
    ):
        formats[name] = {
            "size.disk_bytes": number(size * scale, "bytes"),
            "size.resident_bytes": number(size * scale, "bytes"),
            "size.bits_per_weight": number(bits, "bits"),
            "latency.prefill_ms": number(prefill * scale, "ms", 900 * scale),
            "latency.decode_ms": number(decode * scale, "ms", 30 * scale),
            "latency.request_ms": number((prefill + 32 * decode) * scale, "ms", 1000 * scale),
            "latency.roofline_fraction": number(fraction, "fraction"),
        }
        if name != "bf16":
            formats[name] |= {
                "latency.prefill_speedup": number(factor, "ratio", 0.02),
                "latency.decode_speedup": number(6000 / decode, "ratio", 0.1),
                "latency.request_speedup": number(236_000 / (prefill + 32 * decode), "ratio", 0.1),
                "compress.seconds": number(350, "seconds"),
            }
    decode = {"bf16": {"q_proj": "linear"}, "int4-g128": {"q_proj": "int4pack", "up_proj": "int4pack"}}
    layer = {"decode": {"kernels": decode}, "prefill": {"kernels": {"int4-g128": {"q_proj": "dequantize"}}}}
    details = {"layer": layer, "floor": {"bf16": {"decode_ms": 2999.0}}}
    more = {"model": model, "device": device, "formats": formats, "details": details, "shape_format": None}
    return record(f"speed-{model}", "speed", {}, **more)


def executed(name, outputs):
    """A notebook as the runner leaves it: prose, parameters, a summary, and a cell that no report shows."""
    tags = {"parameters": ["parameters"], "injected": ["injected-parameters"], "summary": ["summary"]}
    cells = [new_markdown_cell(f"# {name}\n\nOld prose.", id="about")]
    for number_, (id, source, shown) in enumerate(
        (
            ("parameters", "seed: int = 1", []),
            ("injected", "seed = 7", []),
            ("summary", "summary(result)", outputs),
            ("hidden", "print('hidden')", [new_output("stream", text="never stitched")]),
        )
    ):
        metadata = {"tags": tags.get(id, [])}
        cells.append(new_code_cell(source, id=id, metadata=metadata, outputs=shown, execution_count=number_ + 1))
    return new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def html(text):
    """An output of HTML."""
    return new_output("display_data", {"text/html": text, "text/plain": "x"})


def write(folder: Path, content: dict, file: str = "record.json", state: str = "done", **status) -> Path:
    """Write a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if content:
        (folder / file).write_text(json.dumps(content))
    if state:
        (folder / "status.json").write_text(json.dumps({"state": state, **status}))
    return folder


def _sources(root: Path) -> None:
    """Notebooks and strategy files."""
    (root / "notebooks").mkdir()
    (root / "params").mkdir()
    shutil.copy(HERE / "notebooks" / "report.ipynb", root / "notebooks" / "report.ipynb")
    for family in ("baseline", "weight_quantization", "pruning", "mixed_precision"):
        notebook = executed(family, [])
        notebook.cells = [cell for cell in notebook.cells if cell.id != "injected"]
        notebook.cells[0].source = f"# {family}\n\nNew prose: accuracy {{{{ quality.accuracy }}}}."
        nbformat.write(notebook, root / "notebooks" / f"{family}.ipynb")
    for name, family in (("gptq-int4", "weight_quantization"), ("never-run", "combined"), ("wanda-50", "pruning")):
        plan = f"# expect\nname: {name}\nfamily: {family}\nnotebook: {family}.ipynb\nrecipe: [{{pass: x}}]\n"
        (root / "params" / f"{name}.yaml").write_text(plan)


def _finished(cpu: Path) -> None:
    from qlib.report.show import summary

    third = {"kept": {"heads": 0.66, "ffn": 0.66, "layers": 1.0}}
    for name, family, accuracy, delta, perplexity, size, bits, shape, more in (
        ("baseline", "baseline", 90.8, 0.0, 16.7, 3.0, 16, "bf16", {}),
        ("rtn-int8", "weight_quantization", 90.8, 0.0, 16.71, 1.7, 8.16, "int8", {}),
        ("rtn-int4", "weight_quantization", 90.5, -0.3, 17.4, 0.92, 4.16, "int4-g128", {}),
        ("rtn-int3", "weight_quantization", 90.0, -0.8, 20.1, 0.81, 3.15, "int3-g128", {}),
        ("rtn-int2", "weight_quantization", 81.2, -9.6, 64.0, 0.7, 2.14, "int2-g128", {}),
        ("heads-third", "pruning", 88.2, -2.6, 19.9, 2.0, 16, "bf16", third),
    ):
        measured = quality(accuracy, delta, perplexity, size, bits, family)
        content = record(name, family, measured, shape_format=shape, **more)
        folder = write(cpu / name, content)
        nbformat.write(executed(name, [html(summary(content)._repr_html_())]), folder / "notebook.ipynb")
    write(cpu / "hand", record("hand", "combined", quality(89.9, -0.9, 17.9, 1.0, 4.5)), "result.json", state="")


def _failed(cpu: Path) -> None:
    cell = {"index": 3, "id": "compress", "source": f"qlib.compress(subject, recipe)  # {EVIL}"}
    why = {"cause": f"MemoryError: no room for {EVIL}", "cell": cell}
    folder = write(cpu / "gptq-int4", {}, state="failed", last_lines=["Traceback", f"MemoryError {EVIL}"], **why)
    error = new_output("error", ename="MemoryError", evalue="x", traceback=["MemoryError"])
    notebook = executed("gptq-int4", [error])
    banner = {"tags": ["papermill-error-cell-tag"]}
    notebook.cells.insert(0, new_markdown_cell("<span>An Exception was encountered</span>", metadata=banner))
    nbformat.write(notebook, folder / "failed.ipynb")


def _hostile(cpu: Path) -> None:
    measured = quality(89.0, -1.8, 18.0, 1.1, 5.0)
    measured["quality.kl"] |= {"method": EVIL, "conditions": EVIL}
    content = record("evil", "mixed_precision", measured, title={"en": f"Evil {EVIL}", "zh": EVIL}, protocol=EVIL)
    content["params"]["recipe"] = [{"pass": EVIL}]
    content["provenance"]["cpu"] = EVIL
    write(cpu / "evil", content)


@pytest.fixture
def project(tmp_path) -> Path:
    """A whole project: ``notebooks/``, ``params/``, ``reports/runs`` and ``reports/published``."""
    _sources(tmp_path)
    runs, records = tmp_path / "reports" / "runs", tmp_path / "reports" / "published" / "records"
    cpu = runs / "reference-2" / "cpu"
    _finished(cpu)
    _failed(cpu)
    _hostile(cpu)
    write(cpu / "speed-reference-2", speed("reference-2", "cpu", 1e-4))
    write(runs / "qwen-72b" / "cpu" / "speed-qwen-72b", speed("qwen-72b", "cpu"))
    write(records / "wanda-50", record("wanda-50", "pruning", quality(86.9, -3.9, 23.0, 2.9, 9.0)), state="")
    other = record("rtn-int4", "weight_quantization", quality(1.0, -80, 999, 9, 4.16))
    write(records / "rtn-int4", other, state="")
    write(records / "speed-qwen-72b@nvidia-h200", speed("qwen-72b", "nvidia-h200", 1e-2), state="")
    return tmp_path


@pytest.fixture
def book(project):
    from qlib.report.book import collect

    return collect(project / "reports" / "runs", project / "reports" / "published", project / "params")


def scores(nats, right, documents=30, spread=0.0, seed=0):
    """What a strategy's items.npz holds: the same nats per token and right answers of ten in every document.

    Args:
        spread: by how much documents differ from each other, drawn with `seed`.
    """
    noise = np.random.default_rng(seed).normal(0, 1, documents) * spread
    gain = np.where(np.arange(10) < right, 1.0, -1.0)
    inside = np.zeros((10 * documents, 4))
    inside[:, 0] = np.tile(gain, documents)
    return {
        "item_document": np.repeat(np.arange(documents), 10),
        "item_level": np.zeros(10 * documents, int),
        "item_inside": inside,
        "item_alone": np.zeros_like(inside),
        "document_nll": 20 * (nats + noise),
        "document_tokens": np.full(documents, 20),
    }


def strategy(folder: Path, name, family, recipe, nats, right, megabytes=3.0, spread=0.0, seed=0, items=True, **more):
    """Write a strategy whose measurements follow from its scores."""
    measured = quality(10.0 * right, 10.0 * right - 90, float(np.exp(nats)), megabytes, 16, family)
    content = record(name, family, measured, **more)
    content["params"] |= {"recipe": recipe, "evaluation": {"bootstrap": 200}}
    write(folder / name, content)
    if items:
        np.savez(folder / name / "items.npz", **scores(nats, right, spread=spread, seed=seed))


PRUNE, ROUND = {"pass": "width", "keep_heads": 0.5}, {"pass": "gptq", "bits": 4, "group_size": 128}
TUNE, TUNE_MORE = ({"pass": "finetune", "tokens": n, "loss": "teacher"} for n in (1000, 500))
TRAINED = (
    ("baseline", "baseline", [], 2.0, 9, 3.0),
    ("narrow", "pruning", [PRUNE], 3.0, 5, 2.0),
    ("narrow-tuned", "finetuning", [PRUNE, TUNE], 2.4, 8, 2.0),
    ("only-tuned", "finetuning", [TUNE | {"loss": "text"}], 1.8, 10, 3.0),
    ("rounded-tuned", "finetuning", [ROUND, TUNE], 2.1, 8, 1.0),
    ("all", "combined", [PRUNE, TUNE, ROUND, TUNE_MORE], 2.5, 7, 0.7),
    ("all-but-first-training", "combined", [PRUNE, ROUND, TUNE_MORE], 2.8, 6, 0.7),
    ("all-but-last-training", "combined", [PRUNE, TUNE, ROUND], 2.6, 7, 0.7),
)


@pytest.fixture
def trained(tmp_path):
    """A book of strategies that were trained, with a control for one of them."""
    from qlib.report.book import collect

    for name, family, recipe, nats, right, size in TRAINED:
        strategy(tmp_path / "reference-2" / "cpu", name, family, recipe, nats, right, size)
    return collect(tmp_path, tmp_path / "none")


@pytest.fixture
def make():
    """The builders above, for tests that need records of their own."""
    from types import SimpleNamespace

    builders = (number, quality, record, speed, write, executed, scores, strategy)
    return SimpleNamespace(**{build.__name__: build for build in builders})

"""What each fixed measurement name is called on the page, and which direction is better."""

from dataclasses import dataclass

__all__ = ["Measure", "MEASURES", "FAMILIES", "FIELDS", "label", "family_label"]


@dataclass(frozen=True)
class Measure:
    """A fixed name's label and better direction: ``higher``, ``lower`` or empty where neither is."""

    label: str
    better: str = ""


MEASURES = {
    "quality.accuracy": Measure("Accuracy", "higher"),
    "quality.accuracy_delta": Measure("Accuracy change", "higher"),
    "quality.perplexity": Measure("Perplexity", "lower"),
    "quality.perplexity_ratio": Measure("Perplexity ratio", "lower"),
    "quality.bits_per_byte": Measure("Bits per byte", "lower"),
    "quality.kl": Measure("KL divergence", "lower"),
    "quality.kl_p99": Measure("KL divergence, worst 1 %", "lower"),
    "quality.top1_agreement": Measure("Top-1 agreement", "higher"),
    "size.bits_per_weight": Measure("Bits per weight", "lower"),
    "size.bits_per_weight_total": Measure("Bits per weight, whole model", "lower"),
    "size.disk_bytes": Measure("Size on disk", "lower"),
    "size.resident_bytes": Measure("Size in memory", "lower"),
    "size.kv_bytes_per_token": Measure("Key-value cache, per token", "lower"),
    "latency.prefill_ms": Measure("Prefill", "lower"),
    "latency.decode_ms": Measure("Decode, per token", "lower"),
    "latency.request_ms": Measure("Request", "lower"),
    "latency.prefill_speedup": Measure("Prefill speed-up", "higher"),
    "latency.decode_speedup": Measure("Decode speed-up", "higher"),
    "latency.request_speedup": Measure("Request speed-up", "higher"),
    "latency.roofline_fraction": Measure("Share of the roofline", "higher"),
    "compress.seconds": Measure("Time to compress", "lower"),
    "compress.peak_rss_bytes": Measure("Peak memory of compressing", "lower"),
    "compress.calibration_tokens": Measure("Calibration tokens"),
    "train.seconds": Measure("Time to train", "lower"),
    "train.tokens_per_second": Measure("Training speed", "higher"),
    "train.peak_rss_bytes": Measure("Peak memory of training", "lower"),
    "train.loss_difference": Measure("Loss minus fp32, same step", "lower"),
    "energy.joules": Measure("Energy", "lower"),
}

#: In the order of the report.
FAMILIES = {
    "baseline": "Baseline",
    "pruning": "Pruning",
    "weight_quantization": "Weight quantization",
    "mixed_precision": "Mixed precision",
    "finetuning": "Fine-tuning",
    "combined": "Combined",
    "training": "Training precision",
    "tool": "Outside tools",
    "reference": "Reference model",
    "speed": "Speed",
    "scale": "True shape",
}

#: The fields of a measurement.
FIELDS = ("value", "unit", "n", "low", "high", "method", "conditions")


def label(name: str) -> str:
    """``quality.kl`` -> ``KL divergence``; joined and unforeseen names keep what they can of their own."""
    prefix = "At true shape: " if name.startswith("shape.") else ""
    short = name.removeprefix("shape.")
    if short.startswith("task."):
        return f"Accuracy on {short.removeprefix('task.')}"
    return prefix + (MEASURES[short].label if short in MEASURES else short.replace("_", " ").replace(".", ": "))


def family_label(family: str) -> str:
    """The family's name on the page."""
    return FAMILIES.get(family, str(family).replace("_", " ").capitalize())

"""Write the model card of a trained reference model: every number in it comes from the training and acceptance records."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlib.paths import write_atomic
from qlib.progress import clock
from qlib.train.acceptance import BAND, GROUP, Acceptance

__all__ = ["write_card", "card"]


def write_card(folder: Path, name: str, config: Any, training: dict[str, Any], found: Acceptance) -> str:
    """Write README.md into the model's folder and return its text."""
    text = card(name, config, training, found)
    write_atomic(folder / "README.md", text)
    return text


def card(name: str, config: Any, training: dict[str, Any], found: Acceptance) -> str:
    """The card as Markdown."""
    parameters, machine = training["parameters"], training["machine"]
    verdict = "accepted" if found.separated and found.in_band else "NOT accepted"
    rows = "\n".join(_row(asdict(found)["rows"][i]) for i in range(len(found.rows)))
    levels = "\n".join(
        f"| {level['level']}, {level['cut']} | {level['context']} | {level['continuation']} | {level['n']} | "
        f"{level['value']:.1f} % ({level['low']:.1f} to {level['high']:.1f}) |"
        for level in found.levels
    )
    return f"""---
license: apache-2.0
library_name: transformers
---

# {name}

A small causal language model of the Qwen2 architecture, trained from random weights so that the effect of compression on
quality can be measured on any machine, offline, within minutes. It completes Python source and is good for nothing else.

- **Shape**: hidden {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads of
  {config.head_dim} with {config.num_key_value_heads} key-value heads, FFN {config.intermediate_size}, vocabulary
  {config.vocab_size}, tied embeddings: {parameters:,} parameters, stored in bf16.
- **Text**: {training["corpus"]}; exact and near duplicates removed, split by document into training, calibration,
  development and evaluation text. The manifest names every file with its SHA-256. The packages' licences are permissive
  (BSD, MIT, Apache, PSF); no text is shipped, it is read from the installed packages.
- **Training**: {_history(training)}; {training["tokens"] / training["stream_tokens"]:.2f} passes over the text, batches
  of {training["schedule"]["batch_tokens"]} tokens, AdamW, peak learning rate {training["schedule"]["peak_lr"]},
  cosine to {100 * training["schedule"]["final_share"]:.0f} % of it, bf16 autocast,
  {clock(training["seconds"])} on {machine["cpu"]} with {machine["cores"]} cores; last training loss
  {training["curve"][-1][1]:.3f}, held-out loss {training["held_out"][-1][1]:.3f} nats per token.
- **Made by** `notebooks/reference_model.ipynb`; the loss curve is in `training.json`.

## Acceptance: {verdict}

Round-to-nearest in groups of {GROUP}, perplexity against the row above, paired over documents (95 % interval):

| bits | perplexity | accuracy | ratio to the row above |
| --- | --- | --- | --- |
{rows}

Accuracy of the baseline by difficulty (chance is 25 %; one level must lie between {BAND[0]:.0f} and {BAND[1]:.0f} %):

| level | context tokens | continuation tokens | items | accuracy |
| --- | --- | --- | --- | --- |
{levels}

## Limits

It has seen Python source only, with one vocabulary of {config.vocab_size} tokens; how strongly it reacts to compression says
which method loses more, not how much a model of billions of parameters would lose. A retrained model gets a new name.
"""


def _history(training: dict[str, Any]) -> str:
    """How many tokens, and on top of which earlier training."""
    earlier = training.get("earlier") or {}
    total = training["tokens"] + earlier.get("tokens", 0)
    words = f"{training['tokens']:,} tokens"
    if "tokens" in earlier:
        words += f" in random order of the documents, on top of the {earlier['tokens']:,} of {earlier['name']}"
    return f"{words} ({total / training['parameters']:.0f} per parameter)"


def _row(row: dict[str, Any]) -> str:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    return f"| {row['bits']} | {row['perplexity']:.2f} | {row['accuracy']:.1f} % | {ratio} |"

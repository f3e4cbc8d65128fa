"""What the notebooks draw of masks and of narrowed models."""

from types import SimpleNamespace

import torch
from torch import nn

from qlib.report import layer_figures, layer_frames
from qlib.report.show import svg

NARROWED = {
    "kept": {"heads": 0.5, "ffn": 1.0},
    "width": [
        {"block": i, "heads": [0, 2], "attention_error": 0.1, "attention_error_plain": 0.4}
        | {"ffn_error": 0.2, "ffn_error_plain": 0.3}
        for i in range(2)
    ],
}


def test_the_picture_shows_the_zeros_of_a_mask():
    model = nn.ModuleDict({"first": nn.Linear(3, 2, bias=False), "last": nn.Linear(40, 40, bias=False)})
    model["first"].weight = nn.Parameter(torch.tensor([[1.0, 0, 2], [0, 0, 3]]))
    details = {"layers": [{"name": "first"}, {"name": "last"}]}
    frame = layer_frames.stayed_frame(SimpleNamespace(model=model, details=details))
    first = frame[frame["panel"] == "first"]
    assert first["kept"].tolist() == [True, False, True, False, False, True]
    assert (frame["panel"] == "last").sum() == 32 * 32 and frame["kept"].dtype == bool
    assert "first: 50 % of the cells stayed, 33.3 to 66.7 % in a row" in layer_frames.kept_alt(frame)
    assert "<svg" in svg(layer_figures.kept_cells(frame), "fig-masks", "Masks")


def test_a_narrowed_model_shows_its_heads_and_errors():
    subject = SimpleNamespace(model=None, details=NARROWED)
    frame = layer_frames.stayed_frame(subject)
    assert frame["kept"].tolist() == [True, False, True, False] * 2
    errors = layer_frames.pruned_frame(NARROWED, "narrow")
    assert errors.groupby("linear", sort=False)["error"].mean().round(6).to_dict() == {
        "o_proj": 0.1, "o_proj before": 0.4, "down_proj": 0.2, "down_proj before": 0.3,
    }  # fmt: skip
    assert "<svg" in svg(layer_figures.kept_cells(frame, "Head", "Block"), "fig-heads", "Heads")
    masked = layer_frames.pruned_frame({"layers": [{"name": "model.layers.1.mlp.up_proj", "error": 0.5}]}, "masked")
    assert masked.to_dict("records") == [{"strategy": "masked", "block": 1, "linear": "up_proj", "error": 0.5}]

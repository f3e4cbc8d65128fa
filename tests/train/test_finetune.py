"""Fine-tuning: it learns in any state, keeps masks and formats, repeats bit for bit, and refuses what cannot work."""

import pytest
import torch
import torch.nn.functional as F

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.precision import in_float32
from qlib.layers import packed_layers
from qlib.models.families import is_tied
from qlib.models.load import load
from qlib.models.save import save
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.record import check_measurements
from qlib.train import fake_quant, finetune
from qlib.train.finetune import distillation_loss
from qlib.train.ways import full


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model, seed=0):
    ids = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), in_float32(model):
        return model(input_ids=ids, use_cache=False).logits


def held_out(subject):
    return [loss for _, loss in subject.details["training"][-1]["development"]]


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("qwen3", False)])
def test_a_dense_model_learns_and_stays_what_it_was(model_folder, step, kind, tied):
    subject = load(str(model_folder(kind, tied)))
    attention, before = subject.model.config._attn_implementation, bits_of(subject.model)
    rotary = subject.model.model.rotary_emb.inv_freq.clone()
    tuned = compress(subject, [step])
    assert held_out(tuned)[-1] < held_out(tuned)[0] - 0.5
    after = tuned.model.state_dict()
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all((after[name] != before[name]).any() for name in before), "norms, biases and embedding learn as well"
    assert is_tied(tuned.model) == tied and tuned.model.config._attn_implementation == attention
    assert not tuned.model.training and not any(p.requires_grad for p in tuned.model.parameters())
    assert torch.equal(tuned.model.model.rotary_emb.inv_freq, rotary)


@pytest.mark.parametrize("bits, group_size", [(2, 32), (4, 32), (8, None)])
def test_a_packed_model_learns_in_its_format(model_folder, step, bits, group_size):
    rtn = {"pass": "rtn", "bits": bits, "group_size": group_size}
    plain = compress(load(str(model_folder())), [rtn])
    tuned = compress(load(str(model_folder())), [rtn, step])
    assert held_out(tuned)[-1] < held_out(tuned)[0] - 0.5
    before, after = packed_layers(plain.model), packed_layers(tuned.model)
    for name, layer in before.items():
        assert type(after[name]) is type(layer) and after[name].grid == layer.grid
        assert after[name].resident_bytes() == layer.resident_bytes()
        assert torch.equal(after[name].compressed().zeros, layer.compressed().zeros)
        assert (after[name].compressed().dequantize() != layer.compressed().dequantize()).any()
    assert tuned.details["shape_format"] == plain.details["shape_format"]


def test_what_is_evaluated_is_what_training_computed(model_folder, step, monkeypatch):
    seen = {}

    def pack_again(model):
        seen["weights"] = {n: m.quantized().detach() for n, m in model.named_modules() if hasattr(m, "quantized")}
        seen["logits"] = logits(model)
        fake_quant.pack_again(model)

    monkeypatch.setattr(full, "pack_again", pack_again)
    tuned = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 3, "group_size": 32}, step])
    layers = packed_layers(tuned.model)
    assert len(layers) == 14 and layers.keys() == seen["weights"].keys()
    for name, layer in layers.items():
        assert torch.equal(layer.compressed().dequantize(), seen["weights"][name])
    # Only embedding, norms and biases are rounded afterwards, from fp32 to bf16.
    error = (logits(tuned.model) - seen["logits"]).abs().max() / seen["logits"].abs().max()
    assert error < 0.01


@pytest.mark.parametrize("then", [[], [{"pass": "rtn", "bits": 4, "group_size": 32}]])
def test_masks_are_kept(model_folder, step, then):
    subject, masks = load(str(model_folder())), {}
    for index, block in enumerate(subject.model.model.layers):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            linear = block.get_submodule(name)
            mask = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(index)) > 0.5
            put_pruned(linear, PrunedWeight(linear.weight.detach().clone(), mask))
            masks[f"model.layers.{index}.{name}"] = mask
    tuned = compress(subject, [step, *then, *([step] if then else [])])
    assert len(tuned.details["training"]) == 1 + bool(then) and held_out(tuned)[-1] < held_out(tuned)[0]
    for name, mask in masks.items():
        linear = tuned.model.get_submodule(name)
        weight = linear.compressed().dequantize() if then else linear.weight
        assert not weight[~mask].any() and mask_of(linear) is not None
        assert weight[mask].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(model_folder, step, loss):
    recipe = [{"pass": "rtn", "bits": 3, "group_size": 32}, step | {"tokens": 2048, "loss": loss}]
    state = torch.get_rng_state()
    first, again, other = (compress(load(str(model_folder())), recipe, seed=seed) for seed in (0, 0, 1))
    ours, same, others = (bits_of(subject.model) for subject in (first, again, other))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert first.details["training"][0]["curve"] == again.details["training"][0]["curve"]
    assert torch.equal(torch.get_rng_state(), state)


def test_distillation_brings_a_rounded_model_back_towards_the_original(model_folder, step, tmp_path):
    trained, folder = compress(load(str(model_folder())), [step]), str(tmp_path / "trained")
    save(trained, folder)
    rtn, near = {"pass": "rtn", "bits": 2, "group_size": 32}, step | {"loss": "distillation", "peak_lr": 0.0005}
    distilled = compress(load(folder), [rtn, near])
    curve = [loss for _, loss in distilled.details["training"][0]["curve"]]
    assert curve[-1] < 0.7 * curve[0]


def test_distillation_loss_is_the_divergence_per_token():
    ours, theirs = torch.randn(2, 3, 5, 11, generator=torch.Generator().manual_seed(0)).double()
    p, q = (torch.softmax(given, -1) for given in (theirs, ours))
    wanted = (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(ours, theirs).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert distillation_loss(theirs, theirs).item() == pytest.approx(0, abs=1e-6)


def test_the_first_step_has_the_gradient_of_the_reference_loss(model_folder, step, text):
    """One step of plain Adam written out, in fp32 and without autocast, moves every weight the same way."""
    subject = load(str(model_folder()))
    started = {name: p.detach().float().clone() for name, p in subject.model.named_parameters()}
    ids = finetune.read_training(subject.tokenizer, text, 512, [0, 0]).astype("int64")
    windows = torch.from_numpy(ids).view(16, 32)
    model = load(str(model_folder(name="again"))).model.float().requires_grad_(True)
    F.cross_entropy(model(input_ids=windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    tuned = compress(subject, [step | {"tokens": 512, "peak_lr": 1.0, "warmup": 0.0}])
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is nothing but rounding
            continue
        moved, size = tuned.model.get_parameter(name).float() - started[name], parameter.grad.abs()
        clear = (size > 0.1 * size.max()) & (moved != 0)
        assert clear.any() and (moved.sign() == -parameter.grad.sign())[clear].float().mean() > 0.98, name


def test_two_passes_add_up_and_read_different_text(model_folder, step):
    short = step | {"tokens": 1024}
    tuned = compress(load(str(model_folder())), [short, short])
    training, found = tuned.details["training"], check_measurements(tuned.measurements, None)
    assert [entry["tokens"] for entry in training] == [1024, 1024] and training[0]["curve"] != training[1]["curve"]
    seconds = sum(entry["seconds"] for entry in training)
    assert found["train.seconds"]["value"] == pytest.approx(seconds)
    assert found["train.tokens_per_second"]["value"] == pytest.approx(2048 / seconds)
    assert found["train.peak_rss_bytes"]["value"] > 1e6
    assert found["compress.seconds"]["value"] == 0
    for entry in training:
        assert entry["development"][0][0] == 0 and entry["development"][-1][0] == entry["curve"][-1][0] == 1024


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": 0}, "tokens: 0 is not allowed; allowed: at least 1"),
        ({"tokens": 10**9}, r"tokens: 1000000000 are more than the training split of .* holds: about \d+ tokens"),
        ({"length": 512}, "length: 512 is not allowed; allowed: 2 to 256"),
        ({"batch_tokens": 100}, "batch_tokens: 100 is not allowed; allowed: multiples of the length 32"),
        ({"peak_lr": 0.0}, "peak_lr: 0.0 is not allowed"),
        ({"warmup": 1.0}, "warmup: 1.0 is not allowed"),
        ({"text": "no/such/text"}, "text: 'no/such/text' is neither"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(model_folder, step, changes, message):
    subject = load(str(model_folder()))
    before = bits_of(subject.model)
    with pytest.raises(UserError, match=rf"^recipe\[1\].{message}"):
        compress(subject, [{"pass": "rtn", "group_size": 32}, step | changes])
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_a_model_is_packed_again_when_training_fails(model_folder, step, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    subject = load(str(model_folder()))
    monkeypatch.setattr(finetune.Trainer, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(subject, [{"pass": "rtn", "bits": 3, "group_size": 32}, step])
    assert len(packed_layers(subject.model)) == 14
    assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}


def test_drift_is_zero_without_training_and_leaves_out_other_shapes(model_folder):
    original = load(str(model_folder()))
    assert [one["error"] for one in finetune.drift(original.model, original.model)] == [0.0] * 14
    rounded = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 3, "group_size": 32}])
    found = {one["name"]: one["error"] for one in finetune.drift(rounded.model, original.model)}
    assert found == pytest.approx({layer["name"]: layer["error"] for layer in rounded.details["layers"]}, rel=1e-5)
    narrow = load(str(model_folder(name="narrow", intermediate_size=64)))
    assert len(finetune.drift(narrow.model, original.model)) == 8

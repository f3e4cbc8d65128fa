"""LoRA: what is trained is what is merged, masks and grids are kept, nothing but the adapters learns, seeds repeat."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import PackedLinear, packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.quantize.grid import round_to_grid
from qlib.train import finetune
from qlib.train.ways import WAYS, lora

RTN = {"pass": "rtn", "bits": 4, "group_size": 32}
PRUNED = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture
def step(step):
    return step | {"train": "lora", "rank": 4, "alpha": 8.0}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned(model):
    """Prune half of some linears in place; returns the masks by name."""
    masks = {}
    for index, block in enumerate(blocks_of(model)):
        for name in PRUNED:
            linear = block.get_submodule(name)
            mask = normal(*linear.weight.shape, seed=index) > 0
            put_pruned(linear, PrunedWeight(linear.weight.detach().clone(), mask))
            masks[f"model.layers.{index}.{name}"] = mask
    return masks


@contextmanager
def adapted(model, seed=0, **options):
    """Inside, an fp32 model whose adapters do something; yields them by name. Afterwards they are merged, in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    with lora.trainable(model, finetune.Options(train="lora", rank=4, alpha=8.0, **options), seed):
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_B")}
        for number, layer in enumerate(layers.values()):
            layer.lora_B.default.weight.data = 0.1 * normal(layer.out_features, 4, seed=number)
        yield layers


def delta_of(layer, mask=None, dtype=torch.float32):
    """mask * (B A alpha / rank), written out."""
    product = layer.lora_B.default.weight.to(dtype) @ layer.lora_A.default.weight.to(dtype) * (8.0 / 4)
    return product if mask is None else product * mask


def logits(model):
    ids = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def form_of(model):
    """Names and types of all modules, what the model holds besides, names and types of all tensors."""
    tensors = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return {name: type(module) for name, module in model.named_modules()}, sorted(vars(model)), tensors


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def held_out(subject):
    return [loss for _, loss in subject.details["training"][-1]["development"]]


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("qwen3", False)])
def test_what_was_trained_is_what_is_merged_and_zeros_stay(tiny_model, kind, tied):
    model = tiny_model(kind, tied)
    masks, before = pruned(model), bits_of(model)
    with adapted(model) as layers:
        assert len(layers) == 14
        deltas = {name: delta_of(layer, masks.get(name)).detach() for name, layer in layers.items()}
        trained = logits(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-5)
    assert (trained - logits(tiny_model(kind, tied).float())).abs().max() > 0.1, "the adapters did something"
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(weight, before[f"{name}.weight"].float() + delta, rtol=0, atol=1e-6)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any() and torch.equal(mask_of(model.get_submodule(name)), mask)


@pytest.mark.parametrize("name, masked", [("self_attn.q_proj", True), ("self_attn.v_proj", False), ("mlp.down_proj", True)])
def test_outputs_and_gradients_are_those_of_the_effective_weight(tiny_model, name, masked):
    model = tiny_model()
    mask = pruned(model).get(f"model.layers.0.{name}")
    assert (mask is not None) == masked
    with adapted(model) as layers:
        layer = layers[f"model.layers.0.{name}"]
        x, upstream = normal(3, 5, layer.in_features).requires_grad_(), normal(3, 5, layer.out_features, seed=1)
        given = (x, layer.lora_A.default.weight, layer.lora_B.default.weight)
        out = layer(x)
        found = torch.autograd.grad((out * upstream).sum(), given)
        x64, a, b = (one.detach().double().requires_grad_() for one in given)
        base = layer.get_base_layer()
        effective = base.weight.double() + (b @ a * 2.0 if mask is None else mask * (b @ a * 2.0))
        wanted = F.linear(x64, effective, None if base.bias is None else base.bias.double())
        for ours, theirs in zip(found, torch.autograd.grad((wanted * upstream.double()).sum(), (x64, a, b))):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_masked_product_is_in_fp32_under_autocast_too(tiny_model):
    model = tiny_model()
    masks = pruned(model)
    with adapted(model) as layers, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        name, mask = next(iter(masks.items()))
        assert layers[name].get_delta_weight("default").dtype == torch.float32
        assert layers[name](normal(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("then", [[], [RTN]])
def test_a_model_learns_and_stays_what_it_was(model_folder, step, then):
    subject = load(str(model_folder()))
    masks, attention = pruned(subject.model), subject.model.config._attn_implementation
    plain = compress(subject, [RTN]) if then else subject
    form, before, rotary = form_of(plain.model), bits_of(plain.model), plain.model.model.rotary_emb.inv_freq.clone()
    tuned = compress(plain, [step])
    assert held_out(tuned)[-1] < held_out(tuned)[0] - 0.1
    assert form_of(tuned.model) == form and tuned.model.config._attn_implementation == attention
    assert not tuned.model.training and not any(p.requires_grad for p in tuned.model.parameters())
    assert torch.equal(tuned.model.model.rotary_emb.inv_freq, rotary)
    for name, tensor in tuned.model.state_dict().items():
        learns = "_proj." in name and name.endswith((".weight", ".packed"))
        assert learns or torch.equal(tensor, before[name]), f"{name}: embedding, norms, biases and scales stay"
    for block in blocks_of(tuned.model):
        assert all(type(linear) is torch.nn.Linear for linear in linears_of(tuned.model, block).values()) or then
    for name, mask in masks.items():
        linear = tuned.model.get_submodule(name)
        weight = linear.compressed().dequantize() if then else linear.weight
        assert not weight[~mask].any() and weight[mask].any() and mask_of(linear) is not None


def test_the_record_says_what_learned(model_folder, step):
    tuned = compress(load(str(model_folder())), [step | {"tokens": 512, "targets": ["q_proj", "up_proj"]}])
    entry = tuned.details["training"][0]
    told = {name: entry[name] for name in ("way", "rank", "alpha", "targets", "trained_parameters")}
    size = 2 * 4 * ((64 + 64) + (64 + 128))  # blocks * rank * (in + out)
    targets = ["q_proj", "up_proj"]
    assert told == {"way": "lora", "rank": 4, "alpha": 8.0, "targets": targets, "trained_parameters": size}
    full = compress(load(str(model_folder())), [step | {"tokens": 512, "train": "full"}])
    entry, every = full.details["training"][0], sum(p.numel() for p in full.model.parameters())
    assert (entry["way"], entry["trained_parameters"]) == ("full", every) and "rank" not in entry


def test_linears_that_are_no_target_stay(model_folder, step):
    subject = load(str(model_folder()))
    before = bits_of(subject.model)
    tuned = compress(subject, [step | {"tokens": 2048, "targets": ["q_proj", "v_proj"]}])
    changed = {name for name, tensor in tuned.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{index}.self_attn.{one}_proj.weight" for index in (0, 1) for one in "qv"}


@pytest.mark.parametrize("bits, group_size, symmetric", [(2, 32, False), (4, 32, True), (8, None, False)])
def test_a_packed_layer_is_rounded_onto_its_own_grid(model_folder, bits, group_size, symmetric):
    rtn = {"pass": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}
    subject = load(str(model_folder()))
    masks = pruned(subject.model)
    model = compress(subject, [rtn]).model
    before, form = packed_layers(model), form_of(model)
    kept = {name: mask_of(layer) for name, layer in before.items()}  # a weight that was rounded to 0 counts as pruned
    with adapted(model, targets=["q_proj", "down_proj", "v_proj"]) as layers:
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        wanted = {n: l.get_base_layer().weight + delta_of(l, kept[n]) for n, l in layers.items()}
        assert len(layers) == 6 and not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert form_of(model)[0] == form[0] and form_of(model)[1] == form[1]
    for name, layer in packed_layers(model).items():
        old = before[name].compressed()
        if name not in wanted:
            assert layer is before[name]
            continue
        new = layer.compressed()
        assert type(layer) is type(before[name]) and layer.bias is before[name].bias and new.grid == old.grid
        assert torch.equal(new.scales, old.scales) and torch.equal(new.zeros, old.zeros)
        assert torch.equal(new.codes, round_to_grid(wanted[name].detach(), old.grid, old.scales, old.zeros).codes)
        assert (new.codes != old.codes).any()
        if name in masks:
            assert mask_of(layer) is not None and not new.dequantize()[~masks[name]].any()


def test_adapters_that_do_nothing_change_no_bit(model_folder):
    model = compress(load(str(model_folder())), [RTN]).model
    before = bits_of(model)
    with lora.trainable(model, finetune.Options(train="lora"), 0):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("loss, then", [("cross_entropy", []), ("distillation", [RTN])])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(model_folder, step, loss, then):
    recipe, state = [*then, step | {"tokens": 2048, "loss": loss}], torch.get_rng_state()
    runs = [compress(load(str(model_folder())), recipe, seed=seed) for seed in (0, 0, 1)]
    ours, same, others = (bits_of(subject.model) for subject in runs)
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert runs[0].details["training"][0]["curve"] == runs[1].details["training"][0]["curve"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_the_adapters(tiny_model):
    drawn = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        with adapted(tiny_model(), seed) as layers:
            drawn.append(torch.cat([layer.lora_A.default.weight.detach().flatten() for layer in layers.values()]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


ALL = "allowed: null for all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ["q_prj"]}, f"targets: 'q_prj' is no linear of the blocks (did you mean 'q_proj'?); {ALL}"),
        ({"targets": ["v_proj", "lm_head"]}, f"targets: 'lm_head' is no linear of the blocks; {ALL}"),
        ({"targets": []}, f"targets: [] names no linear; {ALL}"),
        ({"rank": 0}, "rank: 0 is not allowed; allowed: at least 1"),
        ({"alpha": 0.0}, "alpha: 0.0 is not allowed; allowed: more than 0"),
        ({"train": "lroa"}, f"train: 'lroa' is unknown (did you mean 'lora'?); allowed: {', '.join(WAYS)}"),
        (
            {"train": "full", "targets": ["q_proj"]},
            "targets: ['q_proj'] is not allowed with train: full; allowed: null, or train: lora",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(model_folder, step, changes, message):
    subject = load(str(model_folder()))
    before = bits_of(subject.model)
    with pytest.raises(UserError) as caught:
        compress(subject, [RTN, step | changes])
    assert str(caught.value) == f"recipe[1].{message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_a_model_has_its_modules_again_when_training_fails(model_folder, step, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    subject = compress(load(str(model_folder())), [RTN])
    form, before = form_of(subject.model), bits_of(subject.model)
    monkeypatch.setattr(finetune.Trainer, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(subject, [step])
    assert form_of(subject.model) == form
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())

"""What is wrong is said in one line that names file and tensor; finished blocks stay, checkpoints are never touched."""

import errno
import json
import os

import pytest
import torch
from driver import IDS
from safetensors.torch import load_file, save_file
from test_resume import hashes

from qlib import cli
from qlib.errors import UserError
from qlib.stream import files
from qlib.stream.run import stream

RTN = [{"pass": "rtn", "bits": 4, "group_size": 32}]
GPTQ = [{"pass": "gptq", "bits": 4, "group_size": 32}]
MANY = {"shard": "60KB", "num_hidden_layers": 3}


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        stream(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def full_disk(monkeypatch):
    """Let writing fail: ``full_disk("model-00003")`` where the file of that name is written."""

    def fail(begin, code=errno.ENOSPC):
        written = files.write_tensors

        def write(path, work, layout, pieces):
            def some():
                yield next(iter(pieces))
                raise OSError(code, os.strerror(code))

            return written(path, work, layout, some() if path.name.startswith(begin) else pieces)

        for module in ("blocks", "run"):
            monkeypatch.setattr(f"qlib.stream.{module}.write_tensors", write)

    return fail


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EROFS, errno.EACCES))
@pytest.mark.parametrize("begin", ("model-00003", "inputs-2", "model-00005"))
def test_what_cannot_be_written_is_said_and_what_was_is_kept(model_folder, tmp_path, full_disk, monkeypatch, begin, code):
    model, output = str(model_folder(**MANY)), tmp_path / "streamed"
    full_disk(begin, code)
    assert f"cannot be written ({os.strerror(code)}); finished blocks are kept" in refused(model, GPTQ, output, IDS)
    monkeypatch.undo()
    assert not [file for file in output.rglob("*.tmp")] and not (output / "config.json").exists()
    kept = [shard["file"] for shard in json.loads((output / "stream.json").read_text())["shards"]]
    assert len(kept) == (4 if begin == "model-00005" else 2)
    times = {name: (output / name).stat().st_mtime_ns for name in kept}
    stream(model, GPTQ, output, IDS)
    assert times == {name: (output / name).stat().st_mtime_ns for name in kept}
    stream(model, GPTQ, tmp_path / "whole", IDS)
    assert hashes(output) == hashes(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only(model_folder, tmp_path):
    (tmp_path / "streamed").mkdir(mode=0o555)
    assert "streamed: cannot be written (Permission denied)" in refused(str(model_folder()), RTN, tmp_path / "streamed")


def test_a_folder_below_a_file(model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    told = refused(str(model_folder()), RTN, tmp_path / "file" / "streamed")
    assert "streamed: cannot be written (Not a directory)" in told


def test_a_shard_that_breaks_half_way_is_named_and_whole_again_read(model_folder, tmp_path, full_disk, monkeypatch):
    model, output = model_folder(**MANY), tmp_path / "streamed"
    full_disk("model-00003")
    refused(str(model), GPTQ, output, IDS)
    monkeypatch.undo()
    weights = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    file, before = model / weights["model.layers.2.mlp.up_proj.weight"], hashes(output)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert f"{file}: is truncated" in refused(str(model), GPTQ, output, IDS)
    file.unlink()
    assert f"{file}: is missing although the index names it" in refused(str(model), GPTQ, output, IDS)
    assert hashes(output) == before
    file.write_bytes(whole)
    stream(str(model), GPTQ, output, IDS)
    stream(str(model), GPTQ, tmp_path / "whole", IDS)
    assert hashes(output) == hashes(tmp_path / "whole")


def test_a_shard_that_is_cut_off_while_it_is_read(model_folder, tmp_path, monkeypatch):
    model = model_folder(**MANY)
    weights = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    file = model / weights["model.layers.2.mlp.up_proj.weight"]

    def cut(*told):
        file.write_bytes(file.read_bytes()[:-100])
        monkeypatch.undo()
        return stream_one(*told)

    from qlib.stream import run

    stream_one = run._compress_one
    monkeypatch.setattr(run, "_compress_one", cut)
    assert f"{file}: is truncated" in refused(str(model), RTN, tmp_path / "streamed")
    assert len(list((tmp_path / "streamed").glob("model-*"))) == 3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensor: tensor[:-1].clone(), "has shape [127, 64], config.json asks for [128, 64]"),
        (lambda tensor: tensor.to(torch.int8), "is stored as I8; allowed: BF16, F16, F32"),
        (lambda tensor: tensor.clone().index_fill_(0, torch.tensor([3]), torch.nan), "holds values that are not finite"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(model_folder, tmp_path, capsys, change, words):
    model, name = model_folder(**MANY), "model.layers.1.mlp.up_proj.weight"
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file, {"format": "pt"})
    told = ["rtn-int4", "--model", str(model), "--output", str(tmp_path / "streamed"), "-p", "recipe.0.group_size=32"]
    assert cli.main(["stream", *told]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{file}: tensor '{name}' {words}")


def test_other_parameters_are_refused_and_say_what_differs(model_folder, tmp_path):
    model, output = str(model_folder(**MANY)), tmp_path / "streamed"
    stream(model, GPTQ, output, IDS)
    before = hashes(output)
    assert stream(model, GPTQ, output, IDS).complete and hashes(output) == before
    assert "recipe.0.bits: 4 -> 3;" in refused(model, [GPTQ[0] | {"bits": 3}], output, IDS)
    assert "recipe.0.damp: 0.01 -> 0.05;" in refused(model, [GPTQ[0] | {"damp": 0.05}], output, IDS)
    assert "seed: 0 -> 1;" in refused(model, GPTQ, output, IDS, seed=1)
    assert "calibration: " in refused(model, GPTQ, output, IDS[:1])
    assert "model: " in refused(str(model_folder(seed=1, name="other", **MANY)), GPTQ, output, IDS)
    assert hashes(output) == before


def test_a_finished_file_of_another_size_is_not_built_upon(model_folder, tmp_path, full_disk, monkeypatch):
    model, output = str(model_folder(**MANY)), tmp_path / "streamed"
    full_disk("model-00003")
    refused(model, RTN, output)
    monkeypatch.undo()
    file = output / "model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model-00002-of-00005.safetensors: has" in refused(model, RTN, output)
    file.unlink()
    assert "model-00002-of-00005.safetensors: is missing" in refused(model, RTN, output)


def test_folders_that_hold_something_else(model_folder, tmp_path):
    model = model_folder()
    before = hashes(model)
    assert "is there already and holds no stream.json" in refused(str(model), RTN, model)
    assert hashes(model) == before
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "stream.json").write_text("[]")
    assert "stream.json: is no manifest of a stream" in refused(str(model), RTN, tmp_path / "odd")


@pytest.mark.parametrize(
    "recipe, words",
    [
        ([RTN[0], {"pass": "finetune"}], "recipe[1]: pass 'finetune' works on the whole model"),
        ([{"pass": "width"}, *RTN], "recipe[0]: pass 'width' works on the whole model"),
        ([{"pass": "depth"}, *RTN], "recipe[0]: pass 'depth' works on the whole model"),
        ([{"pass": "rotate"}, *RTN], "recipe[0]: pass 'rotate' works on the whole model"),
        ([*RTN, {"pass": "ends"}], "recipe[1]: pass 'ends' works on the whole model"),
        ([*RTN, {"pass": "kv_cache"}], "recipe[1]: pass 'kv_cache' works on the whole model"),
        ([{"pass": "allocate_bits"}, *RTN], "recipe[0]: pass 'allocate_bits' plans on the whole model"),
        ([{"pass": "allocate_sparsity", "by": "magnitude"}, {"pass": "magnitude"}], "recipe[0]: pass 'allocate_sparsity' plans"),
        ([{"pass": "wanda"}, {"pass": "keep_ends"}, *RTN], "recipe[1]: pass 'keep_ends' plans on what passes before it leave"),
        ([{"pass": "keep_ends"}], "recipe: has no pass that changes weights"),
        ([{"pass": "rtn", "group_size": 128}], "128 does not divide the 64 input channels"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_streamed_are_refused_before_anything_runs(model_folder, tmp_path, recipe, words):
    assert words in refused(str(model_folder()), recipe, tmp_path / "streamed", IDS)
    assert not (tmp_path / "streamed").exists()


def test_a_packed_checkpoint_is_refused(model_folder, tmp_path):
    stream(str(model_folder()), RTN, tmp_path / "packed")
    assert "quant_method: 'qlib' cannot be streamed" in refused(str(tmp_path / "packed"), RTN, tmp_path / "again")


def test_the_command(model_folder, tmp_path, capsys):
    model, output = model_folder(**MANY), tmp_path / "streamed"
    told = ["--model", str(model), "--output", str(output), "-p", "recipe.0.group_size=32"]
    assert cli.main(["stream", "rtn-int4", *told]) == 0
    assert f"{output}: rtn-int4 of {model}" in capsys.readouterr().out
    assert cli.main(["stream", "rtn-int4", *told, "-p", "recipe.0.bits=3"]) == 2
    assert "recipe.0.bits: 4 -> 3" in capsys.readouterr().err
    assert cli.main(["stream", "rtn-in4", *told]) == 2
    assert "did you mean 'rtn-int4'?" in capsys.readouterr().err

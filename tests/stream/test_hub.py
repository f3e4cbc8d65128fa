"""A model of the hub becomes what the same folder would; few of its shards are ever on disk; a killed stream goes on."""

import json

import pytest
from driver import RECIPE
from gguf import GGUFReader
from safetensors.torch import load, load_file, save_file
from test_resume import hashes

RTN = [{"pass": "rtn", "bits": 4, "group_size": 32}]
GPTQ = [{"pass": "gptq", "bits": 4, "group_size": 32}]
SHARDS = {"shard": "80KB", "num_hidden_layers": 5}  # a block is in two shards at most
INDEX = "model.safetensors.index.json"


@pytest.fixture
def served(hub, model_folder, tmp_path):
    """A folder, and the same on the hub, watched: its id, its repository."""

    def make(*told, **options):
        folder = model_folder(*told, **SHARDS | options)
        return folder, *publish(hub, folder, tmp_path / "streamed")

    return make


def publish(hub, folder, output):
    name = f"owner/model-{len(hub.repositories)}"
    repository = hub.add(name, folder)
    repository.watched = output / ".stream" / "shards"
    return name, repository


def streamed(hub, model, output, recipe=GPTQ, **job):
    options = {name: job.pop(name) for name in ("seed", "mapped", "revision", "format") if name in job}
    return hub.run(stream={"model": model, "recipe": recipe, "output": output} | options, **job)


def without_manifest(folder):
    return {name: found for name, found in hashes(folder).items() if name != "stream.json"}


def in_order(folder, count=5, embedding=True):
    """The shards of a folder in the order in which a stream needs them."""
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    parts = ["model.embed_tokens."] * embedding + [f"model.layers.{index}." for index in range(count)]
    names = [name for part in [*parts, "model.norm.", "lm_head."] for name in weights if name.startswith(part)]
    return list(dict.fromkeys(weights[name] for name in names))


@pytest.mark.parametrize("kind, tied, mapped", [("qwen2", False, False), ("qwen3", True, True)])
def test_it_becomes_what_the_folder_would_and_few_shards_are_on_disk(hub, served, tmp_path, kind, tied, mapped):
    folder, name, repository = served(kind, tied=tied)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    repository.push(folder)
    code, text = streamed(hub, name, tmp_path / "streamed", mapped=mapped)
    assert code == 0, text
    fetched = repository.fetched()
    assert len(fetched) == len(set(fetched)) >= 5 and set(fetched) == set(in_order(folder))
    assert all(abs(fetched.index(file) - at) <= 1 for at, file in enumerate(in_order(folder)))  # a block's may be swapped
    assert 2 <= repository.on_disk <= 3
    first = [kind for kind, file in repository.asked if file.endswith(".safetensors") and kind != "head"]
    assert first[: len(fetched)] == ["header"] * len(fetched) and "header" not in first[len(fetched) :]
    assert (tmp_path / "streamed" / "chat_template.jinja").is_file()
    assert "shards, " in text and not (tmp_path / "streamed" / ".stream").exists()
    code, text = streamed(hub, folder, tmp_path / "local", mapped=mapped)
    assert code == 0, text
    assert without_manifest(tmp_path / "streamed") == without_manifest(tmp_path / "local")


@pytest.mark.parametrize("format", ("gptq", "compressed_tensors", "gguf"))
def test_every_format_is_what_the_folder_would_become(hub, served, tmp_path, format):
    folder, name, repository = served()
    for model, output in ((name, "streamed"), (folder, "local")):
        code, text = streamed(hub, model, tmp_path / output, format=format)
        assert code == 0, text
    assert repository.on_disk <= 3
    if format == "gguf":  # which holds the name of the model
        assert blocks_of(tmp_path / "streamed") == blocks_of(tmp_path / "local")
    else:
        assert without_manifest(tmp_path / "streamed") == without_manifest(tmp_path / "local")


def blocks_of(folder):
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(folder / "model.gguf").tensors}


def test_a_pass_that_plans_fetches_every_shard_once_more(hub, served, tmp_path):
    folder, name, repository = served()
    code, text = streamed(hub, name, tmp_path / "streamed", RECIPE[:2])
    assert code == 0, text
    fetched = repository.fetched()
    files = in_order(folder)
    assert all(fetched.count(file) == 2 for file in files[2:-1]) and len(fetched) <= 2 * len(files)
    assert repository.on_disk <= 3
    code, text = streamed(hub, folder, tmp_path / "local", RECIPE[:2])
    assert code == 0 and without_manifest(tmp_path / "streamed") == without_manifest(tmp_path / "local")


def test_killed_while_it_writes_and_while_it_fetches_it_goes_on_with_what_is_left(hub, served, tmp_path):
    folder, name, repository = served()
    assert streamed(hub, folder, tmp_path / "local")[0] == streamed(hub, name, tmp_path / "whole")[0] == 0
    output, pid, deaths = tmp_path / "streamed", tmp_path / "pid", 0
    order = in_order(folder)
    for trial in (("in", 0), ("in", 2), 12, 25, ("in", 4), 30, 0):
        finished = json.loads((output / "stream.json").read_text())["shards"] if (output / "stream.json").exists() else []
        repository.asked.clear()
        repository.faults.clear()
        if isinstance(trial, tuple):
            repository.faults[order[trial[1]]] = ("kill", 20_000, pid)
        code, text = streamed(hub, name, output, pid=pid, **({"die": trial} if isinstance(trial, int) and trial else {}))
        assert code in (0, -9), text
        deaths += code == -9
        needed = set(order) if not finished else set(needed_from(folder, len(finished) - 1))
        assert set(repository.fetched()) <= needed, (trial, finished)
    assert code == 0 and deaths >= 5 and repository.on_disk <= 3
    assert hashes(output) == hashes(tmp_path / "whole")
    assert without_manifest(output) == without_manifest(tmp_path / "local")


def needed_from(folder, block):
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    parts = [f"model.layers.{index}." for index in range(block, 5)] + ["model.norm.", "lm_head."]
    return [file for name, file in weights.items() if name.startswith(tuple(parts))]


def test_a_transfer_that_breaks_off_is_gone_on_with(hub, served, tmp_path):
    folder, name, repository = served()
    torn = in_order(folder)[2]
    repository.faults[torn] = ("cut", 50_000)
    code, text = streamed(hub, name, tmp_path / "streamed")
    assert code == 0, text
    assert [kind for kind, file in repository.asked if file == torn and kind in ("get", "rest")] == ["get", "rest"]


def test_a_shard_that_arrives_changed_is_refused_by_name(hub, served, tmp_path):
    folder, name, repository = served()
    file = in_order(folder)[3]
    repository.faults[file] = ("flip",)
    told = ["rtn-int4", "--model", name, "--output", tmp_path / "streamed", "-p", "recipe.0.group_size=32"]
    code, text = hub.run(command=["stream", *told])
    assert code == 2 and f"{name}/{file}: was not fetched as it is (" in text.splitlines()[-1], text
    assert "Traceback" not in text and not (repository.watched / file).exists()
    repository.faults.clear()
    assert hub.run(command=["stream", *told])[0] == 0


def test_what_the_headers_say_is_checked_before_any_shard_is_fetched(hub, served, tmp_path):
    folder, name, repository = served()
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    file = weights["model.layers.2.mlp.up_proj.weight"]
    whole, output = (folder / file).read_bytes(), tmp_path / "streamed"
    tensors = load(whole)

    def refused():
        repository.push(folder)
        code, text = streamed(hub, name, output, RTN)
        assert code == 2 and not repository.fetched() and not output.exists()
        return text.splitlines()[-1]

    (folder / file).write_bytes(whole[:-100])
    assert f"{name}/{file}: is truncated ({len(whole) - 100} of" in refused()
    (folder / file).write_bytes(whole[:100])
    assert f"{name}/{file}: is truncated" in refused()
    changed = {"model.layers.2.mlp.up_proj.weight": tensors["model.layers.2.mlp.up_proj.weight"][:-1].clone()}
    save_file(tensors | changed, folder / file, {"format": "pt"})
    assert f"{name}/{file}: tensor 'model.layers.2.mlp.up_proj.weight' has shape [127, 64]" in refused()
    (folder / file).unlink()
    assert f"{name}/{file}: is missing although the index names it" in refused()
    for one in folder.glob("*.safetensors*"):
        one.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert f"{name}: holds pickled weights only (pytorch_model.bin)" in refused()


def test_a_stream_goes_on_with_the_commit_that_it_was_begun_with(hub, served, tmp_path, model_folder):
    folder, name, repository = served()
    begun, output = repository.branches["main"], tmp_path / "streamed"
    assert streamed(hub, name, output, die=14)[0] == -9
    moved = repository.push(model_folder(seed=1, name="other", **SHARDS))
    repository.push(folder, "v1")
    assert "revision: 'v2' is not what" in (text := streamed(hub, name, output, revision="v2")[1])
    assert f"allowed: 'main' (commit {begun[:12]}), or another folder" in text
    code, text = streamed(hub, name, output)
    assert code == 0, text
    assert json.loads((output / "stream.json").read_text())["signature"]["model"]["commit"] == begun != moved
    assert streamed(hub, name, tmp_path / "tagged", revision="v1")[0] == 0
    assert without_manifest(output) == without_manifest(tmp_path / "tagged")
    assert streamed(hub, name, tmp_path / "new")[0] == 0
    assert without_manifest(output) != without_manifest(tmp_path / "new")
    assert f"revision: '{name}' has no 'v9'" in streamed(hub, name, tmp_path / "none", revision="v9")[1]
    assert "revision: 'v1' is not allowed" in streamed(hub, folder, tmp_path / "none", revision="v1")[1]
    assert not (tmp_path / "none").exists()


def test_what_the_cache_has_as_a_whole_is_read_there_without_network(hub, served, tmp_path):
    folder, name, repository = served()
    assert streamed(hub, name, tmp_path / "fetched")[0] == 0
    assert hub.run(cache=name)[0] == 0
    repository.asked.clear()
    code, text = streamed(hub, name, tmp_path / "streamed")
    assert code == 0 and "from the hub's cache" in text
    assert not repository.asked
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "fetched")


def test_a_tied_head_that_is_stored_must_be_the_embedding(hub, served, tmp_path):
    folder, name, repository = served(tied=True)
    index = json.loads((folder / INDEX).read_text())
    weights, head = index["weight_map"], "lm_head.weight"
    last = max(weights.values())
    embedding = load_file(folder / weights["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    tensors = load((folder / last).read_bytes())
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weights | {head: last}}))
    for wrong in (False, True):
        save_file(tensors | {head: embedding + wrong}, folder / last, {"format": "pt"})
        repository.push(folder)
        code, text = streamed(hub, name, tmp_path / f"streamed-{wrong}")
        assert code == 2 * wrong, text
    assert f"{last}: tensor '{head}' differs from 'model.embed_tokens.weight', to which config.json ties it" in text


def test_trouble_with_the_hub_is_said_in_one_line(hub, served, tmp_path):
    folder, name, repository = served()

    def refused(model, **job):
        told = ["rtn-int4", "--model", model, "--output", tmp_path / "streamed", "-p", "recipe.0.group_size=32"]
        code, text = hub.run(command=["stream", *told], **job)
        assert code == 2 and "Traceback" not in text, text
        return text.splitlines()[-1]

    assert "model: the hub has no 'owner/nothing', or it is private" in refused("owner/nothing")
    assert "model: 'owner/a--b': could not be fetched from the hub (" in refused("owner/a--b")
    file = in_order(folder)[2]
    assert f"{file}: cannot be written (No space left on device); finished blocks are kept" in refused(name, full=file)
    repository.gated = True
    assert f"model: '{name}' is gated: ask for access on its page of the hub, then `hf auth login`" in refused(name)
    hub.repositories[name] = None
    assert f"model: the hub has no '{name}'" in refused(name)


def test_no_network(hub, served, tmp_path):
    folder, name, repository = served()
    code, text = hub.run(offline=True, stream={"model": name, "recipe": RTN, "output": tmp_path / "streamed"})
    assert code == 2 and not repository.asked
    assert text.splitlines()[-1].startswith(f"model: '{name}': could not be fetched from the hub (")
    assert not (tmp_path / "streamed").exists()

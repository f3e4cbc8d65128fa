"""Which shards are on disk at any moment, whatever the order of the blocks, and what becomes of transfers that fail."""

import threading

import pytest

from qlib.errors import UserError
from qlib.stream.shards import Shards


class Repository:
    """Writes files instead of fetching them; `fails` holds how often a file cannot be had."""

    def __init__(self, names, fails=()):
        self.files, self.fails, self.fetched, self.most = dict.fromkeys(names), dict(fails), [], 0
        self.began, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def fetch(self, name, folder, bar):
        self.began.set()
        self.fetched.append(name)
        while not self.go_on.wait(0.01):
            bar(total=3).update(1)
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            raise UserError(f"{name}: cannot be had")
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        self.most = max(self.most, len(list(folder.iterdir())))


def run(shards, steps, each=None):
    shards.expect([(name, [shards.folder / file for file in files]) for name, files in steps])
    for name, files in steps:
        shards.need((name, [shards.folder / file for file in files]))
        assert all((shards.folder / file).exists() for file in files)
        if each:
            each(name)


@pytest.mark.parametrize(
    "files, most",
    [(["a", "a", "ab", "b", "bc", "c", "d"], 3), (["a", "b", "c", "d", "e"], 2), (["a", "a", "a"], 1), (["abc", "cd"], 4)],
)  # fmt: skip
def test_each_file_is_fetched_once_in_order_and_gone_when_it_was_read(tmp_path, files, most):
    repository = Repository(sorted(set("".join(files))))
    shards = Shards(repository, tmp_path / "shards")
    steps = [(str(number), list(names)) for number, names in enumerate(files)]

    def look(name):
        left = set("".join(files[int(name) :]))
        assert not [file for file in shards.folder.iterdir() if file.name not in left]

    run(shards, steps, look)
    shards.close()
    assert repository.fetched == sorted(repository.files) and repository.most <= most


def test_a_second_walk_fetches_again(tmp_path):
    repository = Repository("abc")
    shards = Shards(repository, tmp_path / "shards")
    run(shards, [(name, [name]) for name in "abcabc"])
    shards.close()
    assert repository.fetched == list("abcabc") and repository.most <= 2


def test_what_failed_ahead_is_tried_again_when_it_is_needed_and_then_told(tmp_path):
    repository = Repository("abc", {"b": 1, "c": 2})
    shards = Shards(repository, tmp_path / "shards")
    ended = lambda name: [one.exception() for one in shards.coming.values()]  # noqa: E731 (waits for what comes ahead)
    with pytest.raises(UserError, match="c: cannot be had"):
        run(shards, [(name, [name]) for name in "abc"], ended)
    shards.close()
    assert repository.fetched == list("abbcc")


def test_closing_ends_a_transfer_and_leaves_the_rest_of_a_killed_one_to_the_next_call(tmp_path):
    repository = Repository("ab")
    shards = Shards(repository, tmp_path / "shards")
    run(shards, [("a", ["a"])])
    repository.began.clear()
    repository.go_on.clear()
    shards.expect([("a", [shards.folder / "a"]), ("b", [shards.folder / "b"])])
    shards.need(("a", [shards.folder / "a"]))
    assert repository.began.wait(5)
    shards.close()  # comes back although the transfer would never end
    (shards.folder / "b.incomplete").touch()
    Shards(repository, shards.folder).expect([])
    assert [file.name for file in shards.folder.iterdir()] == ["a"]

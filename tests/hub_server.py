"""A server that speaks what huggingface_hub asks of the hub for models, records it, and can be told what goes wrong."""

import hashlib
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIECE = 4096


class Repository:
    """A model: the files of each commit, where its branches are, and what was asked.

    Attributes:
        asked: (kind, file) of every request: kind is "info", "head", "header" (a range at the begin), "get", "rest" (a range
            from the middle on). on_disk: how many shards lay in the folder `watched` at most while one was sent.
        faults: file -> ("cut", bytes after which the connection ends, once), ("flip",) for ever, or ("kill", bytes, file
            with the id of the process to kill, once).
    """

    def __init__(self, folder):
        self.commits, self.branches, self.asked, self.faults = {}, {}, [], {}
        self.gated, self.watched, self.on_disk = False, None, 0
        self.push(folder)

    def push(self, folder, branch="main"):
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        commit = hashlib.sha1("".join(sorted(f"{name}{sha256(data)}" for name, data in files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def fetched(self):
        """The shards of which content was sent, in order."""
        return [file for kind, file in self.asked if kind in ("get", "rest") and file.endswith(".safetensors")]

    def look(self):
        if self.watched and self.watched.is_dir():
            found = [*self.watched.glob("*.safetensors"), *self.watched.rglob("*.incomplete")]
            self.on_disk = max(self.on_disk, len(found))


class Hub(ThreadingHTTPServer):
    """Serves `repositories`, by their ids, at `address`, in threads of its own."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # large files come from another host
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, name, folder):
        self.repositories[name] = Repository(folder)
        return self.repositories[name]

    def handle_error(self, request, client_address):
        pass  # clients that are killed go away without a word


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *told):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 6 and parts[4] == "revision":
            return self.info("/".join(parts[2:4]), parts[5])
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if len(parts) > 4 and parts[0] == "lfs":
            return self.send_lfs("/".join(parts[1:3]), parts[3], "/".join(parts[4:]))
        self.refuse(404, "EntryNotFound")

    def find(self, name, revision):
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        return repository, commit

    def info(self, name, revision):
        if found := self.find(name, revision):
            repository, commit = found
            repository.asked.append(("info", revision))
            files = [
                {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
                | ({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}} if is_large(file) else {})
                for file, data in repository.commits[commit].items()
            ]
            self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": files}).encode())

    def resolve(self, name, revision, file):
        if not (found := self.find(name, revision)):
            return
        repository, commit = found
        if repository.gated:
            return self.refuse(401, "GatedRepo")
        if (data := repository.commits[commit].get(file)) is None:
            return self.refuse(404, "EntryNotFound")
        if self.command == "HEAD":
            repository.asked.append(("head", file))
        if not is_large(file):
            if self.command == "GET":
                repository.asked.append(("get", file))
            return self.answer(200, data, {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": commit})
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": len(data), "X-Repo-Commit": commit}
        self.answer(302, b"", linked | {"Location": f"{self.server.storage}/lfs/{name}/{commit}/{file}"})

    def send_lfs(self, name, commit, file):
        repository = self.server.repositories[name]
        data, fault = repository.commits[commit][file], repository.faults.get(file, ("",))
        whole, (begin, end) = len(data), self.asked_range(len(data))
        kind = "get" if "Range" not in self.headers else "rest" if begin > 8 else "header"
        repository.asked.append((kind, file))
        if begin >= whole:
            return self.answer(416, b"")
        if fault[0] == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        ranged = {"Content-Range": f"bytes {begin}-{end - 1}/{whole}"} if "Range" in self.headers else {}
        self.begin(206 if ranged else 200, end - begin, ranged)
        for at in range(begin, end, PIECE):
            if kind != "header":
                repository.look()
                if fault[0] in ("cut", "kill") and at + PIECE > fault[1]:
                    del repository.faults[file]
                    if fault[0] == "kill":
                        os.kill(int(Path(fault[2]).read_text()), signal.SIGKILL)
                    self.close_connection = True
                    return
            self.wfile.write(data[at : min(end, at + PIECE)])

    def asked_range(self, size):
        if "Range" not in self.headers:
            return 0, size
        begin, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(begin), min(size, int(last) + 1) if last else size

    def refuse(self, status, code):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status, body, headers=()):
        self.begin(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def begin(self, status, length, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": length, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()


def is_large(file):
    return file.endswith(".safetensors")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_hash(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

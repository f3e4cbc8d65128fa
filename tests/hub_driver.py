"""Stream models of a hub in children of this process, which knows the hub by HF_ENDPOINT: one job a line, as JSON.

A job is {"command": arguments of qlib} or {"stream": arguments of `stream`}, or {"cache": a hub id}; with "pid", a file
for the id of the child; with "die", the number of writes and renames after which it is killed; with "full", the name of a
file that the disk has no room for; with "offline", no hub can be reached. The answer is [exit code, what was printed].
"""

import errno
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, file_download, hf_hub_download

from qlib import cli
from qlib.errors import UserError
from qlib.models.load import locate
from qlib.recipe import read_recipe
from qlib.stream.run import stream
from qlib.stream.source import open_model

IDS = list(torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3)).split(4))


def work(job):
    constants.DOWNLOAD_CHUNK_SIZE = 4096  # so that something of a small file is there when a transfer breaks off
    if "pid" in job:
        Path(job["pid"]).write_text(str(os.getpid()))
    if "die" in job:
        sys.path.append(str(Path(__file__).parent / "stream"))
        from driver import die_at

        die_at(job["die"])
    if "full" in job:
        fetch = file_download.http_get

        def full(url, *told, **options):
            if job["full"] in url:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return fetch(url, *told, **options)

        file_download.http_get = full
    if "offline" in job:
        constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody listens
    if "cache" in job:
        for file in HfApi().model_info(job["cache"], revision="main").siblings:
            hf_hub_download(job["cache"], file.rfilename)
        return 0
    if "command" in job:
        return cli.main(job["command"])
    try:
        stream(**{"calibration": IDS} | job["stream"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def in_child(job):
    with tempfile.TemporaryFile("w+") as told:
        if not (child := os.fork()):
            code = 1
            try:
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
                warnings.simplefilter("ignore")
                code = work(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        return [code, told.read()]


if __name__ == "__main__":
    open_model(locate("reference"))  # what is imported here is there in every child
    read_recipe([{"pass": "allocate_sparsity"}, {"pass": "sparsegpt"}, {"pass": "gptq"}])
    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line))), flush=True)

"""Run streams in children of this process, which are killed where they write, or watched; told on the command line.

python driver.py killed MODEL OUTPUT POINTS: stream anew, killed at the first of the POINTS (comma-separated numbers of
    writes and renames), again killed at the next one, ... and at last to its end; prints how many children were killed.
python driver.py memory TINY MODEL ...: prints the bytes of anonymous memory that streaming took at its peak, for each
    MODEL; and for TINY and long text, with hidden states in memory and on disk. What is loaded once does not count.
"""

import os
import signal
import sys

import torch

from qlib.evaluate.memory import anonymous_bytes, track_peak
from qlib.stream import files
from qlib.stream.run import stream

IDS = list(torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3)).split(4))
RECIPE = [
    {"pass": "allocate_sparsity", "spread": 0.1, "far": 3.0},
    {"pass": "sparsegpt", "sparsity": 0.5},
    {"pass": "signround", "bits": 4, "group_size": 32, "iterations": 2},
]
LONG = [torch.full((8, 256), 7)] * 32
GPTQ = [{"pass": "gptq", "bits": 4, "group_size": 128}]


def die_at(point):
    """Kill this process without warning when it is about to write or rename for the `point`-th time."""
    left = point

    def count(what):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return what

    files.memoryview = lambda piece: count(memoryview(piece))
    sys.addaudithook(lambda event, args: count(None) if event == "os.rename" else None)


def in_child(work):
    """Whether the child ended by itself."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit("a child failed")
    return code == 0


def killed(model, output, points):
    def once(point, number):
        def work():
            if point:
                die_at(point)
            stream(model, RECIPE, output, IDS, seed=5, mapped=number % 2 == 1)

        return in_child(work)

    stream(model, RECIPE[:2], f"{output}-before", IDS)  # what is imported here is there in every child
    ended = [once(int(point), number) for number, point in enumerate(points.split(","))]
    if not ended[-1] and not once(0, 0):
        sys.exit("was killed without being told")
    print(ended.count(False))


def memory(*models):
    def watch(model, recipe, output, *told):
        before = anonymous_bytes()
        with track_peak(0.002) as peak:
            stream(model, recipe, output, *told)
        print(peak.bytes - before, flush=True)

    tiny, *larger = models
    stream(tiny, GPTQ, f"{tiny}-before", IDS)
    for model in larger:
        in_child(lambda: watch(model, GPTQ, f"{model}-streamed", IDS))
    for mapped in (False, True):
        in_child(lambda: watch(tiny, [{"pass": "wanda"}], f"{tiny}-{mapped}", LONG, 0, mapped))


if __name__ == "__main__":
    {"killed": killed, "memory": memory}[sys.argv[1]](*sys.argv[2:])

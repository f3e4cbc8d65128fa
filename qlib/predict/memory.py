"""Peak memory while compressing, as a sum of terms: what lies there all the time, and the most that any step adds.

The tables below say what a pass holds beside the block it works on. Whoever makes a pass take less changes them.
"""

import math
from dataclasses import dataclass

from qlib.blockwise import Step, reads, wants_targets
from qlib.compress import WALKED, stages
from qlib.evaluate.footprint import BF16
from qlib.predict.anatomy import Anatomy
from qlib.predict.counts import Text, Unpredicted
from qlib.predict.outcome import Outcome, after, start
from qlib.predict.sizes import held_bytes, model_bytes
from qlib.recipe import pass_name

__all__ = ["peak_terms", "WORK", "Work"]

FP32 = 4
#: Weights of linears that are solved as one, at most.
LARGE = 2**27
#: Scores among which the lowest are found at a time.
SLICE = 2**23
#: In a model in memory freed blocks of up to so many bytes stay in the process: larger ones do not find room there.
KEPT = 32 * 2**20
#: Numbers of each token that a block holds at once while it runs: residual, normed, queries, keys, values and what attention
#: makes of them, each as wide as a hidden state; in the FFN gate, its activation, up and product. Where freed memory is given
#: back, as streams do, about half of the former and all but one of the latter are there at the same time.
HIDDEN_STATES, FFN_STATES = 6, 4
HIDDEN_AT_ONCE, FFN_AT_ONCE = 3, 3


@dataclass(frozen=True)
class Work:
    """What a pass holds beside the weights of a block.

    Attributes:
        per_weight: bytes for each weight of what is solved at once.
        hessians: how many times the matrix of a group of linears, fp32 `[in, in]`, is there while it is worked on; every other
            group's is there once.
        inputs: bytes for each number of a batch of inputs that is fed.
        per_score: bytes for each of the scores that are sorted at a time.
        together: linears that read the same inputs are solved as one.
    """

    per_weight: int = 0
    hessians: int = 0
    inputs: int = 0
    per_score: int = 0
    together: bool = False


#: Name of a pass -> what it holds. gptq: errors and what moved in fp32, and codes; magnitude: scores are tied, as bf16 numbers are.
#: Set by the code and by runs of hidden size 512, 1024 and 2048; those of 768 and 1536 had no part in it.
WORK = {
    "rtn": Work(3), "hqq": Work(3), "magnitude": Work(31), "wanda": Work(10, per_score=14),
    "gptq": Work(9, 2, 4, together=True), "sparsegpt": Work(18, 2, 4), "joint": Work(12, 2, 4),
    "awq": Work(48, 1, inputs=16), "smooth": Work(8, inputs=4), "keep_ends": Work(), "kv_cache": Work(), "ends": Work(),
}  # fmt: skip


def peak_terms(anatomy: Anatomy, steps: list[Step], text: Text, process: int, streamed: bool = False) -> dict[str, int]:
    """Bytes by what they are for, at the moment of the recipe when they are most.

    Args:
        process: bytes before a model is there. streamed: by `qlib.stream`, with one block at a time in memory.

    Raises:
        Unpredicted: a pass that is not in `WORK`, or that a stream cannot do.
    """
    outcome, most = start(anatomy), {}
    whole = model_bytes(outcome)
    for group in stages(steps):
        for module, _ in group:
            if pass_name(module) not in WORK:
                raise Unpredicted(f"pass {pass_name(module)} has no count of what it holds")
            if streamed and module.SCOPE == "model":
                raise Unpredicted(f"pass {pass_name(module)} works on the whole model, which a stream never has")
        behind = outcome
        for module, options in group:
            behind = after(behind, module, options)
        terms = {"process": process, "model": whole}
        if group[0][0].SCOPE in WALKED:
            if streamed:
                terms |= {"model": outcome.anatomy.buffers, "block": BF16 * outcome.anatomy.linear_weights}
                terms["block as it is written"] = _written(behind)
            terms |= _walk(outcome.anatomy, group, text, 0 if streamed else KEPT)
        most = max(most, terms, key=lambda one: sum(one.values()))
        outcome = behind
    return most


def _written(behind: Outcome) -> int:
    """Tensors of the largest finished block: as they are held, and once more as they are stored."""
    linears = behind.anatomy.linears
    return max(sum(held_bytes(one, linears[name]) for name, one in block.items() if one.grid) for block in behind.held)


def _walk(anatomy: Anatomy, group: list[Step], text: Text, kept: int) -> dict[str, int]:
    """What passes over blocks hold: hidden states all the time, and the larger of what feeding and what solving takes.

    Args:
        kept: bytes up to which freed blocks are not given back.
    """
    works = [WORK[pass_name(module)] for module, _ in group]
    reading = [WORK[pass_name(module)] for module, options in group if reads(module, options)]
    matrices = [FP32 * anatomy.linears[names[0]][1] ** 2 for names in anatomy.groups]
    matrices = matrices if any(work.hessians for work in reading) else [0] * len(matrices)
    terms, feeding, left = {}, {}, 0
    if reading:
        hidden, ffn = anatomy.linears["mlp.down_proj"]
        terms["hidden states"] = BF16 * text.tokens * hidden * (3 if wants_targets(group) else 2)
        widest = text.batch * max(ffn, hidden) * max(one.inputs for one in reading)
        feeding = _feeding(BF16 * text.batch * hidden, BF16 * text.batch * ffn, widest, kept > 0)
        feeding["Hessians"] = sum(matrices)
        left = sum(size for size in (BF16 * text.batch * hidden,) * HIDDEN_STATES if size <= kept)
        left += sum(size for size in (BF16 * text.batch * ffn,) * FFN_STATES if size <= kept)
    solving = max((_solving(anatomy, works, matrices, place, left) for place in range(len(matrices))), key=_total)
    return terms | max(feeding, solving, key=_total)


def _feeding(hidden: int, ffn: int, inputs: int, kept: bool) -> dict[str, int]:
    """A batch on its way through a block.

    Args:
        hidden, ffn: bytes of its hidden states, and of one of the FFN's. inputs: of the widest in fp32.
        kept: freed blocks stay, so that what is there one after the other adds up.
    """
    if kept:
        return {"a batch in a block": HIDDEN_STATES * hidden + FFN_STATES * ffn, "its inputs in fp32": inputs}
    running = {"a batch in a block": HIDDEN_AT_ONCE * hidden + FFN_AT_ONCE * ffn}
    fed = {"a batch in a block": hidden + ffn, "its inputs in fp32": inputs}
    return max(running, fed, key=_total)


def _solving(anatomy: Anatomy, works: list[Work], matrices: list[int], place: int, left: int) -> dict[str, int]:
    """What solving one group of linears takes; matrices of the groups before it are gone.

    Args:
        left: bytes of freed blocks that are still there, where what is solved has room only if it is as small.
    """
    sizes = [math.prod(anatomy.linears[name]) for name in anatomy.groups[place]]
    together = all(work.together for work in works) and sum(sizes) <= LARGE
    weights = sum(sizes) if together else max(sizes)
    copies = max(work.hessians for work in works)
    found = {
        "numbers of the weights solved": weights * max(work.per_weight for work in works),
        "scores that are sorted": min(weights, SLICE) * max(work.per_score for work in works),
        "Hessians": sum(matrices[place:]),
        "Hessian being factorized": max(0, copies - 1) * matrices[place],
        "freed, not given back": left if FP32 * weights > KEPT else 0,
    }
    return {what: size for what, size in found.items() if size}


def _total(terms: dict[str, int]) -> int:
    return sum(terms.values())

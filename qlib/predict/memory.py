"""Peak memory while compressing, as a sum of terms: what lies there all the time, and the most that any step adds.

The tables below say what a pass holds beside the block it works on. Whoever makes a pass take less changes them.
"""

import math
from dataclasses import dataclass

from qlib.blockwise import Step, reads, wants_targets
from qlib.compress import WALKED, stages
from qlib.evaluate.footprint import BF16
from qlib.predict.anatomy import Anatomy
from qlib.predict.costs import Text, Unpredicted
from qlib.predict.outcome import Outcome, after, start
from qlib.predict.sizes import held_bytes, model_bytes
from qlib.recipe import pass_name

__all__ = ["peak_terms", "WORK", "Work"]

FP32 = 4
#: Weights of linears that are solved as one, or at a time, at most.
LARGE = 2**27
#: Numbers of each token that a block holds at once while it runs: hidden states, and in the FFN gate, its activation, up, product.
HIDDEN_STATES, FFN_STATES = 4, 4


@dataclass(frozen=True)
class Work:
    """What a pass holds beside the weights of a block.

    Attributes:
        per_weight: bytes for each weight of what is solved at once.
        hessians: how many times the matrix of a group of linears, fp32 `[in, in]`, is there while it is worked on; every other
            group's is there once.
        inputs: bytes for each number of a batch of inputs that is fed.
        together: linears that read the same inputs are solved as one.
    """

    per_weight: int = 0
    hessians: int = 0
    inputs: int = 0
    together: bool = False


#: Name of a pass -> what it holds. fp32 numbers of the columns that errors are handed on to: four times 4 bytes.
WORK = {
    "rtn": Work(12), "hqq": Work(12), "magnitude": Work(36), "wanda": Work(14),
    "gptq": Work(16, 2, 4, together=True), "sparsegpt": Work(20, 2, 4), "joint": Work(24, 2, 4),
    "awq": Work(32, 1, inputs=8), "smooth": Work(8, inputs=4), "keep_ends": Work(), "kv_cache": Work(), "ends": Work(),
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
            terms |= _walk(outcome.anatomy, group, text)
        most = max(most, terms, key=lambda one: sum(one.values()))
        outcome = behind
    return most


def _written(behind: Outcome) -> int:
    """Tensors of the largest finished block: as they are held, and once more as they are stored."""
    linears = behind.anatomy.linears
    return max(sum(held_bytes(one, linears[name]) for name, one in block.items() if one.grid) for block in behind.held)


def _walk(anatomy: Anatomy, group: list[Step], text: Text) -> dict[str, int]:
    """What passes over blocks hold: hidden states all the time, and the larger of what feeding and what solving takes."""
    reading = [WORK[pass_name(module)] for module, options in group if reads(module, options)]
    works = [WORK[pass_name(module)] for module, _ in group]
    hidden, ffn = anatomy.linears["mlp.down_proj"]
    matrices = [FP32 * anatomy.linears[names[0]][1] ** 2 for names in anatomy.groups]
    terms, feeding = {}, {}
    if reading:
        terms["hidden states"] = BF16 * text.tokens * hidden * (3 if wants_targets(group) else 2)
        feeding["a batch in a block"] = BF16 * text.batch * (HIDDEN_STATES * hidden + FFN_STATES * ffn)
        feeding["its inputs in fp32"] = text.batch * max(ffn, hidden) * max(one.inputs for one in reading)
    kept = any(work.hessians for work in reading)
    feeding["Hessians"] = sum(matrices) if kept else 0
    solving = max((_solving(anatomy, works, matrices if kept else [], place) for place in range(len(matrices))), key=_total)
    return terms | max(feeding, solving, key=_total)


def _solving(anatomy: Anatomy, works: list[Work], matrices: list[int], place: int) -> dict[str, int]:
    """What solving one group of linears takes; matrices of the groups before it are gone."""
    sizes = [math.prod(anatomy.linears[name]) for name in anatomy.groups[place]]
    together = all(work.together for work in works) and sum(sizes) <= LARGE
    weights = min(sum(sizes) if together else max(sizes), LARGE)
    copies = max(work.hessians for work in works)
    found = {"numbers of the weights solved": weights * max(work.per_weight for work in works)}
    if matrices:
        found |= {"Hessians": sum(matrices[place:]), "Hessian being factorized": (copies - 1) * matrices[place]}
    return found


def _total(terms: dict[str, int]) -> int:
    return sum(terms.values())

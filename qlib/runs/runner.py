"""Run what is out of date, one by one: baseline first, then strategies, lessons, speed; a failure stops no other."""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from qlib.errors import UserError
from qlib.params import SHAPES_ONLY, Strategy, expectation
from qlib.paths import write_atomic
from qlib.progress import clock
from qlib.runs.display import Line
from qlib.runs.estimate import Estimate, announce, estimate
from qlib.runs.execute import Outcome, cause_of, execute
from qlib.runs.injection import injected
from qlib.runs.lessons import is_lesson, reads
from qlib.runs.state import Busy, State, state_of

__all__ = ["Job", "run_all", "check_writable"]

#: The baseline is what others are compared with; a timing wants the machine for itself, after all else.
FIRST, LAST = "baseline", SHAPES_ONLY


@dataclass
class Job:
    """A strategy, or a lesson, and the file it was read from."""

    strategy: Strategy
    file: Path


def run_all(jobs: list[Job], root: Path, runs: Path, force: bool = False, limit: float | None = None) -> int:
    """Run every job that is not up to date.

    Returns:
        Exit code: 0 all are done, 1 at least one failed, 130 interrupted.

    Raises:
        UserError: before anything runs: a model or text that does not exist, parameters that the notebook does not
            take, a folder that cannot be written.
    """
    check_writable(runs)
    jobs = sorted(jobs, key=_order)
    waiting: list[tuple[Job, State]] = []
    for job, state in [(job, _state(job, root, runs)) for job in jobs]:
        if force or state.state != "done" or any(reads(job.strategy, other.strategy.family) for other, _ in waiting):
            waiting.append((job, state))
        else:
            _rename(job.strategy, state)
    _say(f"{_count(jobs, [job for job, _ in waiting])} to run" + ("" if waiting else ": all are up to date"))
    guesses = [estimate(j.strategy, s.record, root / "reports" / "published", expectation(j.file)) for j, s in waiting]
    for line in announce(guesses):
        _say(f"  {line}")
    ended: list[tuple[str, Outcome]] = []
    try:
        for (job, state), guess in zip(waiting, guesses):
            outcome = _run_one(job, root, runs, state, guess, limit, force)
            if outcome is not None:
                ended.append((job.strategy.name, outcome))
    except KeyboardInterrupt:
        _say(f"interrupted; {len(ended)} of {len(waiting)} had ended. The same command goes on from here.")
        return 130
    return _summary(ended)


def _order(job: Job) -> tuple[bool, bool, bool]:
    return (job.strategy.family in LAST, is_lesson(job.strategy), job.strategy.family != FIRST)


def _count(jobs: list[Job], waiting: list[Job]) -> str:
    """``2 of 3 strategies and 1 of 2 lessons``; what there are none of is not named."""
    told = []
    for kind, lessons in (("strategies", False), ("lessons", True)):
        some, every = (sum(is_lesson(job.strategy) == lessons for job in group) for group in (waiting, jobs))
        told += [f"{some} of {every} {kind}"] if every else []
    return " and ".join(told)


def _state(job: Job, root: Path, runs: Path) -> State:
    injected(job.strategy, root)
    try:
        return state_of(job.strategy, root, runs)
    except UserError as error:
        raise UserError(f"{job.strategy.name}: {error}") from None


def check_writable(folder: Path) -> None:
    """Make sure that results can be written before anything is computed.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another with --runs") from None


def _run_one(
    job: Job, root: Path, runs: Path, state: State, guess: Estimate, limit: float | None, force: bool
) -> Outcome | None:
    """Run one; None if it is a lesson and the strategies that ran before it changed no record that it reads."""
    strategy = job.strategy
    if is_lesson(strategy):
        try:
            state = _state(job, root, runs)
        except UserError as error:
            _say(str(error))
            return Outcome("failed", str(error), bad_input=True)
        if state.state == "done" and not force:
            _rename(strategy, state)
            return None
    line = Line(strategy.name, guess.seconds)
    why = f" ({'; '.join(state.why[:2])}{'; ...' if len(state.why) > 2 else ''})" if state.why else ""
    _say(f"{strategy.name}: running" + (f"; it was {state.state}{why}" if state.state != "never run" else ""))
    try:
        outcome = execute(strategy, root, runs, state.parts, limit, line.update)
    except Busy as busy:
        outcome = Outcome("failed", str(busy))
    except OSError as error:
        outcome = Outcome("failed", cause_of(error))
    took = clock(outcome.seconds)
    line.close(f"{strategy.name}: {outcome.state}" + (f" in {took}" if not outcome.cause else f": {outcome.cause}"))
    return outcome


def _rename(strategy: Strategy, state: State) -> None:
    """Title and tier are words: bring them up to date in a finished record without a run."""
    record, title = state.record or {}, asdict(strategy.title)
    if record.get("title") != title or record.get("tier") != strategy.tier:
        words = {"title": title, "tier": strategy.tier}
        record |= words | {"params": record["params"] | words}
        write_atomic(state.folder / "record.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _summary(ended: list[tuple[str, Outcome]]) -> int:
    """Say what went wrong, once and at the end; 2 if it was bad input and nothing else."""
    bad = [(name, outcome) for name, outcome in ended if outcome.state != "done"]
    for name, outcome in bad:
        if outcome.bad_input:  # told in one line when it ended
            continue
        where = f", cell {outcome.cell['index'] + 1} (id {outcome.cell['id']})" if outcome.cell else ""
        _say(f"\n{name}: {outcome.state}{where}: {outcome.cause}")
        for text in outcome.last_lines:
            _say(f"    {text}")
    if ended:
        _say(f"{len(ended) - len(bad)} done, {len(bad)} failed in {clock(sum(o.seconds for _, o in ended))}")
    return 0 if not bad else 2 if all(outcome.bad_input for _, outcome in bad) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""Case + path -> Verdict, in a worker: prepare, launch, check."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cases import Case, parse
from cases.contract import Judge, Operator, contract_of
from harness.bounds import OutOfBounds
from harness.checks import CheckPlugin, checks
from harness.checks._check import bits_differ
from harness.environment import environment
from harness.kernel_path import KernelPath
from harness.lanes import Lane
from harness.launch import Launch, PathFailure
from harness.memory import give_back, room_for
from harness.task import Task
from harness.verdict import CheckResult, Kind, Seconds, Status, Verdict, judged
from harness.watchdog import time_limit
from references.oracle import AGREEMENT, Outputs, Writes, oracles


class OracleConflict(Exception):
    """Two derivations of a reference disagree: no path can be judged by them."""


def judge_case(task: Task, path: KernelPath, lane: Lane, lock: Path) -> Verdict:
    """The verdict of one task. `lock` is the file that large cases of the lane take turns by."""
    case = parse(task.case)

    def ended(status: Status, kind: Kind, reason: str) -> Verdict:
        return Verdict(
            task.case,
            task.operator,
            task.path,
            task.lane,
            status,
            kind,
            reason,
            environment={**environment(lane), **path.libraries},
        )

    for step in range(len(case.steps)):
        unsupported = path.supports(case.one_step(step))
        if unsupported is not None:
            return ended(Status.SKIPPED, Kind.UNSUPPORTED, _in_step(unsupported, case, step))
    plugins = _plugins(task, contract_of(case), lane)
    again = any(plugin.relaunches or plugin.explains for plugin in plugins)
    launches = 1 + again + any(plugin.plays for plugin in plugins)
    with room_for(case, lane, share=task.memory_share, launches=launches, lock=lock) as too_large:
        if too_large is not None:
            return ended(Status.SKIPPED, Kind.TOO_LARGE, too_large)
        try:
            return _judge(task, case, path, lane, plugins)
        except (torch.OutOfMemoryError, MemoryError) as error:
            first_line = str(error).splitlines()[0] if str(error) else "no memory"
            return ended(Status.SKIPPED, Kind.TOO_LARGE, f"out of memory: {first_line}")
        except OracleConflict as error:
            return ended(Status.ERROR, Kind.ORACLE_CONFLICT, str(error))
        except PathFailure as error:
            return ended(Status.ERROR, Kind.CRASH, str(error))
        finally:
            give_back(lane)


def _judge(task: Task, case: Case, path: KernelPath, lane: Lane, plugins: Sequence[CheckPlugin]) -> Verdict:
    """Plays the steps in turn; a failing one is the last, for later ones would answer for its mistakes."""
    judgements: list[_Step] = []
    earlier: Launch | None = None
    for step in range(len(case.steps)):
        try:
            launch = Launch.prepare(case, path, lane, step, earlier)
            judgements.append(_judge_step(task, launch, plugins))
        except PathFailure as error:
            raise PathFailure(_in_step(str(error), case, step)) from error
        if judgements[-1].has_failed:
            break
        earlier = launch
    parts: dict[str, Any] = {
        "case": task.case,
        "operator": task.operator,
        "path": task.path,
        "lane": task.lane,
        "environment": {**environment(lane), **path.libraries},
        "inputs_digest": _joined([item.inputs_digest for item in judgements]),
        "outputs_digest": _joined([item.outputs_digest for item in judgements]),
        "seconds": Seconds(
            run=sum(item.run_seconds for item in judgements),
            oracle=sum(item.oracle_seconds for item in judgements),
        ),
    }
    return judged(parts, _summed_up(case, judgements))


@dataclass
class _Step:
    """What was found out about one step."""

    inputs_digest: str
    outputs_digest: str = ""
    run_seconds: float = 0.0
    oracle_seconds: float = 0.0
    results: list[CheckResult] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return any(result.status is Status.FAILED for result in self.results)


def _judge_step(task: Task, launch: Launch, plugins: Sequence[CheckPlugin]) -> _Step:
    step = _Step(launch.batch.digest())
    try:
        # The path first: no memory of this process holds a right answer while it runs.
        with time_limit(task.timeout):
            launch.run()
        step.outputs_digest = launch.outputs_digest()
        with time_limit(task.timeout * 10):
            for plugin in plugins:
                step.results += plugin.run(launch) if plugin.comes_first else ()
            # With inputs that the path has changed, an oracle would answer another question.
            if not step.has_failed:
                step.results += _compare(task, launch, plugins)
    except OutOfBounds as error:
        step.results.append(CheckResult("bounds", Status.FAILED, "", Kind.BOUNDS, str(error)))
    if step.has_failed:
        with time_limit(task.timeout * 10):
            for plugin in plugins:
                step.results += plugin.run(launch) if plugin.explains else ()
    step.run_seconds, step.oracle_seconds = launch.run_seconds, launch.oracle_seconds
    return step


def _in_step(sentence: str, case: Case, step: int) -> str:
    """A sentence that names its step where there are several."""
    return f"step {step}: {sentence}" if len(case.steps) > 1 else sentence


def _joined(digests: Sequence[str]) -> str:
    """The digest of a case from those of its steps."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _summed_up(case: Case, judgements: Sequence[_Step]) -> Iterator[CheckResult]:
    """One result of every check and tensor: the failure, or else the step that came nearest to one."""
    if len(case.steps) == 1:
        yield from judgements[0].results
        return
    nearest: dict[tuple[str, str], tuple[float, CheckResult]] = {}
    for step, judgement in enumerate(judgements):
        for result in judgement.results:
            key, share = (result.name, result.tensor), _share_of_budget(result)
            if key in nearest and share <= nearest[key][0]:
                continue
            where = replace(result.where, steps=str(step))
            reason = _in_step(result.reason, case, step) if result.reason else ""
            nearest[key] = (share, replace(result, where=where, reason=reason))
    yield from (result for _, result in nearest.values())


def _share_of_budget(result: CheckResult) -> float:
    """How near a result is to failing; infinite if it failed."""
    if result.status is Status.FAILED:
        return math.inf
    return result.error / result.budget if result.error is not None and result.budget else 0.0


def _compare(task: Task, launch: Launch, plugins: Sequence[CheckPlugin]) -> Iterator[CheckResult]:
    """The checks that may ask the oracle, once its derivations agree."""
    not_given = "the library does not give it"
    yield from (CheckResult("values", Status.SKIPPED, name, reason=not_given) for name in launch.path.omits)
    if task.both_oracles:
        for layer in range(len(launch.layers)):
            _require_agreement(launch, layer)
            yield from _external_agreement(launch, layer)
    for plugin in plugins:
        exempt = plugin.exemption(launch)
        if exempt is not None:
            yield CheckResult(plugin.name, Status.SKIPPED, reason=exempt)
        elif not plugin.comes_first and not plugin.explains:
            yield from plugin.run(launch)


def _plugins(task: Task, operator: Operator, lane: Lane) -> list[CheckPlugin]:
    """The checks of a task: the operator's, the lane's and those asked for, relaunching ones last."""
    return [
        plugin
        for plugin in checks().values()
        if plugin.applies(operator, lane.name) or (plugin.name in task.checks and lane.name in plugin.lanes)
    ]


def _require_agreement(launch: Launch, layer: int) -> None:
    """Raises OracleConflict unless definition and derivation agree."""
    first = launch.expected(layer, "definition")
    second = launch.expected(layer, "derivation")
    for spec in launch.operator.outputs:
        difference = _difference(first, second, spec.name, spec.judge)
        if not difference <= AGREEMENT:
            raise OracleConflict(
                f"the two references of {launch.operator.name} differ by {difference:.1e} in "
                f"{spec.name}, and {AGREEMENT:.0e} is allowed: no path was judged"
            )


def _external_agreement(launch: Launch, layer: int) -> Iterator[CheckResult]:
    """What an implementation by others says of the definition, where there is one that can.

    Raises OracleConflict where they disagree by more than its own precision explains.
    """
    for oracle in oracles():
        if oracle.operator != launch.operator.name or oracle.role != "external":
            continue
        lack = oracle.unavailable(launch.layers[layer].inputs)
        if lack is not None:
            yield CheckResult("oracle", Status.SKIPPED, oracle.name, reason=lack)
            continue
        theirs = launch.expected(layer, "external")
        ours = launch.expected(layer, "definition")
        for name in theirs:
            difference = _difference(ours, theirs, name, Judge.STAGE)
            if not difference <= oracle.agreement:
                raise OracleConflict(
                    f"{oracle.name} and the definition differ by {difference:.1e} in {name}, and "
                    f"{oracle.agreement:.0e} is allowed: no path was judged"
                )
            source = f"what {oracle.name} computes in float32"
            yield CheckResult(
                "oracle",
                Status.PASSED,
                name,
                error=difference,
                budget=oracle.agreement,
                budget_source=source,
            )


def _difference(first: Outputs, second: Outputs, name: str, judge: Judge | None) -> float:
    """Largest difference, relative to the largest value of the last axis; infinite if not comparable.

    A logarithm near 0 is compared absolutely, what is judged by its bits by its bits.
    """
    left, right = first[name], second[name]
    if isinstance(left, Writes) or isinstance(right, Writes):
        if not isinstance(left, Writes) or not isinstance(right, Writes):
            return float("inf")
        order_left, order_right = left.rows.cpu().argsort(), right.rows.cpu().argsort()
        if not torch.equal(left.rows.cpu()[order_left], right.rows.cpu()[order_right]):
            return float("inf")
        left, right = left.values.cpu()[order_left], right.values.cpu()[order_right]
    left, right = left.cpu(), right.cpu()
    if left.numel() == 0:
        return 0.0
    if judge in (Judge.EXACT, Judge.BITS):
        return 0.0 if left.dtype == right.dtype and not bool(bits_differ(left, right).any()) else float("inf")
    error = torch.where(left == right, 0.0, (left - right).abs()).nan_to_num(nan=torch.inf)
    scale = left.abs().nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    scale = scale.clamp_min(1.0) if judge is Judge.LSE else torch.where(scale == 0, 1.0, scale)
    return float((error / scale).max())

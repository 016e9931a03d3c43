"""What a wrong output looks like: the named faults of `references/faults/`, tried one after another.

A fault stands for a path's mistake where the outputs are, in every row, those that the definition gives with
the fault: where they are wrong and where they are right, within the budgets of the right answer. A small case
says little: many faults give it the same numbers. So the path is launched once more, on a twin: the case's
rows with others beside them, in a cache whose unread rows are 0. Poison makes faults show, but turns the
answers of most of them into the same NaN.

Where a path leaves its tensors there is no output to look like, but many faults would leave them, too, and
others not. What no answer can say is found by experiments (`harness/experiments.py`): launches that differ in
one thing, orders of threads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import Case, Kind, Row, RuleError, parse
from cases.blocks import blocks_needed
from cases.contract import Judge, contract_of
from cases.errors import CaseError
from harness.bounds import OutOfBounds, is_installed
from harness.checks._comparison import departs
from harness.checks._rows import PARTIAL
from harness.checks._stages import first_stage, stage_departs
from harness.experiments import WRITTEN_AS_DENSE, Experiment, orders, remedies, remedies_by_verdict
from harness.launch import Launch, PathFailure
from harness.task import Task
from harness.verdict import Status, Verdict
from references.faults import Answers, Fault, NotMade, Question, Unwritten, faults
from references.oracle import Inputs, Outputs, Writes, oracle_for

BESIDE = "hit:70+5,draft:100+6,idle,decode:511,paused:9,prefill:37,hit:64+66,decode:129"
"""Rows of the twin, behind the case's: every kind, lengths on both sides of blocks, tiles and windows."""

BESIDE_WITHOUT_CACHE = "prefill:37,idle,prefill:130"

MANY = ",prefill:530"
"""A row more where it costs nothing: of operators about no heads, whose programs have up to 512 tokens."""

BESIDE_A_MODEL = "prefill:9,idle,prefill:20"
"""Of a whole model, whose histories only earlier steps compute."""

PADDING = 3

SECONDS = 8.0
"""Of processor time faults are tried for so long on each launch; what was not tried then is told."""

SAMPLE = 8
"""Tokens of attention that each fault is tried on first; what explains them is tried on all."""

LEAST_HEADS, LEAST_TOPK = 3, 100
"""Heads and listed keys that a twin has at least."""

ROOM = 8
"""Blocks of a roomy twin's pool for each that its rows need."""

MOST_PAIRS = 1 << 24
"""Tokens times keys of the longest row beyond which no fault of attention is tried on all tokens."""

NEAREST = 3
"""Faults that are named where none explains everything."""

NEVER_WRITTEN = "never-written"
READ_AS_DENSE = "read-as-dense"


@dataclass(frozen=True)
class Explanation:
    """How far a fault explains a launch.

    Attributes:
        explained, failing: of the failing rows that were looked at, those that it gives as they are.
        broken: right rows that it does not give as they are.
        leaves: whether it would leave a tensor, where nobody watches: what is read there nobody knows.
        is_exact: whether it says of some elements that they hold the very bits they held before.
    """

    fault: Fault
    explained: int = 0
    failing: int = 0
    broken: int = 0
    leaves: bool = False
    is_exact: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left unexplained and nothing broken."""
        return self.explained == self.failing and not self.broken

    def text(self) -> str:
        """As a report says it."""
        form = f" ({self.fault.form})" if self.fault.form else ""
        spoils = f" and would break {self.broken:,} that are right" if self.broken else ""
        return f"{self.fault.name}{form} explains {self.explained:,} of {self.failing:,} failing rows{spoils}"


@dataclass(frozen=True)
class Diagnosis:
    """What was found out.

    Attributes:
        names: the faults that explain everything; else, the likeliest first, those that explain something.
        sure: whether the first, and it alone, explains everything.
        sentence: the same in words.
        explains: whether what is named explains all launches, with numbers where it is one of several.
    """

    names: tuple[str, ...]
    sure: bool
    sentence: str
    explains: bool = True


def diagnose(launch: Launch) -> Diagnosis:
    """Which faults explain what is wrong with a launch, even if it left its tensors and did not end.

    Launches the path again, but not on a GPU: a path that breaks its context would take what follows along.
    """
    known = [fault for fault in faults() if launch.operator.name in fault.operators]
    may_launch = launch.lane.device != "cuda"
    first = _evidence(launch)
    if first.failing:
        found = _by_faults(launch, known, [first, *(_twins(launch) if may_launch else ())])
    else:
        found = _unknown("the outputs are right: there is nothing to explain")
    if found.sure or not may_launch:
        return found
    by_order = orders(launch, _is_right)
    if by_order is not None and (by_order.is_sure or not found.names):
        return Diagnosis((by_order.name,), by_order.is_sure, by_order.sentence)
    return found if found.explains else _by_remedies(found, remedies(launch, _is_right))


def diagnose_crash(task: Task, judge: Callable[[Sequence[Task]], Iterable[Verdict]]) -> Diagnosis:
    """What explains a path that raised or ended its process with a case of one step: other cases.

    Args:
        judge: gives the verdicts of tasks, and outlives those that end their process.
    """

    def is_right(case: Case) -> bool:
        verdicts = list(judge([replace(task, case=str(case))]))
        return bool(verdicts) and all(verdict.status is Status.PASSED for verdict in verdicts)

    found = _unknown("unknown: the path does not come to its end")
    return _by_remedies(found, remedies_by_verdict(parse(task.case), is_right))


def _by_remedies(found: Diagnosis, helping: Sequence[Experiment]) -> Diagnosis:
    """What follows from the launches that are right, where faults do not explain everything."""
    names = tuple(remedy.name for remedy in helping)
    # Faults know that slices of wider tensors are read, experiments alone that some are written. A single
    # name that does not explain everything is one that another launch refutes.
    if names == (WRITTEN_AS_DENSE,) and READ_AS_DENSE in found.names and len(found.names) > 1:
        return replace(
            found,
            names=(READ_AS_DENSE,),
            sentence=f"likely {READ_AS_DENSE}: without slices of wider tensors the path is right, as in P17",
        )
    if len(helping) == 1:
        return Diagnosis(names, sure=False, sentence=f"likely {helping[0].sentence}")
    if helping:
        sentence = f"not sure: each of {', '.join(names)} gives all numbers where the case has it no more"
        return Diagnosis(names, sure=False, sentence=sentence)
    return found


def _by_faults(launch: Launch, known: Sequence[Fault], seen: Sequence[_Evidence | _Left]) -> Diagnosis:
    """Which faults explain what was seen."""
    if not known:
        return _unknown(f"unknown: no fault of {launch.operator.name} is known")
    trial = _Trial(_by_form(known))
    # Numbers say more than that there are none.
    for evidence in sorted(seen, key=lambda item: isinstance(item, _Left)):
        trial.try_on(evidence)
    return trial.conclusion()


def _by_form(known: Sequence[Fault]) -> list[Fault]:
    """One form of every name before the second of any: what there is no time for is another form."""
    seen = Counter[str]()
    places = []
    for fault in known:
        places.append(seen[fault.name])
        seen[fault.name] += 1
    return [fault for _, fault in sorted(zip(places, known, strict=True), key=lambda item: item[0])]


def _is_right(launch: Launch) -> bool:
    """Whether a launch that came to its end gave what it should."""
    return not _Evidence(launch).failing


def twin(
    case: Case,
    step: int = 0,
    *,
    roomy: bool = False,
    splits: int | None = None,
    strided: str = "0",
    pool: int | None = None,
) -> Case:
    """The case of one step with rows of every kind behind its own, in a cache that is 0 where none is read.

    Args:
        roomy: whether blocks are the first of many, so that what is found too far away is still in the cache.
        splits: into how many parts keys are divided; None leaves it to the path.
        strided: "1" for tensors that are slices of wider ones. They hide what is wrong with an order of rows
            and columns.
        pool: blocks of a cache so large that offsets in it are. Rows lie everywhere in it: whether offsets
            wrap, and how, is seen in some.

    Raises:
        RuleError: the rows do not fit together.
    """
    alone = case.one_step(step)
    taken = contract_of(case).options
    rows = [row for row in alone.steps[0] if row.is_slot]
    padding = sum(row.new for row in alone.steps[0] if not row.is_slot)
    beside = BESIDE if alone.options.table == "given" else BESIDE_WITHOUT_CACHE
    beside += "" if "heads" in taken else MANY
    beside = BESIDE_A_MODEL if contract_of(alone).is_stack else beside
    rows += parse(f"{case.operator}/{beside}").steps[0]
    rows.append(Row(Kind.PAD, new=max(padding, PADDING)))
    needed = max(blocks_needed((tuple(rows),), block_size) for block_size in alone.options.block)
    wanted: dict[str, object] = {
        "poison": "zero",
        "tail": "0",
        "strided": strided,
        "pool": pool,
        # With one key a token, or one head, most mistakes are the same.
        "heads": tuple(max(heads, LEAST_HEADS) for heads in alone.options.heads),
        "topk": alone.options.topk and max(alone.options.topk, LEAST_TOPK),
    }
    if splits is not None:
        wanted["splits"] = splits
    if pool is not None:
        wanted["pages"] = "shuffled"
    if roomy:
        wanted |= {"pages": "sequential", "pool": ROOM * needed}
    changes = {key: value for key, value in wanted.items() if key in taken}
    return replace(alone, steps=(tuple(rows),), options=replace(alone.options, **changes))  # type: ignore[arg-type]


def _unknown(sentence: str) -> Diagnosis:
    return Diagnosis((), sure=False, sentence=sentence, explains=False)


def _twins(launch: Launch) -> Iterator[_Evidence | _Left]:
    """The path launched on the case's twins: what it takes of them, and does not refuse at a launch.

    Where a twin leaves its tensors a roomier one may not; where one is right, its tensors may be at fault
    which are slices of wider ones.
    """
    pool = launch.case.options.pool
    if pool is not None and (large := _twin_evidence(launch, pool=pool)) is not None:
        yield large
    # Where nobody watches, what leaves a tensor does not end a launch: there is nothing to be learnt from it.
    for roomy in (False, True) if is_installed() else (True, False):
        evidence = _twin_evidence(launch, roomy=roomy)
        if evidence is None:
            return
        yield evidence
        if isinstance(evidence, _Left):
            continue
        if not evidence.failing and launch.case.options.strided != "0":
            sliced = _twin_evidence(launch, roomy=roomy, strided=launch.case.options.strided)
            if sliced is not None:
                yield sliced
        return


def _twin_evidence(
    launch: Launch, *, roomy: bool = False, strided: str = "0", pool: int | None = None
) -> _Evidence | _Left | None:
    """What the path makes of a twin; None where it does not take it, or refuses it."""
    splits = _splits(launch)
    try:
        case = twin(launch.case, launch.step, roomy=roomy, splits=splits, strided=strided, pool=pool)
        if launch.path.supports(case) is not None:
            return None
        launched = Launch.prepare(case, launch.path, launch.lane)
        with suppress(OutOfBounds):
            launched.run()
    except (CaseError, RuleError, PathFailure):
        return None
    return _evidence(launched)


def _splits(launch: Launch, index: int = 0) -> int | None:
    """Into how many splits a path divides keys; None where it has no workspace that says so."""
    buffer = launch.layers[index].workspace.get(PARTIAL)
    # [tokens, heads, splits], or [slots, KV heads, splits, query rows] of groups.
    return None if buffer is None else buffer.view.shape[2]


def _evidence(launch: Launch) -> _Evidence | _Left:
    """What a launch says, whether it came to its end or left its tensors."""
    return _Evidence(launch) if launch.has_ended else _Left(launch)


class _Evidence:
    """One launch that came to its end: where it is wrong, and what it was asked.

    Attributes:
        wrong: of every layer and judged output where it departs from the right answer; of a whole model the
            first stage that departs alone, for those behind it inherit.
        number: of that stage its layer.
        failing: how many rows are wrong, in all outputs and layers.
        sample: tokens that faults are tried on first; None where that is all of them.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.names = [spec.name for spec in launch.operator.outputs if spec.judge is not None]
        self.number = 0
        if launch.operator.is_stack:
            stage = first_stage(launch, 0)
            self.names, self.number = ([], 0) if stage is None else ([stage[0]], stage[1])
        self.wrong = [
            {name: self._departs(index, name, launch.expected(index)) for name in self.names}
            for index in range(len(launch.layers))
        ]
        self.failing = sum(int(_by_row(mask).sum()) for wrong in self.wrong for mask in wrong.values())
        self.sample = self._sample()
        self._questions = {
            sample: [_question(launch, index, sample) for index in range(len(launch.layers))]
            for sample in {None, self.sample}
        }

    def _departs(self, index: int, name: str, answers: Answers, tokens: Tensor | None = None) -> Tensor:
        """Where an output, or the stage that is looked at, departs from answers."""
        if not self.launch.operator.is_stack:
            return departs(self.launch, index, name, answers, tokens)
        answer = answers[name]
        if isinstance(answer, Unwritten):
            raise TypeError(f"a fault says of stage {name} what it is")
        return stage_departs(self.launch, index, name, self.number, answer)

    def _sample(self) -> frozenset[int] | None:
        """Some tokens, wrong ones and right ones, where attention has many."""
        tokens = self.launch.batch.metadata.tokens
        if tokens <= SAMPLE or not self.by_token:
            return None
        is_wrong = torch.zeros(tokens, dtype=torch.bool)
        for wrong in self.wrong:
            for name in self.by_token:
                is_wrong |= _by_row(wrong[name]).cpu()
        chosen: list[int] = []
        for group in (is_wrong, ~is_wrong):
            members = group.nonzero().flatten()
            step = max(1, -(-len(members) // (SAMPLE // 2)))
            chosen += members[::step].tolist()
        return frozenset(chosen)

    @property
    def by_token(self) -> list[str]:
        """Outputs of attention, which are computed token by token."""
        kinds = (Judge.ATTENTION, Judge.LAYER, Judge.LSE)
        return [spec.name for spec in self.launch.operator.outputs if spec.judge in kinds]

    def explanation(self, fault: Fault) -> Explanation | None:
        """How far a fault explains the launch; None where it cannot be made on it, though it is wrong."""
        found = self._measured(fault, self.sample)
        if found is not None and found.is_whole and self.sample is not None and not self.is_large:
            found = self._measured(fault, None)
        return found

    @property
    def is_large(self) -> bool:
        """Whether faults of attention are tried on the sample alone."""
        metadata = self.launch.batch.metadata
        longest = max((metadata.seq_lens_decoder + metadata.seq_lens_this_time).tolist(), default=0)
        return self.sample is not None and metadata.tokens * longest > MOST_PAIRS

    def _measured(self, fault: Fault, sample: frozenset[int] | None) -> Explanation | None:
        explained = failing = broken = 0
        is_made = is_exact = False
        for index, wrong in enumerate(self.wrong):
            try:
                with _large_ones_before(self.launch, index):
                    answers = fault.apply(self._questions[sample][index])
            except NotMade:
                answers = None
            except IndexError:
                return self._leaving(fault)
            is_made = is_made or answers is not None
            is_exact = is_exact or any(isinstance(item, Unwritten) for item in (answers or {}).values())
            for name in self.names:
                before = wrong[name]
                tokens = None
                if sample is not None and name in self.by_token:
                    tokens = torch.tensor(sorted(sample), device=before.device)
                    before = before[tokens]
                try:
                    after = before
                    if answers is not None and name in answers:
                        after = self._departs(index, name, answers, tokens)
                except IndexError:
                    return self._leaving(fault)
                before, after = _by_row(before), _by_row(after)
                failing += int(before.sum())
                explained += int((before & ~after).sum())
                broken += int((~before & after).sum())
        if not is_made and failing:
            return None
        return Explanation(fault, explained, failing, broken, is_exact=is_exact)

    def _leaving(self, fault: Fault) -> Explanation | None:
        """Of a fault that would leave a tensor: a launch that is watched has not, and a right one neither."""
        return None if is_installed() or not self.failing else Explanation(fault, leaves=True)

    def is_unwritten(self) -> bool:
        """Whether everything that is wrong holds the bits it was poisoned with."""
        pairs = [
            (mask, layer.outputs[name].holds_poison())
            for layer, wrong in zip(self.launch.layers, self.wrong, strict=True)
            for name, mask in wrong.items()
            if name not in self.launch.operator.in_place or bool(mask.any())
        ]
        return all(
            mask.shape == poison.shape[: mask.dim()] and not bool((mask & ~_all_of(poison, mask.dim())).any())
            for mask, poison in pairs
        )


class _Left:
    """One launch that left its tensors: faults explain it that would leave them on it, too.

    Attributes:
        failing: 1, as if the launch were a row.
        is_large: whether attention is tried on some tokens alone.
    """

    failing = 1
    is_large = False

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._questions = [_question(launch, index, self._sample()) for index in range(len(launch.layers))]

    def _sample(self) -> frozenset[int] | None:
        """The last tokens of the longest rows, which look farthest."""
        metadata = self.launch.batch.metadata
        if metadata.tokens <= SAMPLE:
            return None
        new = metadata.seq_lens_this_time
        rows = (new > 0).nonzero()[0]
        lengths = (metadata.seq_lens_decoder + new)[rows]
        longest = rows[(-lengths).argsort(kind="stable")][:SAMPLE]
        return frozenset((metadata.cu_seqlens_q[longest + 1] - 1).tolist())

    def explanation(self, fault: Fault) -> Explanation | None:
        """Whether a fault leaves its tensors here; None where it cannot be made."""
        is_made = False
        for layer, question in zip(self.launch.layers, self._questions, strict=True):
            try:
                answers = fault.apply(question)
                is_made = is_made or answers is not None
                for name, answer in (answers or {}).items():
                    if isinstance(answer, Writes) and name in layer.outputs:
                        _check_rows(answer.rows, layer.outputs[name].view)
            except NotMade:
                continue
            except IndexError:
                return Explanation(fault, explained=1, failing=1)
        return Explanation(fault, explained=0, failing=1) if is_made else None

    def is_unwritten(self) -> bool:
        """Nobody knows."""
        return False


def _check_rows(rows: Tensor, view: Tensor) -> None:
    """Raises IndexError if a tensor has not got these rows."""
    if bool(((rows < 0) | (rows >= view.numel() // max(1, view.shape[-1]))).any()):
        raise IndexError("rows outside of a tensor")


def _by_row(mask: Tensor) -> Tensor:
    """[n, ...] bool -> [n] bool: entries of the first axis with a departure in them."""
    return mask.flatten(1).any(1) if mask.dim() > 1 else mask


def _all_of(mask: Tensor, axes: int) -> Tensor:
    """Bool of the leading axes: where every element behind them is set."""
    behind = tuple(range(axes, mask.dim()))
    return mask.all(behind) if behind else mask


def _question(launch: Launch, index: int, sample: frozenset[int] | None) -> Question:
    """What a layer was asked, with tensors that are written in place as they were."""
    layer = launch.layers[index]
    inputs = dict(layer.question)
    for name in launch.operator.in_place:
        buffer = layer.outputs[name]
        if not buffer.sparse:
            after = buffer.snapshot()
            buffer.restore(layer.before[name])
            inputs[name] = buffer.view.clone()
            buffer.restore(after)
    if inputs.get("splits") is None:
        inputs["splits"] = _splits(launch, index)
    definition = oracle_for(launch.operator.name, "definition")

    def define(asked: Inputs) -> Outputs:
        return launch.expected(index) if asked is inputs else definition.run(asked, None)

    first = launch.layers[0].question if len(launch.layers) > 1 else {}
    return Question(launch.operator.name, inputs, define, sample, first=first)


@contextmanager
def _large_ones_before(launch: Launch, index: int) -> Iterator[None]:
    """Puts what a launch wrote into tensors that are too large to copy back as it was, meanwhile."""
    layer = launch.layers[index]
    names = [name for name in launch.operator.in_place if layer.outputs[name].sparse]
    written = {name: layer.outputs[name].snapshot() for name in names}
    for name in names:
        layer.outputs[name].restore(layer.before[name])
    try:
        yield
    finally:
        for name in names:
            layer.outputs[name].restore(written[name])


class _Trial:
    """Faults tried on one launch after another.

    Attributes:
        seen: the launches. found: of each how far faults explain it.
        left: faults that explain all of the launches, or of the last ones where nothing explains all.
        refuted: launches that those in `left` do not explain.
        untried: forms that there was no time for.
    """

    def __init__(self, known: Sequence[Fault]) -> None:
        self.known = known
        self.seen: list[_Evidence | _Left] = []
        self.found: list[list[Explanation]] = []
        self.left: list[Fault] = []
        self.refuted: list[_Evidence | _Left] = []
        self.untried = 0

    def try_on(self, evidence: _Evidence | _Left) -> None:
        """Tries what explains the launches before; all faults where none of that explains this one, too."""
        found = list(self._explanations(evidence, self.left))
        left = [item.fault for item in found if item.is_whole]
        # What changes nothing explains a right launch: that is no reason to name it.
        if not left and evidence.failing:
            others = [fault for fault in self.known if fault not in self.left]
            found += self._explanations(evidence, others)
            left = [item.fault for item in found if item.is_whole]
            # A row of a wider launch that leaves its tensors says less than numbers.
            if left and not (self.left and isinstance(evidence, _Left)):
                self.refuted += [item for item in self.seen if item.failing]
                self.left = left
            else:
                self.refuted.append(evidence)
        elif left:
            self.left = left
        elif self.left:
            self.refuted.append(evidence)
        self.seen.append(evidence)
        self.found.append(found)

    def _explanations(
        self, evidence: _Evidence | _Left, candidates: Sequence[Fault]
    ) -> Iterator[Explanation]:
        started = time.thread_time()
        for number, fault in enumerate(candidates):
            if time.thread_time() - started > SECONDS:
                self.untried += len(candidates) - number
                return
            explanation = evidence.explanation(fault)
            if explanation is not None:
                yield explanation

    def conclusion(self) -> Diagnosis:
        """What follows."""
        tried = len({fault.name for fault in self.known})
        late = f"; {self.untried} forms of them were not tried for want of time" if self.untried else ""
        late += f"; only {SAMPLE} tokens were looked at" if any(item.is_large for item in self.seen) else ""
        # What would leave its tensors, where nobody watches, contradicts nothing; it must explain something.
        explaining = [item for found in self.found for item in found if item.explained]
        left = [fault for fault in self.left if any(fault is item.fault for item in explaining)]
        # What holds the bits that it held was not computed, though a computed NaN is as good an answer.
        exact = [item.fault for item in explaining if item.is_exact]
        left = [fault for fault in left if fault in exact] or left
        names = tuple(dict.fromkeys(fault.name for fault in left))
        gives = self._gives()
        has_numbers = any(isinstance(item, _Evidence) and item.failing for item in self.seen)
        if len(names) == 1:
            fault = left[0]
            is_sure = has_numbers and not self.refuted and not late
            forms = list(dict.fromkeys(item.form for item in left))
            form = f" ({' or '.join(forms)})" if all(forms) else ""
            sentence = (
                f"{'' if is_sure else 'likely '}{fault.name}: {fault.summary}{form}, as in {fault.source}; "
                f"of {tried} faults it alone {gives}{late}"
            )
            return Diagnosis(names, is_sure, sentence, explains=not self.refuted)
        if names:
            sentence = f"not sure: each of {', '.join(names)} {gives}{late}"
            return Diagnosis(names, sure=False, sentence=sentence, explains=has_numbers and not self.refuted)
        if all(evidence.failing and evidence.is_unwritten() for evidence in self.seen):
            sentence = f"{NEVER_WRITTEN}: failing elements hold what they held before the launch{late}"
            # Poison that was read and handed on has the same bits; a twin has none to read.
            is_sure = len(self.seen) > 1
            return Diagnosis((NEVER_WRITTEN,), is_sure, sentence if is_sure else f"likely {sentence}")
        return self._nearest(tried, late)

    def _gives(self) -> str:
        """What faults that are left do, in words."""
        if all(isinstance(item, _Left) or not item.failing for item in self.seen):
            return "leaves its tensors where the path does"
        if self.seen[0] in self.refuted:
            return "gives all numbers of a wider launch, but not of this one"
        if self.refuted:
            return "gives all numbers of this launch, but not of a wider one"
        others = " and of a wider one" if len(self.seen) > 1 else ""
        return f"gives all numbers of this launch{others}"

    def _nearest(self, tried: int, late: str) -> Diagnosis:
        """The faults that explain most failing rows and break fewer right ones."""
        if isinstance(self.seen[0], _Left):
            return _unknown(
                f"unknown: the path left its tensors, and none of {tried} faults does where it does{late}"
            )
        ranked = sorted(self.found[0], key=lambda item: item.broken - item.explained)
        best = {item.fault.name: item for item in reversed(ranked)}
        near = sorted(best.values(), key=lambda item: item.broken - item.explained)
        near = [item for item in near if item.explained > item.broken][:NEAREST]
        if not near:
            return _unknown(
                f"unknown: none of {tried} faults explains a failing row without breaking others{late}"
            )
        told = "; ".join(item.text() for item in near)
        sentence = f"unknown: none of {tried} faults gives all numbers. The nearest: {told}{late}"
        names = tuple(item.fault.name for item in near)
        return Diagnosis(names, sure=False, sentence=sentence, explains=False)

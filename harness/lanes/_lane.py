"""`Lane`: where and how paths run. One file of this folder holds one lane and ends in `LANE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.coverage.collect import Collector


def _nothing() -> None:
    return None


def _nothing_to_tell(collector: Collector) -> None:
    return None


@dataclass(frozen=True)
class Lane:
    """One lane. A worker process belongs to one lane for its whole life.

    Attributes:
        name: as in `--lane`.
        device: torch's name of the device tensors live on.
        environment: variables a worker sets before it imports anything else; None removes one.
        unavailable: None, or one sentence why the lane cannot run here. Called in the worker.
        start: prepares the worker, after the environment is set and before paths are imported.
        synchronize: waits until the device has finished; raises what it has to report.
        measure: makes this worker's kernels tell a collector what of them ran. Called after `start`, and
            before paths are imported, if coverage is asked for.
    """

    name: str
    device: str
    unavailable: Callable[[], str | None]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    start: Callable[[], None] = _nothing
    synchronize: Callable[[], None] = _nothing
    measure: Callable[[Collector], None] = _nothing_to_tell

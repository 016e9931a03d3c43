"""The test process is a worker of lane `interpreted`: its environment, its repairs, its watch on pointers."""

import os

import pytest

from harness.lanes import lanes

LANE = lanes()["interpreted"]

# Triton reads TRITON_INTERPRET when it is imported, so before any test file is.
os.environ.update({name: value for name, value in LANE.environment.items() if value is not None})
if LANE.unavailable() is None:
    LANE.start()


@pytest.fixture(scope="session")
def lane():
    """The lane this process belongs to."""
    return LANE


@pytest.fixture(scope="session")
def make_batch():
    """Text -> the batch of its first step, on the host."""
    import torch

    from cases import parse
    from cases.contract import contract_of
    from harness.batch import materialise

    def make(text):
        case = parse(text)
        return materialise(case, contract_of(case), torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def launched(lane):
    """(text, path) -> a launch that has run."""
    from cases import parse
    from harness.launch import Launch

    def launch(text, path):
        prepared = Launch.prepare(parse(text), path, lane)
        prepared.run()
        return prepared

    return launch


@pytest.fixture(scope="session")
def failed_checks():
    """(launch, names) -> what each named check that fails says, by name."""
    from harness.checks import checks
    from harness.verdict import Status

    def failed(launch, names):
        results = [result for name in names for result in checks()[name].run(launch)]
        return {result.name: result for result in results if result.status is Status.FAILED}

    return failed

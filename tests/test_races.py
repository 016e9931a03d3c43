"""Check `races`: a kernel whose result depends on the order of its threads is caught, others are not."""

from pathlib import Path

import pytest

from harness.checks import checks
from harness.checks.races import FORWARD, RANDOM, REVERSE
from harness.cuda import build
from harness.kernel_path import KernelPath
from harness.paths.cuda import latent_cache_write, position_ids
from harness.verdict import Kind, Status

LACKS = build.lacking(build.HOST)
pytestmark = [
    pytest.mark.skipif(LACKS is not None, reason=str(LACKS)),
    pytest.mark.xdist_group("cuda-runtime"),
]

SOURCE = Path(position_ids.__file__).with_suffix(".cu")
RACES = """
#include "mla/launch.h"

namespace {

using namespace mla;

struct Words {
  int value[64];
  int turn;
};

// Where threads, warps or blocks depend on their order, by the number of tokens.
__global__ void place_tokens(const int* right, int* position_ids, int num_tokens) {
  Words& words = shared_memory<Words>();
  const int thread = threadIdx.x;
  switch (num_tokens) {
    case 1:
      words.value[thread] = thread;
      position_ids[0] = words.value[(thread + 1) % 64];
      break;
    case 2:
      atomicMax(position_ids + blockIdx.x % 2, 7);
      position_ids[0] = static_cast<int>(blockIdx.x);
      break;
    case 3:
      if (thread == 0) {
        words.turn = 1;
      }
      __syncwarp();
      if (thread == 40 && words.turn != 1) {
        return;
      }
      if (thread / 32 == 1) {
        __ballot_sync(0xffffffffu, true);  // waits for lane 8
        if (thread != 40 && words.turn != 1) {
          __syncwarp();
        }
      }
      position_ids[thread % 3] = 0;
      break;
    case 4:
      // Behind the last token, where a guard band is.
      position_ids[4] = thread;
      position_ids[thread % 4] = 0;
      break;
    default:
      position_ids[0] = 0;
  }
}

void launch_place_tokens(TensorView right, TensorView, TensorView, TensorView position_ids) {
  launch(position_ids, place_tokens, 2, 64, sizeof(Words), data<int>(right), data<int>(position_ids),
         position_ids.numel());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(place_tokens, launch_place_tokens)
"""


@pytest.fixture
def on_host(monkeypatch):
    """Makes this process one that runs CUDA paths on the processor; its schedules as (kind, seed)."""
    monkeypatch.setattr(build._Use, "target", build.HOST)
    monkeypatch.setattr(build._Use, "called", {})
    asked, set_schedule = [], build.set_schedule

    def recorded(kind, seed=0):
        asked.append((kind, seed))
        set_schedule(kind, seed)

    monkeypatch.setattr(build, "set_schedule", recorded)
    yield asked
    set_schedule(FORWARD)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    file = tmp_path_factory.mktemp("races") / "position_ids.cu"
    file.write_text(RACES)
    return file


def results(launch):
    return list(checks()["races"].run(launch))


@pytest.mark.parametrize(
    "text",
    [
        "latent_cache_write/hit:30+3,decode:15,idle,prefill:5,paused:9,pad:6/model=minicpm3-4b,block=16",
        "position_ids/draft:30+3,hit:64+17,prefill:5,decode:100,idle,paused:7,pad:3",
        "position_ids/",
    ],
)
def test_kernels_without_a_race_pass_under_every_schedule(text, on_host, launched):
    module = latent_cache_write if text.startswith("latent") else position_ids
    assert [result.status for result in results(launched(text, module.PATHS[0]))] == [Status.PASSED]
    assert on_host == [(REVERSE, 0), (RANDOM, 1), (RANDOM, 2), (FORWARD, 0)]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        pytest.param(1, "changes its bits when threads run in reverse: the kernel has a race", id="threads"),
        pytest.param(2, "changes its bits when threads run in reverse: the kernel has a race", id="blocks"),
        pytest.param(3, "when threads run in reverse, the path raised RuntimeError: deadlock", id="barrier"),
        pytest.param(4, "changes its bits when threads run in reverse: the kernel has a race", id="outside"),
    ],
)
def test_a_dependence_on_the_order_is_caught_and_the_schedule_restored(
    tokens, said, on_host, changed, launched
):
    with build.substituted(SOURCE, changed):
        launch = launched(f"position_ids/prefill:{tokens}", position_ids.PATHS[0])
        (found,) = results(launch)
    assert (found.status, found.kind) == (Status.FAILED, Kind.NONDETERMINISTIC)
    assert said in found.reason
    assert on_host[-1] == (FORWARD, 0)


def test_a_race_that_no_reverse_order_shows_is_caught_by_a_random_one(on_host, launched, monkeypatch):
    # Stands in for such a kernel: the third launch differs from those before.
    launches = []

    def run(inputs, outputs, workspace):
        launches.append(on_host[-1:])
        outputs["position_ids"].fill_(len(launches) >= 3)

    path = KernelPath("cuda/position_ids", "position_ids", ("host",), lambda _: None, run)
    (found,) = results(launched("position_ids/prefill:2", path))
    assert "in a random order, seed 1" in found.reason
    assert launches == [[], [(REVERSE, 0)], [(RANDOM, 1)]]


def test_outputs_are_poisoned_anew_before_every_launch(on_host, launched):
    def run(inputs, outputs, workspace):
        if not on_host:
            outputs["position_ids"].zero_()

    path = KernelPath("cuda/position_ids", "position_ids", ("host",), lambda _: None, run)
    (found,) = results(launched("position_ids/prefill:2", path))
    assert found.status is Status.FAILED


def test_a_path_of_another_family_is_not_asked(on_host, launched):
    path = KernelPath("paddle/position_ids", "position_ids", ("host",), lambda _: None, lambda *_: None)
    (found,) = results(launched("position_ids/decode:5", path))
    assert found.status is Status.SKIPPED
    assert on_host == []


def test_it_is_part_of_every_run_on_the_processor_alone():
    from cases.contract import operators

    for operator in operators().values():
        assert checks()["races"].applies(operator, "host")
        assert not checks()["races"].applies(operator, "compiled")

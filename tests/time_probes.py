"""Times mla_decode with probes and without, on a GPU; one JSON object a path, seconds.

Run by `test_gpu_coverage.py` in a process of its own. The times of one path are taken in turn, so that the
clocks of the device are the same for both.
"""

import json
import os
import statistics
import sys
from pathlib import Path

from harness.lanes import lanes

LANE = lanes()["compiled"]
os.environ.pop("TRITON_INTERPRET", None)

from cases import parse  # noqa: E402
from harness.coverage.collect import chosen_files  # noqa: E402
from harness.coverage.cuda import CudaProbes  # noqa: E402
from harness.coverage.probes import Probes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3


def main(text, *, with_lanes):
    """The medians of both paths, and of Triton's with lanes too if asked for."""
    from harness.bench import median_seconds
    from harness.cuda import build
    from harness.kernel_path import path_named
    from harness.launch import Launch

    LANE.start()
    measured = frozenset(chosen_files(ROOT, ["harness/*"]).files)
    # CUDA: a library without probes first, then one with.
    cuda = path_named("cuda/mla_decode")
    plain = Launch.prepare(parse(text), cuda, LANE)
    plain.run()
    cuda_probes = CudaProbes(measured)
    build.measure(cuda_probes)
    kernels = sys.modules["harness.paths.cuda.mla_decode"].KERNELS
    libraries = {False: dict(kernels._loaded), True: {}}
    kernels._loaded = libraries[True]
    plain.run()
    times = {False: [], True: []}
    for _ in range(ROUNDS):
        for has_probes, library in libraries.items():
            kernels._loaded = library
            times[has_probes].append(median_seconds(plain.enqueue))
    tell("cuda/mla_decode", times, cuda_probes)
    # Triton: probes are put in where kernels are decorated, and left out where they get no buffer.
    probes = Probes(measured, LANE.device, with_lanes=with_lanes)
    probes.install()
    launch = Launch.prepare(parse(text), path_named("triton/mla_decode"), LANE)
    times = {False: [], True: []}
    for _ in range(ROUNDS):
        for has_probes, found in times.items():
            probes.is_on = has_probes
            launch.run()
            found.append(median_seconds(launch.enqueue))
    tell("triton/mla_decode" + " with lanes" * with_lanes, times, probes)


def tell(path, times, probes):
    family, _, operator = path.partition(" ")[0].partition("/")
    if not any(
        Path(file).parts[-2:-1] == (family,) and operator in file and hit
        for file, hit in probes.take().items()
    ):
        raise RuntimeError(f"the probes of {path} tell nothing: what was timed has none")
    plain, probed = (statistics.median(times[has_probes]) for has_probes in (False, True))
    print(json.dumps({"path": path, "plain": plain, "probes": probed, "ratio": probed / plain}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], with_lanes="lanes" in sys.argv[2:])

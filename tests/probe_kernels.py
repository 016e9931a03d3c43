"""Runs cases on the Triton paths of their operators, interpreted; one JSON object tells what came of it.

Run by `test_coverage_probes.py` in a process of its own: `plain`, `traced` by coverage.py, or with `probes`.
"""

import json
import os
import sys
from pathlib import Path

from harness.lanes import lanes

LANE = lanes()["interpreted"]
os.environ.update({name: value for name, value in LANE.environment.items() if value is not None})

from cases import parse  # noqa: E402
from cases.discovery import discover  # noqa: E402
from harness.coverage.collect import Collector, chosen_files  # noqa: E402
from harness.coverage.probes import Probes  # noqa: E402
from harness.coverage.python_sites import python_file  # noqa: E402
from harness.coverage.recording import Recording  # noqa: E402
from harness.coverage.sites import text_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "harness" / "paths" / "triton"


def main(mode, texts):
    """Digests of the outputs, and the sites hit in kernels."""
    from harness.launch import Launch

    measure = chosen_files(ROOT, ["harness/paths/triton/*"])
    collector = Collector(measure)
    if mode == "traced":
        collector.start()
    LANE.start()
    if mode == "traced":
        collector.watch_interpreter()
    probes = Probes(collector.files, "cpu")
    if mode == "probes":
        probes.install_in_interpreter()
    modules = discover("harness.paths.triton", KERNELS, "PATHS")
    paths = [path for module in modules if module.reason is None for path in module.value]
    digests = {}
    for case in map(parse, texts):
        for path in paths:
            # The path that bears the operator's name; others launch the same kernels.
            if path.name == f"triton/{case.operator}" and path.supports(case) is None:
                launch = Launch.prepare(case, path, LANE)
                launch.run()
                digests[f"{case} {path.name}"] = launch.outputs_digest()
    hits = probes.take() if mode == "probes" else traced_hits(collector, measure) if mode == "traced" else {}
    sites = {
        Path(file).name: sorted([*site] for site in map(tuple_of, found)) for file, found in hits.items()
    }
    return {"digests": digests, "sites": {name: found for name, found in sites.items() if found}}


def traced_hits(collector, measure):
    """What coverage.py and the interpreter tell of kernels."""
    recording = Recording(measure)
    recording.add(collector.stop(), LANE.name)
    files = recording.coverage().files
    kernels = {name: python_file(text_of(ROOT / name)).kernels for name in files}
    return {
        name: {site for site, hits in file.sites.items() if hits.count and site.function in kernels[name]}
        for name, file in files.items()
    }


def tuple_of(site):
    return (site.first, site.last, site.kind.value, site.label, site.column, site.function)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))

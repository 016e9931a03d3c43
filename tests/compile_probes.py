"""Compiles Triton kernels for compute capability 9.0, which need not be there, plain or with probes.

Run by `test_coverage_probes.py` in a process of its own, without TRITON_INTERPRET: one JSON object a
compilation. `plain` has no probes; `probes` has them and compiles twice: `elided` gives no buffer, `flags`
gives one.
"""

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODE, NAMES, *ARGUMENTS = sys.argv[1:]
MODES = ("plain",) if MODE == "plain" else ("elided", "flags")
if MODE != "plain":
    from harness.coverage.probes import Probes

    FILES = {str(file) for file in (ROOT / "harness" / "paths" / "triton").glob("*.py")}
    Probes(FILES, "cpu").install()

sys.path.insert(0, str(ROOT / "tests"))

import compile_kernels  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from harness.coverage.probes import FLAGS  # noqa: E402


def compiled(kernel, dtype, constants, **options):
    """What became of a kernel in each mode, nothing where its name is not asked for."""
    if not fnmatchcase(kernel.__name__, NAMES):
        return []
    return [compiled_as(mode, kernel, dtype, constants, **options) for mode in MODES]


def compiled_as(mode, kernel, dtype, constants, **options):
    """What became of a kernel."""
    names = [parameter.name for parameter in kernel.params]
    assert (FLAGS in names) == (mode != "plain")
    signature = {name: compile_kernels.type_of(name, dtype) for name in names}
    if mode == "elided":
        signature[FLAGS], constants = "constexpr", {**constants, FLAGS: None}
    if mode == "flags":
        signature[FLAGS] = "*u8"
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin_bytes = len(binary.asm["cubin"])
    return {"kernel": kernel.__name__, "mode": mode, "ptx": binary.asm["ptx"], "cubin_bytes": cubin_bytes}


if __name__ == "__main__":
    compile_kernels.compiled = compiled
    rank, rope, model_dtype, *heads = ARGUMENTS
    for results in compile_kernels.main(int(rank), int(rope), model_dtype, [int(count) for count in heads]):
        for result in results:
            print(json.dumps(result), flush=True)

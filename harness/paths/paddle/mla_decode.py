"""Absorbed MLA decode attention on Paddle tensors: the kernels of `harness/paths/triton/mla_decode.py`.

`mla_decode` is what an engine built on Paddle calls. Its arguments are those of the launcher it wraps, named,
shaped, typed and strided as that file's docstring has them, with Paddle tensors in place of torch's; the
number of splits comes from `harness/paths/_splits.py`, as that file's `partial_results` and `run` show.

Launches on Paddle's current stream and returns. Copies nothing, allocates nothing on the device, does not
wait for it. Paddle tensors may be strided wherever the kernels let a stride be free. Not verified with Paddle
on a GPU: see `_bridge.py` for what that leaves open.

Not: gradients, nor what the kernels leave out.
"""

from __future__ import annotations

from harness.kernel_path import KernelPath
from harness.paths.paddle._bridge import LANES, from_torch, on_paddle
from harness.paths.triton import mla_decode as kernels

mla_decode = on_paddle(kernels.mla_decode)
run = from_torch(on_paddle(kernels.run))

PATHS = (
    KernelPath(
        name="paddle/mla_decode",
        operator="mla_decode",
        lanes=LANES,
        supports=kernels.supports,
        run=run,
        workspace=kernels.workspace,
    ),
)

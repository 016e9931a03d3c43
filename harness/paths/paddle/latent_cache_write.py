"""New latents and keys into a paged cache of Paddle's, with `harness/paths/triton/latent_cache_write.py`.

`latent_cache_write` is what an engine built on Paddle calls. Its arguments are those of the launcher it
wraps, named, shaped, typed and strided as that file's docstring has them, with Paddle tensors in place of
torch's.

Launches on Paddle's current stream and returns. Copies nothing, allocates nothing on the device, does not
wait for it. Not verified with Paddle on a GPU: see `_bridge.py` for what that leaves open.

Not: gradients, nor what the kernel leaves out.
"""

from __future__ import annotations

from harness.kernel_path import KernelPath
from harness.paths.paddle._bridge import LANES, from_torch, on_paddle
from harness.paths.triton import latent_cache_write as kernels

latent_cache_write = on_paddle(kernels.latent_cache_write)
run = from_torch(on_paddle(kernels.run))

PATHS = (
    KernelPath(
        name="paddle/latent_cache_write",
        operator="latent_cache_write",
        lanes=LANES,
        supports=kernels.supports,
        run=run,
        batch_invariant=True,
    ),
)

"""What a cache manager allocates for layers that differ, on the device and on the host.

    from harness.conformance.facts import findings
    from harness.conformance.manager_caches import FACTS

    def make(request):                      # an engine's manager as a `CacheManager`
        ...

    for finding in findings(make, FACTS):
        assert finding.reason is None, finding

A manager says what it has allocated as a mapping from (name, layer) to something with `shape`, `dtype` (as
torch or Paddle name it, or as text) and `nbytes`, as tensors have them. A host buffer without a shape of its
own, which some engines keep as an address and a size, has the shape None; its bytes and items still count.

Source: FastDeploy's V1 cache manager, P6, and its bugs B59 to B62; section 3.3 for packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cases.cache_layout import ITEM_BYTES
from cases.layers import Layer, resolve_layers
from cases.manager_caches import Allocation, CacheKey, device_caches, host_caches, total_bytes
from cases.options import Options
from harness.conformance.facts import Fact

Allocated = Mapping[CacheKey, Any]
"""What a manager has allocated, by name and layer."""


@dataclass(frozen=True)
class CacheRequest:
    """What a manager is made for.

    Attributes:
        options: model, layers, windows, caches, block sizes and dtype, as of a case.
        num_blocks, num_host_blocks: blocks a layer on the device and on the host.
        layer_offset: number in the whole model of the pipeline stage's first layer.
    """

    options: Options
    num_blocks: int = 5
    num_host_blocks: int = 3
    layer_offset: int = 0

    def __str__(self) -> str:
        return (
            f"{','.join(self.options.texts())}: {self.num_blocks} blocks, {self.num_host_blocks} on the "
            f"host, layers from {self.layer_offset} on"
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The stage's layers."""
        return resolve_layers(self.options)

    @property
    def on_device(self) -> dict[CacheKey, Allocation]:
        """What must be allocated on the device."""
        return device_caches(self.layers, self.num_blocks, self.layer_offset)

    @property
    def on_host(self) -> dict[CacheKey, Allocation]:
        """What must be allocated on the host."""
        return host_caches(self.layers, self.num_host_blocks, self.layer_offset)


class CacheManager(Protocol):
    """An engine's object that allocates the caches of one stage."""

    def create_kv_cache(self) -> Allocated:
        """The tensors on the device."""
        ...

    def create_host_kv_cache(self) -> Allocated:
        """The buffers on the host."""
        ...


Make = Callable[[CacheRequest], CacheManager]

FULL = CacheRequest(Options(layers=3))
SLIDING = CacheRequest(Options(layers=3, cache=("packed",), window=(513,)))
MIXED = CacheRequest(Options(layers=4, window=(0, 128, 128, 0), cache=("same", "packed", "packed", "same")))
"""Full, sliding, sliding, full: rows of 576 bf16 numbers and of 656 bytes (L33)."""
OTHER_BLOCKS = CacheRequest(
    Options(layers=3, window=(128, 0, 128), cache=("packed", "same", "packed"), block=(32, 64, 16))
)
SECOND_STAGE = CacheRequest(MIXED.options, layer_offset=4)
INDEXED = CacheRequest(Options(model="deepseek-v3.2", layers=2, cache=("packed",)))
NO_HOST = CacheRequest(MIXED.options, num_host_blocks=0)

EVERY = (FULL, SLIDING, MIXED, OTHER_BLOCKS, SECOND_STAGE, INDEXED, NO_HOST)


def _pairs(make: Make, request: CacheRequest) -> Iterator[tuple[str, CacheKey, Any, Allocation]]:
    """Where, key, what is allocated and what must be, of every tensor that is there as it must be."""
    manager = make(request)
    for where, got, wanted in (
        ("the device", manager.create_kv_cache(), request.on_device),
        ("the host", manager.create_host_kv_cache(), request.on_host),
    ):
        for key, allocation in wanted.items():
            if key in got:
                yield where, key, got[key], allocation


def _names(make: Make, request: CacheRequest) -> str | None:
    """Every layer's tensors are there, by the number that the layer has in the whole model."""
    manager = make(request)
    for where, got, wanted in (
        ("the device", manager.create_kv_cache(), request.on_device),
        ("the host", manager.create_host_kv_cache(), request.on_host),
    ):
        missing = [key for key in wanted if key not in got]
        if missing:
            return f"{where} has no {missing[0]}: it has {sorted(map(str, got))}"
    return None


def _no_others(make: Make, request: CacheRequest) -> str | None:
    """Nothing else is allocated: values of latent layers are their latents."""
    manager = make(request)
    for where, got, wanted in (
        ("the device", manager.create_kv_cache(), request.on_device),
        ("the host", manager.create_host_kv_cache(), request.on_host),
    ):
        others = [key for key in got if key not in wanted]
        if others:
            return f"{where} has a {others[0]}, which no latent layer needs"
    return None


def _shapes(make: Make, request: CacheRequest) -> str | None:
    """Every tensor has its own layer's rows and blocks."""
    for where, key, got, wanted in _pairs(make, request):
        if got.shape is not None and tuple(got.shape) != wanted.shape:
            return f"{key} on {where} must be {list(wanted.shape)}, got {list(got.shape)}"
    return None


def _dtypes(make: Make, request: CacheRequest) -> str | None:
    """Packed rows are bytes, others numbers of the model dtype."""
    for where, key, got, wanted in _pairs(make, request):
        if _dtype_name(got.dtype) != wanted.dtype:
            return f"{key} on {where} must be {wanted.dtype}, got {_dtype_name(got.dtype)}"
    return None


def _bytes(make: Make, request: CacheRequest) -> str | None:
    """Every tensor takes what its blocks take."""
    for where, key, got, wanted in _pairs(make, request):
        if int(got.nbytes) != wanted.bytes:
            return f"{key} on {where} must take {wanted.bytes:,} bytes, got {int(got.nbytes):,}"
    return None


def _blocks_swap(make: Make, request: CacheRequest) -> str | None:
    """A block of the host holds a block of the device: as many bytes, of items of the same size."""
    manager = make(request)
    device, host = manager.create_kv_cache(), manager.create_host_kv_cache()
    for key in request.on_device:
        if key not in device or key not in host or not request.num_host_blocks:
            continue
        there, here = int(device[key].nbytes), int(host[key].nbytes)
        if there * request.num_host_blocks != here * request.num_blocks:
            return (
                f"a block of {key} has {there / request.num_blocks:,.0f} bytes on the device and "
                f"{here / request.num_host_blocks:,.0f} on the host"
            )
        sizes = [ITEM_BYTES.get(_dtype_name(cache[key].dtype)) for cache in (device, host)]
        if sizes[0] != sizes[1]:
            return f"an item of {key} has {sizes[0]} bytes on the device and {sizes[1]} on the host"
    return None


def _total(make: Make, request: CacheRequest) -> str | None:
    """All tensors of the device together take what the stage is counted with."""
    got = sum(int(tensor.nbytes) for tensor in make(request).create_kv_cache().values())
    wanted = total_bytes(request.on_device)
    return None if got == wanted else f"the device's caches must take {wanted:,} bytes, got {got:,}"


def _dtype_name(dtype: object) -> str:
    """`torch.uint8`, `paddle.uint8` and `uint8` are one."""
    return str(dtype).rpartition(".")[2]


FACTS: tuple[Fact[Make, CacheRequest], ...] = (
    Fact("every_layer_has_its_caches", "P6, pipeline stages", EVERY, _names),
    Fact("latent_layers_have_no_values", "B62", EVERY, _no_others),
    Fact("caches_have_their_own_layers_shape", "B61, #8060", EVERY, _shapes),
    Fact("packed_caches_are_bytes", "B60, B61", EVERY, _dtypes),
    Fact("caches_take_their_blocks_bytes", "section 3.6, B59", EVERY, _bytes),
    Fact("host_blocks_hold_device_blocks", "B59", EVERY, _blocks_swap),
    Fact("the_stage_takes_what_is_counted", "section 3.6", EVERY, _total),
)

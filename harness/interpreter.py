"""Repairs of Triton's interpreter, each behind a probe that shows the defect is there.

Seen in 3.6.0 and 3.9.0, the constants and the range in 3.6.0 only:

| repair      | defect |
|-------------|--------|
| casts       | fp32 -> bf16 truncates; integers -> bf16, fp32 -> e4m3 are garbage: 500 -> 256, NaN -> 384 |
| constants   | there are none of bf16 |
| arithmetic  | bf16 is added, multiplied, summed and compared as the integers that store it |
| dot         | bf16 operands are multiplied as the integers that store them: error 5e10 |
| comparisons | typed as their operands: a scalar one, broadcast to a mask, becomes an integer |
| range       | `range(tensor)` fails with numpy >= 2.4 |
| autotune    | asks for a GPU driver to time the configurations |
| first line  | is that of `def`, not of the first decorator: coverage.py misses every way out of a kernel |
| patching    | the language is patched anew for every call of a device function: a third of a launch's time |
| overflow    | is looked for in every sum and product of integers, and told to nobody: half of the time |

A repaired operation equals torch bit for bit (`tests/test_interpreter.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

E4M3_MAX = 448.0
E4M3_MIN_EXPONENT = -6
E4M3_MANTISSA_BITS = 3

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Repair:
    """One repair: `is_needed` shows the defect, `apply` mends it for the life of the process."""

    name: str
    is_needed: Callable[[], bool]
    apply: Callable[[], None]


def repair() -> tuple[str, ...]:
    """Applies every repair whose probe shows its defect; the names of those applied."""
    applied = []
    for item in REPAIRS:
        if item.is_needed():
            item.apply()
            applied.append(item.name)
    return tuple(applied)


# --- number formats -------------------------------------------------------------------------------


def float32_to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN. float32 -> the 16 bits of bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    lowest_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + lowest_kept) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def bfloat16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """Exact: bfloat16 is the upper half of float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_e4m3(values: Array) -> npt.NDArray[np.uint8]:
    """Round to nearest even, saturating at +-448; NaN -> NaN. float32 -> the 8 bits of e4m3fn.

    Source: Micikevicius et al., arXiv:2209.05433, section 3; PTX cvt.rn.satfinite.e4m3x2.
    """
    magnitude = np.minimum(np.abs(values.astype(np.float64)), E4M3_MAX)
    is_nan = np.isnan(magnitude)
    safe = np.where(is_nan, 0.0, magnitude)
    _, exponent = np.frexp(safe)
    # frexp gives 0 the exponent 0: it belongs to the subnormal numbers.
    exponent = np.where(safe == 0, E4M3_MIN_EXPONENT, np.maximum(exponent - 1, E4M3_MIN_EXPONENT))
    steps = np.rint(np.ldexp(safe, E4M3_MANTISSA_BITS - exponent)).astype(np.int64)
    # `steps` in eighths of 2^exponent: rounding up to 16 carries into the exponent by addition.
    code = steps + ((exponent - E4M3_MIN_EXPONENT) << E4M3_MANTISSA_BITS)
    code = np.where(is_nan, 0x7F, code) | (np.signbit(values).astype(np.int64) << 7)
    encoded: npt.NDArray[np.uint8] = code.astype(np.uint8)
    return encoded


def e4m3_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """Exact. The 8 bits of e4m3fn -> float32."""
    values: npt.NDArray[np.float32] = _E4M3_VALUES[bits]
    return values


def _e4m3_table() -> npt.NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    subnormal = np.ldexp(mantissa / 8.0, E4M3_MIN_EXPONENT)
    values = np.where(exponent == 0, subnormal, normal)
    values = np.where((code & 0x7F) == 0x7F, np.nan, values)
    return np.where(code >= 128, -values, values).astype(np.float32)


_E4M3_VALUES = _e4m3_table()


# --- casts and dots -------------------------------------------------------------------------------


def _builder() -> Any:
    from triton.runtime.interpreter import InterpreterBuilder

    return InterpreterBuilder


def _handle(data: Array, dtype: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, dtype)


def _cast_defect() -> bool:
    import triton.language as tl

    halfway_up = np.array([1.0 + 3 * 2.0**-8], np.float32)
    cast = _builder()().cast_impl(_handle(halfway_up, tl.float32), tl.bfloat16)
    return not np.array_equal(cast.data, float32_to_bfloat16(halfway_up))


def _repair_casts() -> None:
    import triton.language as tl

    builder = _builder()
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    narrow: dict[Any, Callable[[Array], Array]] = {
        tl.bfloat16: float32_to_bfloat16,
        tl.float8e4nv: float32_to_e4m3,
    }
    widen: dict[Any, Callable[[Array], Array]] = {
        tl.bfloat16: bfloat16_to_float32,
        tl.float8e4nv: e4m3_to_float32,
    }

    def through_float32(src: Any, dst_type: Any) -> Any:
        """The cast where one side is bf16 or e4m3, else None. Integers are rounded to fp32 first."""
        source, target = src.dtype.scalar, dst_type.scalar
        if not (source in widen or target in narrow) or not target.is_floating():
            return None
        if any(t.is_floating() and t.primitive_bitwidth == 8 and t not in widen for t in (source, target)):
            return None
        wide = widen[source](src.data) if source in widen else src.data.astype(np.float32)
        if target in narrow:
            return _handle(narrow[target](wide), target)
        widths = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
        return _handle(wide.astype(widths[target]), target)

    def new_cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        cast = through_float32(src, dst_type)
        return cast_impl(self, src, dst_type) if cast is None else cast

    def new_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        cast = through_float32(src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode) if cast is None else cast

    builder.cast_impl = new_cast_impl
    builder.create_fp_to_fp = new_fp_to_fp


def _constants_defect() -> bool:
    return not hasattr(_builder(), "get_bf16")


def _repair_constants() -> None:
    import triton.language as tl

    def get_bf16(self: Any, value: float) -> Any:
        return _handle(float32_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    _builder().get_bf16 = get_bf16


def _arithmetic_defect() -> bool:
    import triton.language as tl

    one = _handle(np.array([0x3F80], np.uint16), tl.bfloat16)
    return bool(_builder()().create_fadd(one, one).data[0] != 0x4000)


def _repair_arithmetic() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps, TensorHandle

    def is_bf16(value: Any) -> bool:
        return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16

    def through_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
        """The operation in fp32, its result rounded once; comparisons stay truth values."""

        def new_operation(self: Any, *args: Any) -> Any:
            if not any(is_bf16(value) for value in args):
                return operation(self, *args)
            wide = [
                _handle(bfloat16_to_float32(value.data), tl.float32) if is_bf16(value) else value
                for value in args
            ]
            result = operation(self, *wide)
            if result.data.dtype != np.float32:
                return result
            return _handle(float32_to_bfloat16(result.data), tl.bfloat16)

        return new_operation

    builder = _builder()
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        setattr(builder, name, through_float32(getattr(builder, name)))
    reduce_sum = ReduceOps.sum

    def new_sum(self: Any, values: Any) -> Any:
        if values.dtype.scalar != tl.bfloat16:
            return reduce_sum(self, values)
        wide = bfloat16_to_float32(values.handle.data)
        total = np.asarray(np.sum(wide, axis=self.axis, keepdims=self.keep_dims))
        return self.to_tensor(float32_to_bfloat16(total).reshape(total.shape)[()], values.dtype)

    ReduceOps.sum = new_sum


def _dot_defect() -> bool:
    import triton.language as tl

    ones = _handle(np.full((16, 16), 0x3F80, np.uint16), tl.bfloat16)
    zeros = _handle(np.zeros((16, 16), np.float32), tl.float32)
    product = _builder()().create_dot(ones, ones, zeros, None, 0)
    return not np.array_equal(product.data, np.full((16, 16), 16.0, np.float32))


def _repair_dot() -> None:
    import triton.language as tl

    builder = _builder()
    create_dot = builder.create_dot
    widen: dict[Any, Callable[[Array], Array]] = {
        tl.bfloat16: bfloat16_to_float32,
        tl.float16: lambda data: data.astype(np.float32),
        tl.float8e4nv: e4m3_to_float32,
    }

    def new_create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        types = (a.dtype.scalar, b.dtype.scalar)
        if not all(item in widen for item in types) or d.data.dtype != np.float32:
            return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        # Products of 8-bit significands are exact in float32, as in the tensor cores.
        left, right = widen[types[0]](a.data), widen[types[1]](b.data)
        return _handle(np.matmul(left, right) + d.data, d.dtype.scalar)

    builder.create_dot = new_create_dot


def _comparison_defect() -> bool:
    import triton.language as tl

    one = _handle(np.array([1], np.int32), tl.int32)
    return bool(_builder()().create_icmpSGT(one, one).dtype != tl.int1)


def _repair_comparisons() -> None:
    import triton.language as tl

    def as_int1(compare: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
        def compared(self: Any, lhs: Any, rhs: Any) -> Any:
            return _handle(compare(self, lhs, rhs).data.astype(bool), tl.int1)

        return compared

    builder = _builder()
    for name in dir(builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(builder, name, as_int1(getattr(builder, name)))


# --- the rest -------------------------------------------------------------------------------------


class _Attributes:
    """Poses as a patch scope: keeps what would be set."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def set_attr(self, _: object, name: str, value: Any) -> None:
        self.values[name] = value


def _range_defect() -> bool:
    import triton.language as tl
    from triton.runtime import interpreter

    scope = _Attributes()
    interpreter._patch_lang_tensor(tl.core.tensor, scope)
    one = tl.core.tensor(_handle(np.array([1], np.int32), tl.int32), tl.int32)
    try:
        return bool(scope.values["__index__"](one) != 1)
    except TypeError:
        return True


def _repair_range() -> None:
    from triton.runtime import interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor

    def new_patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = new_patch_lang_tensor


def _autotune_defect() -> bool:
    from triton.runtime import driver

    try:
        driver.active.get_benchmarker()
    except Exception:
        return True
    return False


class _HostDriver:
    """What autotune asks of a driver, answered without a device: every configuration runs once."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(kernel_call: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
            kernel_call()
            return [1.0] * len(quantiles or (0.5,))

        return benchmark

    def get_current_device(self) -> int:
        return 0


def _repair_autotune() -> None:
    from triton.runtime import driver

    driver.set_active(_HostDriver())


def _unchanged(function: Any) -> Any:
    """The decorator that stands in for those that the interpreter strips."""
    return function


@_unchanged
def _decorated() -> None:
    """What the probe of the first line rewrites."""


def _first_line_defect() -> bool:
    from triton.runtime.interpreter import FunctionRewriter

    rewritten = FunctionRewriter(_decorated).rewrite_ast()
    return bool(rewritten.__code__.co_firstlineno != _decorated.__code__.co_firstlineno)


def _repair_first_line() -> None:
    from triton.runtime import interpreter

    compile_and_exec = interpreter.FunctionRewriter._compile_and_exec

    def new_compile_and_exec(self: Any, transformed_ast: ast.Module) -> Any:
        (function,) = transformed_ast.body
        first = self.fn.__code__.co_firstlineno
        if isinstance(function, ast.FunctionDef) and first < function.lineno and not function.decorator_list:
            decorator = ast.Name("_mla_unchanged", ast.Load())
            decorator.lineno = decorator.end_lineno = first
            decorator.col_offset = decorator.end_col_offset = function.col_offset
            function.decorator_list.append(decorator)
        return compile_and_exec(self, transformed_ast)

    interpreter.FunctionRewriter._compile_and_exec = new_compile_and_exec
    # The interpreter hands its own globals to every kernel.
    interpreter._mla_unchanged = _unchanged


def _patching_defect() -> bool:
    import triton.language as tl
    from triton.runtime import interpreter

    scopes: list[Any] = []
    kernel = FunctionType(compile("call()", __file__, "exec"), {"tl": tl})
    kernel.__globals__["call"] = lambda: scopes.append(interpreter._patch_lang(kernel))
    interpreter.GridExecutor(kernel, [], (1,))()
    return bool(scopes[0]._changes)


def _repair_patching() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    # By the modules of the language that a function names: what the running launch has patched.
    patched: set[tuple[bool, bool]] = set()

    def new_patch_lang(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        named = (tl in modules, tl.core in modules)
        if named in patched:
            return interpreter._LangPatchScope()
        patched.add(named)
        return patch_lang(fn)

    def new_execute(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            execute(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = new_patch_lang
    interpreter.GridExecutor.__call__ = new_execute


def _overflow_defect() -> bool:
    from triton.runtime.interpreter import interpreter_builder

    return bool(interpreter_builder.options.sanitize_overflow and not interpreter_builder.options.debug)


def _repair_overflow() -> None:
    from triton.runtime.interpreter import interpreter_builder

    # What is looked for is asserted on the device, which the interpreter does only if `debug` is set.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


REPAIRS = (
    Repair("casts", _cast_defect, _repair_casts),
    Repair("constants", _constants_defect, _repair_constants),
    Repair("arithmetic", _arithmetic_defect, _repair_arithmetic),
    Repair("dot", _dot_defect, _repair_dot),
    Repair("comparisons", _comparison_defect, _repair_comparisons),
    Repair("range", _range_defect, _repair_range),
    Repair("autotune", _autotune_defect, _repair_autotune),
    Repair("first line", _first_line_defect, _repair_first_line),
    Repair("patching", _patching_defect, _repair_patching),
    Repair("overflow", _overflow_defect, _repair_overflow),
)

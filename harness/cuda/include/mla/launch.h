// What launchers need: tensors' facts checked with one sentence, and the launch itself.
//
// A launcher is a C++ function of TensorViews and numbers, exported to Python by
// TVM_FFI_DLL_EXPORT_TYPED_FUNC. It launches on the environment's current stream and returns.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "mla/kernel.cuh"

namespace mla {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

#ifdef __CUDACC__
constexpr DLDeviceType kDevice = kDLCUDA;
#else
constexpr DLDeviceType kDevice = kDLCPU;
#endif

constexpr DLDataType kUint8{kDLUInt, 8, 1}, kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1};
constexpr DLDataType kFloat16{kDLFloat, 16, 1}, kBfloat16{kDLBfloat, 16, 1}, kFloat32{kDLFloat, 32, 1};

inline bool same(DLDataType left, DLDataType right) {
  return left.code == right.code && left.bits == right.bits && left.lanes == right.lanes;
}

inline std::string told(DLDataType dtype) {
  if (dtype.code == kDLBfloat) return "bfloat16";
  const char* kind = "other";
  if (dtype.code == kDLFloat) kind = "float";
  if (dtype.code == kDLInt) kind = "int";
  if (dtype.code == kDLUInt) kind = "uint";
  return kind + std::to_string(dtype.bits);
}

// One tensor argument with its name; `check` states what must hold of it, or raises ValueError.
struct Argument {
  TensorView tensor;
  const char* name;

  // A size of -1 is free. The last axis is dense, or all axes if `contiguous`.
  const Argument& check(std::initializer_list<int64_t> shape, DLDataType dtype, bool contiguous = false) const {
    if (tensor.device().device_type != kDevice) {
      TVM_FFI_THROW(ValueError) << name << " must be on " << (kDevice == kDLCUDA ? "a CUDA device" : "the CPU");
    }
    if (!same(tensor.dtype(), dtype)) {
      TVM_FFI_THROW(ValueError) << name << " must be " << told(dtype) << ", got " << told(tensor.dtype());
    }
    bool fits = tensor.ndim() == static_cast<int>(shape.size());
    int axis = 0;
    for (int64_t size : shape) {
      fits = fits && (size < 0 || tensor.size(axis) == size);
      ++axis;
    }
    if (!fits) TVM_FFI_THROW(ValueError) << name << " must be " << told(shape) << ", got " << told_shape();
    int64_t dense = 1;
    for (axis = tensor.ndim() - 1; axis >= 0; --axis) {
      const bool must = contiguous || axis == tensor.ndim() - 1;
      if (must && tensor.size(axis) > 1 && tensor.numel() > 0 && tensor.stride(axis) != dense) {
        TVM_FFI_THROW(ValueError) << name << (contiguous ? " must be contiguous" : " must be dense in its last axis")
                                  << ", got stride " << tensor.stride(axis) << " of axis " << axis;
      }
      dense *= tensor.size(axis);
    }
    return *this;
  }

  static std::string told(std::initializer_list<int64_t> shape) {
    std::string text = "[";
    for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "*" : std::to_string(size));
    return text + "]";
  }

  std::string told_shape() const {
    std::string text = "[";
    for (int axis = 0; axis < tensor.ndim(); ++axis) text += (axis > 0 ? ", " : "") + std::to_string(tensor.size(axis));
    return text + "]";
  }

  static std::string told(DLDataType dtype) { return mla::told(dtype); }
};

#define MLA_CHECK(tensor, ...) ::mla::Argument{tensor, #tensor}.check(__VA_ARGS__)

// The elements. data_ptr() of a view does not count in byte_offset.
template <class T>
T* data(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

// ValueError unless the first element and the strides of all axes but the last are multiples of `bytes`.
inline void require_aligned(const TensorView& tensor, const char* name, int64_t bytes) {
  const int64_t element = tensor.dtype().bits / 8;
  bool aligned = reinterpret_cast<uintptr_t>(data<char>(tensor)) % bytes == 0;
  for (int axis = 0; axis + 1 < tensor.ndim(); ++axis) aligned = aligned && tensor.stride(axis) * element % bytes == 0;
  if (!aligned && tensor.numel() > 0) {
    TVM_FFI_THROW(ValueError) << name << " must begin at and step by multiples of " << bytes << " bytes";
  }
}

// A launch of what GPUs have no limit for but int: how many blocks `count` takes, or ValueError.
inline unsigned blocks(int64_t count, const char* what) {
  if (count > 0x7fffffff) TVM_FFI_THROW(ValueError) << "a launch takes at most 2147483647 " << what << ", got " << count;
  return static_cast<unsigned>(count);
}

// The dtype of a tensor, or ValueError unless it is one that models compute in.
inline DLDataType model_dtype(const TensorView& tensor, const char* name) {
  const DLDataType dtype = tensor.dtype();
  if (!same(dtype, kBfloat16) && !same(dtype, kFloat16) && !same(dtype, kFloat32)) {
    TVM_FFI_THROW(ValueError) << name << " must be bfloat16, float16 or float32, got " << told(dtype);
  }
  return dtype;
}

// Calls `use` with a value of the type that a model dtype names: bf16, fp16, or float.
template <class Use>
void with_model_dtype(const TensorView& tensor, const char* name, Use use) {
  const DLDataType dtype = model_dtype(tensor, name);
  if (same(dtype, kBfloat16)) return use(bf16{});
  if (same(dtype, kFloat16)) return use(fp16{});
  return use(float{});
}

// Launches a kernel on the stream of the tensor's device. RuntimeError if the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const TensorView& on, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments... arguments) {
#ifdef __CUDACC__
  const DLDevice device = on.device();
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  const auto require = [](cudaError_t error) {
    if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << "CUDA refused the launch: " << cudaGetErrorString(error);
  };
  int before = 0;
  require(cudaGetDevice(&before));
  if (before != device.device_id) require(cudaSetDevice(device.device_id));
  if (shared_bytes > (48 << 10)) {
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  require(cudaGetLastError());
  if (before != device.device_id) require(cudaSetDevice(before));
#else
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } const call{kernel, {static_cast<Parameters>(arguments)...}};
  const host::Body body = [](const void* given) {
    const auto& call = *static_cast<const Call*>(given);
    std::apply(call.kernel, call.arguments);
  };
  try {
    host::run(grid, block, shared_bytes, body, &call);
  } catch (const std::exception& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
#endif
}

}  // namespace mla

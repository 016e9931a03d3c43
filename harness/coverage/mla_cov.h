/* Flags of what ran, for instrumented CUDA sources (harness/coverage/cuda.py). One translation unit a library.
 *
 * MLA_COV_KERNEL;    first in every kernel
 * MLA_COV(n)         sets flag n, a constant: a block of statements runs
 * MLA_COV_ARM(n, c)  is the truth of c; sets flag n if it is true, else n + 1
 *
 * The build says how many flags there are, -DMLA_COV_FLAGS=<n>. Host code, and all code where g++ compiles it,
 * has an array of bytes that mla_cov_flags() returns. Device code sets bits of what mla_cov_set_device() was
 * given, nothing while that is null: flag n is bit n % 32 of word n / 32.
 *
 * A thread of the device keeps its flags in registers that the kernel declares in PTX, so that a probe is one
 * `or` with a constant, and those of unrolled loops are often none; where the kernel returns, what memory does
 * not know yet is stored. What traps is not told. It takes device functions that are inlined: where one is not,
 * -DMLA_COV_IN_MEMORY looks at memory at every probe, which may cost tens of times the kernel's time.
 */
#pragma once

#ifndef MLA_COV_FLAGS
#error "say how many flags there are: -DMLA_COV_FLAGS=<n>"
#endif

/* Not inline: g++ would give all libraries of a process one and the same array. */
static unsigned char mla_cov_host[MLA_COV_FLAGS + 1];

#define MLA_COV_EXPORT extern "C" __attribute__((visibility("default")))

MLA_COV_EXPORT unsigned char *mla_cov_flags() { return mla_cov_host; }

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <utility>

/* In constant memory: a probe does not wait for the pointer. */
static __constant__ unsigned *mla_cov_device = nullptr;

/* Device memory of mla_cov_words() words of 32 bits, or null; 0 or the CUDA error. */
MLA_COV_EXPORT int mla_cov_set_device(unsigned *flags) {
    return cudaMemcpyToSymbol(mla_cov_device, &flags, sizeof flags);
}

static constexpr int kMlaCovWords = MLA_COV_FLAGS / 32 + 1;

MLA_COV_EXPORT int mla_cov_words() { return kMlaCovWords; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(MLA_COV_IN_MEMORY)
#define MLA_COV_IN_REGISTERS

/* Register kWord of a thread's flags, by its name in PTX. */
template <int kWord> static __device__ __forceinline__ void mla_cov_declare() {
    asm volatile(".reg .b32 mla_cov_%0; mov.b32 mla_cov_%0, 0;" ::"n"(kWord));
}

template <int kWord> static __device__ __forceinline__ void mla_cov_or(unsigned bits) {
    asm volatile("or.b32 mla_cov_%0, mla_cov_%0, %1;" ::"n"(kWord), "r"(bits));
}

template <int kWord> static __device__ __forceinline__ unsigned mla_cov_word() {
    unsigned word;
    asm volatile("mov.b32 %0, mla_cov_%1;" : "=r"(word) : "n"(kWord));
    return word;
}

/* Adds the flags of threads that return together to a word; `fresh` are those that memory did not have. */
static __device__ __forceinline__ void mla_cov_add(int word, unsigned fresh) {
    if (fresh == 0) return;
    const unsigned together = __activemask();
    fresh = __reduce_or_sync(together, fresh);
    unsigned lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    if (lane + 1 == __ffs(together)) atomicOr(&mla_cov_device[word], fresh);
}

struct MlaCovKernel {
    using Words = std::make_integer_sequence<int, kMlaCovWords>;

    __device__ __forceinline__ MlaCovKernel() { declare(Words()); }
    __device__ __forceinline__ ~MlaCovKernel() {
        if (mla_cov_device != nullptr) tell(Words());
    }

    template <int... kWords>
    static __device__ __forceinline__ void declare(std::integer_sequence<int, kWords...>) {
        (mla_cov_declare<kWords>(), ...);
    }
    /* All words are read, without waiting for one another, before any is judged. */
    template <int... kWords>
    static __device__ __forceinline__ void tell(std::integer_sequence<int, kWords...>) {
        const unsigned fresh[] = {mla_cov_word<kWords>() & ~mla_cov_device[kWords]...};
        (mla_cov_add(kWords, fresh[kWords]), ...);
    }
};
#elif defined(__CUDA_ARCH__)
/* Thousands of threads that write one word wait for one another; that read it, do not. */
static __device__ inline void mla_cov_store(int number) {
    const unsigned bit = 1u << number % 32;
    if (mla_cov_device != nullptr && (mla_cov_device[number / 32] & bit) == 0) {
        atomicOr(&mla_cov_device[number / 32], bit);
    }
}
#endif
#define MLA_COV_BOTH __host__ __device__ __forceinline__
#else
#define MLA_COV_BOTH inline
#endif

template <int kNumber> static MLA_COV_BOTH void mla_cov_hit() {
#if defined(MLA_COV_IN_REGISTERS)
    mla_cov_or<kNumber / 32>(1u << kNumber % 32);
#elif defined(__CUDA_ARCH__)
    mla_cov_store(kNumber);
#else
    mla_cov_host[kNumber] = 1;
#endif
}

template <int kNumber> static MLA_COV_BOTH bool mla_cov_arm(bool condition) {
#if defined(MLA_COV_IN_REGISTERS)
    constexpr int kOther = kNumber + 1;
    constexpr unsigned kTrue = 1u << kNumber % 32, kFalse = 1u << kOther % 32;
    if constexpr (kNumber / 32 == kOther / 32) {
        mla_cov_or<kNumber / 32>(condition ? kTrue : kFalse);
    } else {
        mla_cov_or<kNumber / 32>(condition ? kTrue : 0);
        mla_cov_or<kOther / 32>(condition ? 0 : kFalse);
    }
#elif defined(__CUDA_ARCH__)
    mla_cov_store(condition ? kNumber : kNumber + 1);
#else
    mla_cov_host[condition ? kNumber : kNumber + 1] = 1;
#endif
    return condition;
}

#ifdef MLA_COV_IN_REGISTERS
#define MLA_COV_KERNEL const MlaCovKernel mla_cov_kernel
#else
#define MLA_COV_KERNEL static_cast<void>(0)
#endif
#define MLA_COV(number) mla_cov_hit<number>()
#define MLA_COV_ARM(number, condition) mla_cov_arm<number>(static_cast<bool>(condition))

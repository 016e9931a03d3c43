/* Flags of what ran, for instrumented CUDA sources (harness/coverage/cuda.py). One translation unit a library.
 *
 * MLA_COV(n)         sets flag n: a block of statements runs
 * MLA_COV_ARM(n, c)  is the truth of c; sets flag n if it is true, else n + 1
 *
 * Flags are plain bytes: any number of threads may set one, and nothing waits for another. The build says how
 * many there are, -DMLA_COV_FLAGS=<n>. Host code, and all code where g++ compiles it, has an array that
 * mla_cov_flags() returns; device code sets what mla_cov_set_device() was given, nothing while that is null.
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

/* In constant memory: a probe does not wait for the pointer. */
static __constant__ unsigned char *mla_cov_device = nullptr;

/* Device memory of MLA_COV_FLAGS bytes, or null; 0 or the CUDA error. */
MLA_COV_EXPORT int mla_cov_set_device(unsigned char *flags) {
    return cudaMemcpyToSymbol(mla_cov_device, &flags, sizeof flags);
}
#define MLA_COV_BOTH __host__ __device__
#else
#define MLA_COV_BOTH
#endif

static MLA_COV_BOTH inline void mla_cov_hit(int number) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
    /* Thousands of threads that store to one byte wait for one another; that read it, do not. */
    if (mla_cov_device != nullptr && mla_cov_device[number] == 0) mla_cov_device[number] = 1;
#else
    mla_cov_host[number] = 1;
#endif
}

static MLA_COV_BOTH inline bool mla_cov_arm(int number, bool condition) {
    mla_cov_hit(condition ? number : number + 1);
    return condition;
}

#define MLA_COV(number) mla_cov_hit(number)
#define MLA_COV_ARM(number, condition) mla_cov_arm(number, static_cast<bool>(condition))

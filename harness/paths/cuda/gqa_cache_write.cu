// Rotates queries and keys of a packed projection and writes keys and values into their paged caches. The
// contract is gqa_cache_write.py's.

#include "mla/heads.h"
#include "mla/rotation.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;

struct Inputs {
  const void* qkv;
  int64_t qkv_stride;
  const void* cos_sin_cache;  // null: nothing is rotated
  int64_t table_stride;
  const int* block_tables;
  int64_t block_table_stride;
  const int *seq_lens_decoder, *cu_seqlens_q, *batch_id_per_token;
  int64_t num_tokens;
  int num_heads, num_kv_heads, head_dim, v_head_dim, rope_head_dim, block_size;
};

struct Outputs {
  void* query;
  int64_t query_stride_token, query_stride_head;
  void *k_cache, *v_cache;
};

// What the threads of a token have to do, in this order: pairs of packs of its queries and keys to rotate,
// packs of them and of its values to copy. A pack has kCount elements; widths are whole packs.
template <int kCount>
struct Work {
  int64_t rotated, copied, values;
  int rotated_packs, copied_packs, value_packs;  // of one head

  __host__ __device__ explicit Work(const Inputs& in)
      : rotated_packs(in.rope_head_dim / 2 / kCount),
        copied_packs((in.head_dim - in.rope_head_dim) / kCount),
        value_packs(in.v_head_dim / kCount) {
    const int64_t heads = int64_t{in.num_heads} + in.num_kv_heads;
    rotated = heads * rotated_packs;
    copied = heads * copied_packs;
    values = int64_t{in.num_kv_heads} * value_packs;
  }
  __host__ __device__ int64_t all() const { return rotated + copied + values; }
};

// Grid: (ceil(num_tokens * all work of a token / kThreads),). One piece of work a thread.
template <class T, class Angle, int kCount, bool kIsNeox>
__global__ void __launch_bounds__(kThreads) write_heads(const Inputs in, const Outputs to) {
  using Values = Pack<T, kCount>;
  // 1. The token, and which of its heads, keys behind queries, or values: from which column on.
  const Work<kCount> work(in);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = thread / work.all();
  int64_t piece = thread % work.all();
  if (token >= in.num_tokens) {
    return;
  }
  const bool is_rotated = piece < work.rotated, is_value = piece >= work.rotated + work.copied;
  int64_t head = 0;
  int column = 0, pair = 0;
  if (is_rotated) {
    head = piece / work.rotated_packs;
    pair = static_cast<int>(piece % work.rotated_packs) * kCount;
  } else if (is_value) {
    piece -= work.rotated + work.copied;
    head = piece / work.value_packs;
    column = static_cast<int>(piece % work.value_packs) * kCount;
  } else {
    piece -= work.rotated;
    head = piece / work.copied_packs;
    column = in.rope_head_dim + static_cast<int>(piece % work.copied_packs) * kCount;
  }

  // 2. Where the token stands. Padding has no row, and no position: it writes queries of 0 and no cache.
  const int slot = in.batch_id_per_token[token];
  const bool is_query = !is_value && head < in.num_heads;
  if (slot < 0 && !is_query) {
    return;
  }
  int position = 0;
  if (slot >= 0) {
    position = in.seq_lens_decoder[slot] + static_cast<int>(token) - in.cu_seqlens_q[slot];
  }

  // 3. Where the head comes from and goes to. 64 bits: caches pass 2^32 elements.
  const T* raw = static_cast<const T*>(in.qkv) + token * in.qkv_stride;
  T* out;
  if (is_query) {
    raw += head * in.head_dim;
    out = static_cast<T*>(to.query) + token * to.query_stride_token + head * to.query_stride_head;
  } else {
    const int64_t block = in.block_tables[slot * in.block_table_stride + position / in.block_size];
    int64_t kv_head = head;
    if (!is_value) {
      kv_head -= in.num_heads;
    }
    const int64_t row = (block * in.num_kv_heads + kv_head) * in.block_size + position % in.block_size;
    if (is_value) {
      raw += (int64_t{in.num_heads} + in.num_kv_heads) * in.head_dim + kv_head * in.v_head_dim;
      out = static_cast<T*>(to.v_cache) + row * in.v_head_dim;
    } else {
      raw += head * in.head_dim;
      out = static_cast<T*>(to.k_cache) + row * in.head_dim;
    }
  }

  // 4. A pack to copy.
  Values packs[2] = {};  // of padding nothing is read, and 0 is written
  if (!is_rotated) {
    if (slot >= 0) {
      packs[0] = *reinterpret_cast<const Values*>(raw + column);
    }
    *reinterpret_cast<Values*>(out + column) = packs[0];
    return;
  }

  // 5. Two packs to rotate: half of the rotated columns apart, or, interleaved, one behind the other.
  const int num_pairs = in.rope_head_dim / 2;
  int low = pair, high = pair + num_pairs;
  if constexpr (!kIsNeox) {
    low = 2 * pair;
    high = low + kCount;
  }
  if (slot >= 0) {
    using Angles = Pack<Angle, kCount>;
    packs[0] = *reinterpret_cast<const Values*>(raw + low);
    packs[1] = *reinterpret_cast<const Values*>(raw + high);
    const Angle* row = static_cast<const Angle*>(in.cos_sin_cache) + position * in.table_stride + pair;
    const Angles cosines = *reinterpret_cast<const Angles*>(row);
    const Angles sines = *reinterpret_cast<const Angles*>(row + num_pairs);
    rotate_packs<kIsNeox>(packs, cosines, sines, false);
  }
  *reinterpret_cast<Values*>(out + low) = packs[0];
  *reinterpret_cast<Values*>(out + high) = packs[1];
}

void write_cache(TensorView qkv, Optional<TensorView> cos_sin_cache, TensorView block_tables,
                 TensorView seq_lens_decoder, TensorView cu_seqlens_q, TensorView batch_id_per_token,
                 TensorView query, TensorView k_cache, TensorView v_cache, bool is_neox) {
  const DLDataType dtype = model_dtype(query, "query");
  MLA_CHECK(query, {-1, -1, -1}, dtype);
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  const int64_t num_slots = seq_lens_decoder.numel();
  MLA_CHECK(k_cache, {-1, -1, -1, head_dim}, dtype, true);
  const int64_t num_kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  MLA_CHECK(v_cache, {k_cache.size(0), num_kv_heads, block_size, -1}, dtype, true);
  const int64_t v_head_dim = v_cache.size(3);
  const int64_t width = (num_heads + num_kv_heads) * head_dim + num_kv_heads * v_head_dim;
  MLA_CHECK(qkv, {num_tokens, width}, dtype);
  MLA_CHECK(block_tables, {num_slots, -1}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  if (width > 0x7fffffff || block_size > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "qkv must have at most 2147483647 columns and blocks as many tokens, got "
                              << width << " and " << block_size;
  }
  Inputs in{data<void>(qkv),
            qkv.stride(0),
            nullptr,
            0,
            data<int>(block_tables),
            block_tables.stride(0),
            data<int>(seq_lens_decoder),
            data<int>(cu_seqlens_q),
            data<int>(batch_id_per_token),
            num_tokens,
            static_cast<int>(num_heads),
            static_cast<int>(num_kv_heads),
            static_cast<int>(head_dim),
            static_cast<int>(v_head_dim),
            0,
            static_cast<int>(block_size)};
  const int64_t bytes = Alignment::element_bytes(query);
  Alignment alignment;
  alignment.with(qkv).with(query).with(k_cache).with(v_cache).with(head_dim * bytes).with(v_head_dim * bytes);
  if (cos_sin_cache.has_value()) {
    const TensorView table = *cos_sin_cache;
    check_table(cos_sin_cache, -1, dtype);
    const int64_t rope_head_dim = table.size(1);
    if (rope_head_dim % 2 != 0 || rope_head_dim > head_dim) {
      TVM_FFI_THROW(ValueError) << "cos_sin_cache must have an even number of columns, at most " << head_dim
                                << ", got " << rope_head_dim;
    }
    in.cos_sin_cache = data<void>(table);
    in.table_stride = table.stride(0);
    in.rope_head_dim = static_cast<int>(rope_head_dim);
    alignment.with(table).with(rope_head_dim / 2 * bytes);
  }
  const Outputs to{data<void>(query), query.stride(0), query.stride(1), data<void>(k_cache),
                   data<void>(v_cache)};
  if (num_tokens == 0) {
    return;
  }
  with_model_dtype(query, "query", [&](auto value) {
    using T = decltype(value);
    with_angle<T>(cos_sin_cache, dtype, [&](auto angle) {
      using Angle = decltype(angle);
      const auto go = [&](auto kernel, int64_t work) {
        const unsigned grid = blocks(ceil_div<int64_t>(num_tokens * work, kThreads), "blocks of packs");
        launch(query, kernel, grid, kThreads, 0, in, to);
      };
      constexpr int kMany = kPackBytes / sizeof(T);
      const bool is_aligned = alignment.bits % kPackBytes == 0;
      if (is_aligned && is_neox) {
        go(write_heads<T, Angle, kMany, true>, Work<kMany>(in).all());
      } else if (is_aligned) {
        go(write_heads<T, Angle, kMany, false>, Work<kMany>(in).all());
      } else if (is_neox) {
        go(write_heads<T, Angle, 1, true>, Work<1>(in).all());
      } else {
        go(write_heads<T, Angle, 1, false>, Work<1>(in).all());
      }
    });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_cache, write_cache)

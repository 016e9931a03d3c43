// Lists the tiles of one layer's launch. The contract is launch_buffers.py's.

#include "mla/launch.h"
#include "mla/reduce.h"
#include "mla/search.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kEncoderTile = 64, kDecoderTile = 16;  // query rows a tile

enum { kEncoder, kDecoder, kKeys, kLists };

struct List {
  int *batch_ids, *tile_ids;
  int64_t room;
  int tile_rows;
};
struct Lists {
  List of[kLists];
};

// What a row has in a list: query rows of its tokens, or keys. 64 bits: tokens times heads may pass 2^31.
__device__ __forceinline__ int64_t rows_in_list(int list, int encoder, int cached, int this_time,
                                                int group_size) {
  int64_t rows = 0;
  if (list == kKeys) {
    if (this_time > 0) {
      rows = int64_t{cached} + this_time;
    }
  } else if ((encoder > 0) == (list == kEncoder)) {
    rows = int64_t{this_time} * group_size;
  }
  return rows;
}

// Grid: (kLists,). Where each row's tiles begin in a list, how many there are, and its room.
__global__ void __launch_bounds__(kThreads)
    count_tiles(const int* seq_lens_encoder, const int* seq_lens_decoder, const int* seq_lens_this_time,
                const Lists lists, int* tile_starts, int* num_tiles, int* capacity, int64_t num_slots,
                int group_size) {
  auto& shared = shared_memory<WarpSums<kThreads, 1>>();
  const int list = static_cast<int>(blockIdx.x);
  int* starts = tile_starts + list * (num_slots + 1);

  // 1. Entry 0, and the room: all there is to write where no slot is.
  if (threadIdx.x == 0) {
    starts[0] = 0;
    capacity[list] = static_cast<int>(lists.of[list].room);
  }

  int before = 0;
  for (int64_t first = 0; first < num_slots; first += kThreads) {
    // 2. Tiles of a slot a thread.
    const int64_t slot = first + threadIdx.x;
    int tiles[1] = {0};
    if (slot < num_slots) {
      const int64_t rows = rows_in_list(list, seq_lens_encoder[slot], seq_lens_decoder[slot],
                                        seq_lens_this_time[slot], group_size);
      tiles[0] = static_cast<int>(ceil_div<int64_t>(rows, lists.of[list].tile_rows));
    }

    // 3. The sum up to and with each slot is where the next one's begin.
    int total[1];
    prefix_sums(tiles, total, shared);
    if (slot < num_slots) {
      starts[slot + 1] = before + tiles[0];
    }
    before += total[0];
  }
  if (threadIdx.x == 0) {
    num_tiles[list] = before;
  }
}

// Grid: (ceil(most room / kThreads), kLists). One entry of a list a thread.
__global__ void __launch_bounds__(kThreads)
    write_tiles(const int* tile_starts, const Lists lists, int num_slots) {
  const int number = static_cast<int>(blockIdx.y);
  const List& list = lists.of[number];
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= list.room) {
    return;
  }
  // Entries from the last row's end on are unused.
  const int* starts = tile_starts + number * (int64_t{num_slots} + 1);
  int slot = -1, tile = -1;
  if (entry < starts[num_slots]) {
    slot = slot_of(starts, num_slots, entry);
    tile = static_cast<int>(entry) - starts[slot];
  }
  list.batch_ids[entry] = slot;
  list.tile_ids[entry] = tile;
}

void list_tiles(TensorView seq_lens_encoder, TensorView seq_lens_decoder, TensorView seq_lens_this_time,
                TensorView encoder_batch_ids, TensorView encoder_tile_ids, TensorView decoder_batch_ids,
                TensorView decoder_tile_ids, TensorView kv_batch_ids, TensorView kv_tile_ids,
                TensorView num_tiles, TensorView capacity, TensorView tile_starts, int64_t num_heads,
                int64_t num_key_value_heads, int64_t block_size) {
  const int64_t num_slots = seq_lens_this_time.numel();
  MLA_CHECK(seq_lens_encoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_this_time, {num_slots}, kInt32);
  MLA_CHECK(encoder_batch_ids, {encoder_tile_ids.numel()}, kInt32);
  MLA_CHECK(encoder_tile_ids, {encoder_batch_ids.numel()}, kInt32);
  MLA_CHECK(decoder_batch_ids, {decoder_tile_ids.numel()}, kInt32);
  MLA_CHECK(decoder_tile_ids, {decoder_batch_ids.numel()}, kInt32);
  MLA_CHECK(kv_batch_ids, {kv_tile_ids.numel()}, kInt32);
  MLA_CHECK(kv_tile_ids, {kv_batch_ids.numel()}, kInt32);
  MLA_CHECK(num_tiles, {kLists}, kInt32);
  MLA_CHECK(capacity, {kLists}, kInt32);
  MLA_CHECK(tile_starts, {kLists, num_slots + 1}, kInt32, true);
  if (num_key_value_heads < 1 || num_heads < 1 || num_heads % num_key_value_heads != 0) {
    TVM_FFI_THROW(ValueError) << "num_attention_heads must be a multiple of num_key_value_heads, got "
                              << num_heads << " and " << num_key_value_heads;
  }
  if (block_size < 1 || block_size > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "block_size must be 1 to 2147483647, got " << block_size;
  }
  // The layer's own group: of all layers' numbers of KV heads the smallest makes the most tiles.
  const int64_t group_size = num_heads / num_key_value_heads;
  const auto list = [](const TensorView& batch_ids, const TensorView& tile_ids, int64_t tile_rows) {
    return List{data<int>(batch_ids), data<int>(tile_ids), batch_ids.numel(), static_cast<int>(tile_rows)};
  };
  const Lists lists{{list(encoder_batch_ids, encoder_tile_ids, kEncoderTile),
                     list(decoder_batch_ids, decoder_tile_ids, kDecoderTile),
                     list(kv_batch_ids, kv_tile_ids, block_size)}};
  launch(num_tiles, count_tiles, kLists, kThreads, sizeof(WarpSums<kThreads, 1>), data<int>(seq_lens_encoder),
         data<int>(seq_lens_decoder), data<int>(seq_lens_this_time), lists, data<int>(tile_starts),
         data<int>(num_tiles), data<int>(capacity), num_slots, group_size);
  const int64_t room = max(max(lists.of[kEncoder].room, lists.of[kDecoder].room), lists.of[kKeys].room);
  if (room == 0) {
    return;
  }
  const dim3 grid(blocks(ceil_div<int64_t>(room, kThreads), "blocks of tiles"), kLists);
  launch(num_tiles, write_tiles, grid, kThreads, 0, data<int>(tile_starts), lists, num_slots);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(list_tiles, list_tiles)

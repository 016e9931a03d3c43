// The host runtime: threads of a block as fibers, one processor, one block after another.
//
// A block's warps run in turn, each until all of its threads are finished or stand at a barrier; within a warp
// the lanes run in turn, each until it is suspended. In which order is the schedule: forward, reverse, or random
// from a seed, drawn anew whenever warps or lanes start over. A kernel without races gives the same bits
// under any.

#include "mla/host.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mla::host {

Thread* current = nullptr;
Position position;

namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr size_t kMaxShared = 227 << 10;
constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxBlockZ = 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, a huge integer
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;  // frames are larger with their red zones
#else
constexpr size_t kStack = 128 << 10;
#endif

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && file == other.file; }
};

std::string told(const Place& place) {
  const std::string file(place.file);
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

// ---- fibers ----

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores the stack pointer in *from and goes on at `to`.
extern "C" void mla_switch(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .globl mla_switch
  .hidden mla_switch
  .type mla_switch, @function
mla_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mla_switch, .-mla_switch
)");
using Context = void*;
#else
using Context = ucontext_t;
#endif

void run_thread();

struct Fiber {
  Context context;
  void* asan_stack = nullptr;
};

class Stacks {
 public:
  unsigned char* of(int number) {
    if (base_ == nullptr) {
      void* found = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (found == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block's threads");
      base_ = static_cast<unsigned char*>(found);
      // A thread that overruns its stack faults instead of running over its neighbour's.
      for (int i = 0; i < kMaxThreads; ++i) mprotect(base_ + i * kStack, 4096, PROT_NONE);
    }
    return base_ + number * kStack;
  }

 private:
  unsigned char* base_ = nullptr;
} stacks;

// ---- what threads wait for ----

enum class State { kReady, kAtBarrier, kInWarp, kFinished };

// One meeting of lanes of a warp: all of `mask` call the same function with what each brings.
struct Meeting {
  enum class Kind { kSync, kBallot, kShuffle, kMultiply, kLoad } kind;
  unsigned mask;
  unsigned arrived = 0;
  struct Brought {
    Place place;
    void* value;
    const void *a, *b;
    int number;  // the predicate of a ballot, the source lane of a shuffle
  } brought[kWarp];
  size_t size = 0;  // of a shuffle; of a load the number of matrices
  int variant = 0;  // the type of a product; whether a load is transposed
};

struct Copy {
  void* target;
  const void* source;
  size_t size;
  bool valid;
};

struct Running {
  Thread thread;
  Fiber fiber;
  State state;
  Place place;  // where it waits
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Block {
  Fiber scheduler;
  std::vector<Running> threads;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  Running* running = nullptr;
  Body body;
  const void* arguments;
  std::string failure;
} block;

constexpr std::align_val_t kSharedAlignment{128};  // as device.h has it

struct SharedDelete {
  void operator()(unsigned char* bytes) const { operator delete[](bytes, kSharedAlignment); }
};

std::unique_ptr<unsigned char[], SharedDelete> shared;
size_t shared_size = 0;

enum class Order { kForward, kReverse, kRandom };
Order order = Order::kForward;
std::mt19937_64 random_bits;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] unsigned char* stack, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = stack != nullptr ? stack : scheduler_stack;
  const size_t size = stack != nullptr ? kStack : scheduler_stack_size;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_stack, bottom, size);
#endif
#if defined(__x86_64__)
  mla_switch(&from.context, to.context);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
#endif
}

void prepare(Running& running) {
  unsigned char* stack = stacks.of(running.thread.number);
#if defined(__SANITIZE_ADDRESS__)
  // What an abandoned thread left poisoned.
  __asan_unpoison_memory_region(stack + 4096, kStack - 4096);
#endif
#if defined(__x86_64__)
  // As if run_thread had been called: rsp + 8 is a multiple of 16 when it begins.
  auto* top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  running.fiber.context = top;
#else
  getcontext(&running.fiber.context);
  running.fiber.context.uc_stack.ss_sp = stack + 4096;
  running.fiber.context.uc_stack.ss_size = kStack - 4096;
  running.fiber.context.uc_link = nullptr;
  makecontext(&running.fiber.context, run_thread, 0);
#endif
}

// The first and last thing a fiber does.
void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  block.body(block.arguments);
  block.running->state = State::kFinished;
  switch_to(block.running->fiber, block.scheduler, nullptr, true);
  __builtin_unreachable();
}

// Back to the scheduler until the thread's state is kReady again.
void suspend(State state, Place place) {
  block.running->state = state;
  block.running->place = place;
  switch_to(block.running->fiber, block.scheduler, nullptr, false);
}

// Ends the launch: the calling thread never goes on.
[[noreturn]] void fail(const std::string& what) {
  if (block.failure.empty()) block.failure = what;
  suspend(State::kInWarp, {"", 0});
  __builtin_unreachable();
}

std::string where() {
  std::ostringstream text;
  const uint3 b = position.block, t = block.running->thread.index;
  text << "block (" << b.x << ", " << b.y << ", " << b.z << "), thread (" << t.x << ", " << t.y << ", " << t.z << ")";
  return text.str();
}

// ---- meetings of a warp ----

void conclude(Meeting& meeting);

void meet(Meeting::Kind kind, unsigned mask, size_t size, int variant, const Meeting::Brought& brought) {
  const int number = current->number, lane = number % kWarp;
  const unsigned here = 1u << lane;
  if ((mask & here) == 0) {
    fail(told(brought.place) + ": a lane calls with a mask that leaves it out, in " + where());
  }
  auto& meetings = block.meetings[number / kWarp];
  Meeting* meeting = nullptr;
  for (Meeting& open : meetings) {
    if (open.mask == mask && (open.arrived & here) == 0) meeting = &open;
  }
  if (meeting == nullptr) {
    meetings.push_back({kind, mask});
    meeting = &meetings.back();
    meeting->size = size;
    meeting->variant = variant;
  }
  if (meeting->kind != kind || meeting->size != size || meeting->variant != variant) {
    fail(told(brought.place) + ": lanes of a warp call different functions at once, in " + where());
  }
  meeting->arrived |= here;
  meeting->brought[lane] = brought;
  if (meeting->arrived != mask) {
    suspend(State::kInWarp, brought.place);
    return;
  }
  conclude(*meeting);
  for (int other = 0; other < kWarp; ++other) {
    if ((mask >> other & 1) != 0 && other != lane) {
      block.threads[number / kWarp * kWarp + other].state = State::kReady;
    }
  }
  meetings.erase(meetings.begin() + (meeting - meetings.data()));
}

float from_half(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -tiny : tiny;
}

struct Halves {
  float value[1 << 16];
  Halves() {
    for (int i = 0; i < 1 << 16; ++i) value[i] = from_half(static_cast<uint16_t>(i));
  }
} const halves;

// Two elements of 16 bits, or one of 32, as floats.
template <Matrix kType>
void unpack(uint32_t bits, float* out, int stride) {
  if constexpr (kType == Matrix::kBf16) {
    out[0] = __uint_as_float(bits << 16);
    out[stride] = __uint_as_float(bits & 0xffff0000u);
  } else if constexpr (kType == Matrix::kFp16) {
    out[0] = halves.value[bits & 0xffff];
    out[stride] = halves.value[bits >> 16];
  } else {
    out[0] = __uint_as_float(bits & 0xffffe000u);
  }
}

template <Matrix kType>
void conclude_product(Meeting& meeting) {
  constexpr bool kWide = kType == Matrix::kTf32;
  constexpr int kDepth = kWide ? 8 : 16;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& brought = meeting.brought[lane];
    const auto* parts_a = static_cast<const uint32_t*>(brought.a);
    const auto* parts_b = static_cast<const uint32_t*>(brought.b);
    const auto* sums = static_cast<const float*>(brought.value);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int k = kWide ? t + i / 2 * 4 : 2 * t + i / 2 * 8;
      unpack<kType>(parts_a[i], &a[g + i % 2 * 8][k], 1);
      d[g + i / 2 * 8][2 * t + i % 2] = sums[i];
    }
    for (int i = 0; i < 2; ++i) {
      const int k = kWide ? t + i * 4 : 2 * t + i * 8;
      unpack<kType>(parts_b[i], &b[k][g], 8);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* sums = static_cast<float*>(meeting.brought[lane].value);
    for (int i = 0; i < 4; ++i) sums[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

// Lane 8 m + r brought the address of row r of matrix m; lane l gets elements 2 (l % 4) and the next of row
// l / 4 of each, or transposed: rows 2 (l % 4) and the next of column l / 4.
void conclude_load(Meeting& meeting) {
  uint16_t rows[kWarp][8];
  const int count = static_cast<int>(meeting.size);
  for (int lane = 0; lane < 8 * count; ++lane) std::memcpy(rows[lane], meeting.brought[lane].a, 16);
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* out = static_cast<uint32_t*>(meeting.brought[lane].value);
    const int first = 2 * (lane % 4), other = lane / 4;
    for (int m = 0; m < count; ++m) {
      const uint16_t low = meeting.variant != 0 ? rows[8 * m + first][other] : rows[8 * m + other][first];
      const uint16_t high = meeting.variant != 0 ? rows[8 * m + first + 1][other] : rows[8 * m + other][first + 1];
      out[m] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

void conclude(Meeting& meeting) {
  switch (meeting.kind) {
    case Meeting::Kind::kSync:
      return;
    case Meeting::Kind::kBallot: {
      unsigned votes = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((meeting.mask >> lane & 1) != 0 && meeting.brought[lane].number != 0) votes |= 1u << lane;
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((meeting.mask >> lane & 1) != 0) *static_cast<unsigned*>(meeting.brought[lane].value) = votes;
      }
      return;
    }
    case Meeting::Kind::kShuffle: {
      unsigned char values[kWarp][8];
      for (int lane = 0; lane < kWarp; ++lane) {
        std::memset(values[lane], kPoison, sizeof values[lane]);
        if ((meeting.mask >> lane & 1) != 0) std::memcpy(values[lane], meeting.brought[lane].value, meeting.size);
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((meeting.mask >> lane & 1) == 0) continue;
        std::memcpy(meeting.brought[lane].value, values[meeting.brought[lane].number & 31], meeting.size);
      }
      return;
    }
    case Meeting::Kind::kMultiply:
      if (meeting.variant == static_cast<int>(Matrix::kBf16)) return conclude_product<Matrix::kBf16>(meeting);
      if (meeting.variant == static_cast<int>(Matrix::kFp16)) return conclude_product<Matrix::kFp16>(meeting);
      return conclude_product<Matrix::kTf32>(meeting);
    case Meeting::Kind::kLoad:
      return conclude_load(meeting);
  }
}

// ---- the scheduler ----

// 0 to count - 1 in the order of the schedule.
std::vector<int> arranged(size_t count) {
  std::vector<int> numbers(count);
  for (size_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<int>(order == Order::kReverse ? count - 1 - i : i);
  }
  if (order == Order::kRandom) {
    // Not std::shuffle, whose order differs between standard libraries.
    for (size_t left = count; left > 1; --left) std::swap(numbers[left - 1], numbers[random_bits() % left]);
  }
  return numbers;
}

// Runs the ready threads of a warp, over and over, until none is.
void run_warp(int warp) {
  const int first = warp * kWarp;
  const size_t count = std::min<size_t>(kWarp, block.threads.size() - first);
  std::vector<int> lanes = arranged(count);
  for (bool again = true; again;) {
    again = false;
    for (int lane : lanes) {
      Running& thread = block.threads[first + lane];
      if (thread.state != State::kReady) continue;
      block.running = &thread;
      current = &thread.thread;
      switch_to(block.scheduler, thread.fiber, stacks.of(thread.thread.number), false);
      if (!block.failure.empty()) return;
      again = true;
    }
    if (order == Order::kRandom) lanes = arranged(count);
  }
}

// Every thread stands still: lets them over the barrier if they are all at the same, else says where they are.
void open_barrier() {
  std::map<std::pair<std::string, int>, int> waiting;
  bool all_at_barrier = true;
  for (const Running& thread : block.threads) {
    if (thread.state == State::kFinished) continue;
    all_at_barrier = all_at_barrier && thread.state == State::kAtBarrier;
    ++waiting[{told(thread.place), static_cast<int>(thread.state)}];
  }
  if (all_at_barrier && waiting.size() == 1) {
    for (Running& thread : block.threads) {
      if (thread.state == State::kAtBarrier) thread.state = State::kReady;
    }
    return;
  }
  std::ostringstream text;
  const uint3 b = position.block;
  text << "deadlock in block (" << b.x << ", " << b.y << ", " << b.z << "):";
  const char* separator = " ";
  for (const auto& [place, count] : waiting) {
    text << separator << count << (count == 1 ? " thread waits" : " threads wait") << " at " << place.first
         << (place.second == static_cast<int>(State::kInWarp) ? " for lanes of their warp" : " for the block");
    separator = ", ";
  }
  block.failure = text.str();
}

void run_block(dim3 threads) {
  std::memset(shared.get(), kPoison, shared_size);
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  block.threads.resize(count);
  block.meetings.assign((count + kWarp - 1) / kWarp, {});
  for (size_t number = 0; number < count; ++number) {
    Running& thread = block.threads[number];
    const auto n = static_cast<unsigned>(number);
    thread.thread = {{n % threads.x, n / threads.x % threads.y, n / threads.x / threads.y}, static_cast<int>(n)};
    thread.state = State::kReady;
    thread.groups.clear();
    thread.open.clear();
    prepare(thread);
  }
  for (;;) {
    bool finished = true;
    for (int warp : arranged(block.meetings.size())) {
      run_warp(warp);
      if (!block.failure.empty()) throw std::runtime_error(block.failure);
    }
    for (const Running& thread : block.threads) finished = finished && thread.state == State::kFinished;
    if (finished) return;
    open_barrier();
    if (!block.failure.empty()) throw std::runtime_error(block.failure);
  }
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("a GPU would refuse the launch: " + what);
}

}  // namespace

void barrier(const char* file, int line) { suspend(State::kAtBarrier, {file, line}); }

void warp_barrier(unsigned mask, const char* file, int line) {
  meet(Meeting::Kind::kSync, mask, 0, 0, {{file, line}, nullptr, nullptr, nullptr, 0});
}

unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  unsigned votes = 0;
  meet(Meeting::Kind::kBallot, mask, 0, 0, {{file, line}, &votes, nullptr, nullptr, predicate ? 1 : 0});
  return votes;
}

void shuffle(unsigned mask, void* value, size_t size, int source, const char* file, int line) {
  meet(Meeting::Kind::kShuffle, mask, size, 0, {{file, line}, value, nullptr, nullptr, source});
}

void multiply(Matrix type, float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  meet(Meeting::Kind::kMultiply, 0xffffffffu, 0, static_cast<int>(type), {{file, line}, d, a, b, 0});
}

void load_matrices(int count, bool transposed, uint32_t* out, const void* row, const char* file, int line) {
  if (lane() < 8 * count && reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail(told({file, line}) + ": a row of ldmatrix must begin at a multiple of 16 bytes, in " + where());
  }
  meet(Meeting::Kind::kLoad, 0xffffffffu, count, transposed ? 1 : 0, {{file, line}, out, row, nullptr, 0});
}

void copy_async(void* target, const void* source, size_t size, bool valid, const char* file, int line) {
  const auto misaligned = [size](const void* address) { return reinterpret_cast<uintptr_t>(address) % size != 0; };
  if (misaligned(target) || (valid && misaligned(source))) {
    fail(told({file, line}) + ": cp.async needs addresses that are multiples of " + std::to_string(size) +
         " bytes, in " + where());
  }
  const auto* begin = shared.get();
  const auto* address = static_cast<const unsigned char*>(target);
  if (address < begin || address + size > begin + shared_size) {
    fail(told({file, line}) + ": cp.async must write into the block's shared memory, in " + where());
  }
#if defined(__SANITIZE_ADDRESS__)
  // It is read when it lands: an address that cannot be is reported here, with the line of the copy.
  unsigned char probe[16];
  if (valid) std::memcpy(probe, source, size);
#endif
  std::memset(target, kPoison, size);
  block.running->open.push_back({target, source, size, valid});
}

void commit_copies() {
  block.running->groups.push_back(std::move(block.running->open));
  block.running->open.clear();
}

void wait_copies(int pending) {
  auto& groups = block.running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.target, copy.source, copy.size);
      } else {
        std::memset(copy.target, 0, copy.size);
      }
    }
    groups.erase(groups.begin());
  }
}

void* shared_memory(size_t size, const char* file, int line) {
  if (size > shared_size) {
    fail(told({file, line}) + ": the kernel uses " + std::to_string(size) + " bytes of shared memory, and its launch has " +
         std::to_string(shared_size));
  }
  return shared.get();
}

void run(dim3 grid, dim3 threads, size_t shared_bytes, Body body, const void* arguments) {
  require(grid.x > 0 && grid.y > 0 && grid.z > 0, "its grid is empty");
  require(grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
          "its grid is " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
              " blocks, the limits are 2147483647 x 65535 x 65535");
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  require(count > 0 && count <= kMaxThreads && threads.z <= kMaxBlockZ,
          "a block has " + std::to_string(count) + " threads, the limits are 1 to 1024");
  require(shared_bytes <= kMaxShared, "a block has " + std::to_string(shared_bytes) +
                                          " bytes of shared memory, the limit is " + std::to_string(kMaxShared));
  // Its own allocation, of just the size asked for: AddressSanitizer sees what lies beyond.
  shared.reset(static_cast<unsigned char*>(operator new[](shared_bytes, kSharedAlignment)));
  shared_size = shared_bytes;
  block.failure.clear();
  block.body = body;
  block.arguments = arguments;
  position.grid = grid;
  position.threads = threads;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  for (int number : arranged(blocks)) {
    const size_t row = number / static_cast<size_t>(grid.x);
    position.block = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(row % grid.y),
                      static_cast<unsigned>(row / grid.y)};
    run_block(threads);
  }
}

void set_schedule(int kind, int64_t seed) {
  if (kind < 0 || kind > 2) TVM_FFI_THROW(ValueError) << "a schedule is 0 forward, 1 reverse, 2 random, got " << kind;
  order = static_cast<Order>(kind);
  random_bits.seed(static_cast<uint64_t>(seed));
}

}  // namespace mla::host

namespace mla {

float to_float(fp16 value) { return host::halves.value[value.bits]; }

template <>
fp16 from_float<fp16>(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: a multiple of 2^-24, which adding 0.5 rounds to (0.5's last bit is 2^-24).
    const unsigned sum = __float_as_uint(__uint_as_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace mla

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_schedule, mla::host::set_schedule)

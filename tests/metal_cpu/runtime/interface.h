// What a compiled kernel, the runtime and the Python side say to each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Code that works on behalf of the hardware, so it is not checked. An unchecked function is never inlined
// into a kernel.
#define METAL_CPU_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

namespace metal_cpu {

constexpr int kSimdWidth = 32;
constexpr int kMaxThreads = 1024;            // in one threadgroup
constexpr size_t kThreadgroupBytes = 32768;  // of threadgroup memory
constexpr int kSlotBytes = 64;               // the largest value a lane can post at a meeting

// The values behind Metal's thread attributes, for one thread.
struct Thread {
  uint32_t position_in_grid[3];
  uint32_t position_in_threadgroup[3];
  uint32_t threadgroup_position[3];
  uint32_t threadgroups[3];
  uint32_t grid[3];
  uint32_t threads[3];           // of this threadgroup, smaller at the edge of the grid
  uint32_t dispatch_threads[3];  // of a full threadgroup
  uint32_t index;                // in the threadgroup
  uint32_t lane;
  uint32_t simdgroup;
  uint32_t simdgroups;
  uint32_t dispatch_simdgroups;
};

// Where lanes meet. The order is known to launch.py.
enum Meeting : int {
  kThreadgroupBarrier,
  kSimdgroupBarrier,
  kSimdOperation,
  kMatrixLoad,
  kMatrixStore,
  kMatrixMultiply,
  kMeetingKinds,
};

// What is counted, once for each simdgroup that executes it. The order is known to launch.py.
enum Operation : int {
  kReduction,      // simd_sum, simd_max and the like, and prefix sums
  kQuadReduction,  // over 4 lanes
  kVote,           // simd_ballot, simd_any, simd_all
  kBroadcast,      // a shuffle with the same source in all lanes
  kShuffle,        // from lane ^ mask or lane +- delta, the same mask or delta in all lanes
  kLaneShuffle,    // any other shuffle
  kExponential,    // exp, exp2, exp10
  kOperationKinds,
};

enum MemFlags : int { kMemNone = 0, kMemDevice = 1, kMemThreadgroup = 2 };

struct Place {  // in the kernel's source
  const char* file;
  int line, column;
};

// One call of a simd operation or barrier. `detail` holds the mem_flags, or the size of the
// value. `operation_kind` and `argument` serve the counts.
struct Site {
  const char* operation;
  Place place;
  Meeting kind;
  int detail;
  Operation operation_kind;  // of simd operations; kLaneShuffle: `argument` is an index
  int argument;              // of shuffles: the index, mask or delta
};

// What the lanes of a simdgroup post at a meeting, and the one value that comes out of it.
struct Exchange {
  alignas(kSlotBytes) char slot[kSimdWidth][kSlotBytes];
  alignas(kSlotBytes) char result[kSlotBytes];
  uint32_t lanes;  // bit i: lane i exists

  template <class T> METAL_CPU_UNCHECKED T& at(int lane) { return *reinterpret_cast<T*>(slot[lane]); }
  template <class T> METAL_CPU_UNCHECKED T& out() { return *reinterpret_cast<T*>(result); }
  METAL_CPU_UNCHECKED bool full() const { return lanes == ~0u; }
};
using Combine = void (*)(Exchange&);

// Buffer and Launch are filled in and read back by launch.py.
struct Buffer {
  char* data;
  uint64_t bytes;
  uint8_t* touched;  // one byte for each byte of an input, set when it is loaded; may be null
  uint64_t loads, loaded_bytes, stores, stored_bytes;
  uint32_t writable;
  uint32_t initialised;  // outputs: an init_value was given
  uint64_t itemsize;
  const char* name;
};

enum Flags : uint32_t { kCheckMemory = 1, kCheckLockstep = 2, kAllowEqualWrites = 4 };

struct Launch {
  Buffer* buffers;
  uint64_t buffer_count;
  uint32_t grid[3];
  uint32_t threadgroup[3];
  uint64_t seed;  // 0: threads run in ascending order, 1: descending, others: shuffled
  uint32_t flags;
  uint32_t report_bytes;
  char* report;  // faults, one a line; "@0x1f" stands for a code address
  uint64_t threadgroups;
  uint64_t threadgroup_bytes;
  uint64_t meetings[kMeetingKinds];  // counted once for each simdgroup, barriers once for each threadgroup
  uint64_t operations[kOperationKinds];
};

}  // namespace metal_cpu

// The runtime, as seen from a kernel.
extern "C" {
const metal_cpu::Thread* metal_cpu_thread();
metal_cpu::Exchange* metal_cpu_meet(const metal_cpu::Site* site, const void* value, size_t bytes,
                                    metal_cpu::Combine combine);
void* metal_cpu_threadgroup_memory(const char* name, size_t bytes, size_t alignment);
void metal_cpu_atomic_access(const void* address, size_t bytes, int reads, int writes);
void metal_cpu_fail(const char* kind, const char* what, const metal_cpu::Place* place);
__attribute__((nomerge)) void metal_cpu_count(metal_cpu::Operation operation);  // without a meeting
void metal_cpu_loop(int event);  // 0: a loop begins, 1: an iteration begins, 2: the loop ends
void metal_cpu_multiply_8x8(const float* a, const float* b, const float* c, float* d);
void metal_cpu_entry(void* const* buffers, const metal_cpu::Thread* thread);
}

// Runs a launch: each thread is a fiber, each simd operation or barrier a meeting where fibers wait for each
// other. Compiled without sanitizers and linked into every kernel library.
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

// Saves the callee-saved registers on the running stack, keeps its pointer in *save, and goes on with `load`.
extern "C" void metal_cpu_switch(void** save, void* load);
asm(R"(
.text
.globl metal_cpu_switch
.hidden metal_cpu_switch
.type metal_cpu_switch, @function
metal_cpu_switch:
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
)");

namespace metal_cpu {

Launch* launch;
Fiber* fibers;
Simdgroup* simdgroups;
Fiber* current;
uint32_t group;
Epochs group_epochs;
char* stacks;

namespace {

int fiber_count, simdgroup_count;
void* scheduler_stack;
bool stopped;
uint64_t random_state;
void** buffer_pointers;
std::vector<ThreadgroupArray> threadgroup_arrays;

// The lanes of the running simdgroup that still have to run before their next meeting.
Fiber* sweep[kSimdWidth];
int sweep_next, sweep_count;
uint64_t sweeps;

// How often a call was executed in the running sweep: by the running lane, and by the busiest one.
struct Calls {
  uint64_t sweep;
  const Fiber* lane;
  uint32_t own, most;
};
std::unordered_map<void*, Calls> calls;  // by return address

uint32_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 2685821657736338717ull) >> 33;
}

template <class T> void arrange(T* items, int count) {
  if (launch->seed == 1) std::reverse(items, items + count);
  if (launch->seed < 2) return;
  for (int i = count - 1; i > 0; i--) std::swap(items[i], items[random_number() % (i + 1)]);
}

// Goes on with the next lane of the sweep, or with the scheduler after the last one.
void leave_fiber() {
  Fiber* self = current;
  if (++sweep_next < sweep_count) {
    current = sweep[sweep_next];
    metal_cpu_switch(&self->stack_pointer, current->stack_pointer);
  } else {
    metal_cpu_switch(&self->stack_pointer, scheduler_stack);
  }
}

void fiber_main() {
  metal_cpu_entry(buffer_pointers, &current->thread);
  current->state = Fiber::kReturned;
  leave_fiber();
  abort();
}

void start_fiber(int i) {
  // Stack tops are staggered: at equal offsets they would all fall into the same cache sets.
  char* top = stacks + (i + 1) * kStackBytes - 64 - (i * 320) % 4096;
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(fiber_main);
  for (int k = 0; k < 6; k++) *--stack = nullptr;
  fibers[i].stack_pointer = stack;
  fibers[i].state = Fiber::kRunning;
  fibers[i].loop_depth = 0;
}

// FNV-1a of the return addresses and of the loop counters: equal for lanes that came to a meeting the same
// way.
uint64_t path_hash(const Fiber& fiber, void** frame) {
  constexpr uint64_t prime = 1099511628211ull;
  uint64_t hash = 14695981039346656037ull;
  char* low = stacks + (&fiber - fibers) * kStackBytes;
  char* high = low + kStackBytes;
  for (char* at = (char*)frame; at > low && at < high - 16 && frame[1]; at = (char*)frame) {
    hash = (hash ^ (uint64_t)frame[1]) * prime;
    frame = (void**)frame[0];
  }
  for (int i = 0; i < std::min(fiber.loop_depth, 32); i++) hash = (hash ^ (fiber.iterations[i] + 1)) * prime;
  return hash;
}

bool same_site(const Site& a, const Site& b) {
  return a.kind == b.kind && a.detail == b.detail && a.place.line == b.place.line &&
         a.place.column == b.place.column && !strcmp(a.place.file, b.place.file);
}

void report_divergence(int simdgroup, const Fiber& a, const Fiber& b) {
  const Place &at = a.site.place, &other = b.site.place;
  if (b.state == Fiber::kReturned) {
    report("divergence",
           "simdgroup %d of threadgroup %u: lane %u waits in %s at %s:%d, but lane %u has returned",
           simdgroup, group, a.thread.lane, a.site.operation, at.file, at.line, b.thread.lane);
  } else {
    report("divergence",
           "simdgroup %d of threadgroup %u: lane %u waits in %s at %s:%d:%d, lane %u in %s at %s:%d:%d%s",
           simdgroup, group, a.thread.lane, a.site.operation, at.file, at.line, at.column, b.thread.lane,
           b.site.operation, other.file, other.line, other.column,
           same_site(a.site, b.site) ? " (by another call path, or in another loop iteration)" : "");
  }
}

// What the simd operation was at which the lanes met. False if they asked a broadcast for different lanes.
bool count_operation(const Fiber* lanes, int count) {
  const Site& site = lanes[0].site;
  bool same = true, exclusive = true;
  for (int i = 1; i < count; i++) {
    same &= lanes[i].site.argument == site.argument;
    exclusive &= (lanes[i].site.argument ^ i) == site.argument;
  }
  Operation what = site.operation_kind;
  if (what == kShuffle && !same) what = kLaneShuffle;
  else if (what == kLaneShuffle && (same || exclusive)) what = same ? kBroadcast : kShuffle;
  launch->operations[what]++;
  return what != kBroadcast || same;
}

// Runs the lanes of a simdgroup up to their next meeting, and holds that meeting.
void run_simdgroup(int index) {
  Simdgroup& simdgroup = simdgroups[index];
  Fiber* lanes = fibers + simdgroup.first;
  for (int i = 0; i < simdgroup.lanes; i++) sweep[i] = lanes + i;
  sweep_count = simdgroup.lanes;
  sweep_next = 0;
  sweeps++;
  arrange(sweep, sweep_count);
  for (int i = 0; i < sweep_count; i++) sweep[i]->state = Fiber::kRunning;
  current = sweep[0];
  metal_cpu_switch(&scheduler_stack, current->stack_pointer);
  current = nullptr;
  if (stopped) return;

  const Fiber* waiting = nullptr;
  int returned = 0;
  for (int i = 0; i < simdgroup.lanes; i++) {
    if (lanes[i].state == Fiber::kReturned)
      returned++;
    else if (!waiting)
      waiting = &lanes[i];
  }
  if (!waiting) {
    simdgroup.state = Simdgroup::kReturned;
    return;
  }
  for (int i = 0; i < simdgroup.lanes; i++) {
    const Fiber& fiber = lanes[i];
    if (fiber.state == Fiber::kReturned || !same_site(fiber.site, waiting->site) ||
        fiber.path != waiting->path) {
      report_divergence(index, *waiting, fiber);
      return stop();
    }
  }
  if (waiting->site.kind == kThreadgroupBarrier) {
    simdgroup.state = Simdgroup::kAtBarrier;
    return;
  }
  launch->meetings[waiting->site.kind]++;
  if (waiting->site.kind == kSimdOperation && !count_operation(lanes, simdgroup.lanes)) {
    report("divergence", "simdgroup %d of threadgroup %u: lanes of %s at %s:%d ask for different lanes", index,
           group, waiting->site.operation, waiting->site.place.file, waiting->site.place.line);
    return stop();
  }
  if (waiting->site.kind == kSimdgroupBarrier) simdgroup.epochs.advance(waiting->site.detail);
  simdgroup.turn ^= 1;
}

// All simdgroups wait at a threadgroup barrier, or have returned. False when nobody waits any more.
bool pass_barrier() {
  const Fiber* waiting = nullptr;
  for (int i = 0; i < simdgroup_count; i++) {
    if (simdgroups[i].state == Simdgroup::kAtBarrier && !waiting) waiting = &fibers[simdgroups[i].first];
  }
  if (!waiting) return false;
  for (int i = 0; i < simdgroup_count; i++) {
    const Fiber& other = fibers[simdgroups[i].first];
    const Place &at = waiting->site.place, &there = other.site.place;
    if (simdgroups[i].state == Simdgroup::kReturned) {
      report(
          "divergence",
          "threadgroup %u: simdgroup %u waits in threadgroup_barrier at %s:%d, but simdgroup %d has returned",
          group, waiting->thread.simdgroup, at.file, at.line, i);
      stop();
      return false;
    }
    if (!same_site(other.site, waiting->site) || other.path != waiting->path) {
      report("divergence",
             "threadgroup %u: simdgroup %u waits in threadgroup_barrier at %s:%d, simdgroup %d in another at "
             "%s:%d",
             group, waiting->thread.simdgroup, at.file, at.line, i, there.file, there.line);
      stop();
      return false;
    }
    simdgroups[i].state = Simdgroup::kReady;
    simdgroups[i].turn ^= 1;
  }
  launch->meetings[kThreadgroupBarrier]++;
  group_epochs.advance(waiting->site.detail);
  return true;
}

void run_threadgroup() {
  simdgroup_count = (fiber_count + kSimdWidth - 1) / kSimdWidth;
  for (int i = 0; i < simdgroup_count; i++) {
    Simdgroup& simdgroup = simdgroups[i];
    simdgroup.first = i * kSimdWidth;
    simdgroup.lanes = std::min(kSimdWidth, fiber_count - simdgroup.first);
    simdgroup.state = Simdgroup::kReady;
    simdgroup.turn = 0;
    simdgroup.epochs = {};
    for (Exchange& exchange : simdgroup.exchange)
      exchange.lanes = simdgroup.lanes == 32 ? ~0u : (1u << simdgroup.lanes) - 1;
  }
  for (int i = 0; i < fiber_count; i++) start_fiber(i);
  for (const ThreadgroupArray& array : threadgroup_arrays) memset(array.data, 0xFF, array.bytes);
  group_epochs = {};
  while (!stopped) {
    int ready[kMaxThreads / kSimdWidth], count = 0;
    for (int i = 0; i < simdgroup_count; i++) {
      if (simdgroups[i].state == Simdgroup::kReady) ready[count++] = i;
    }
    if (count) {
      int choice = launch->seed == 0 ? 0 : launch->seed == 1 ? count - 1 : random_number() % count;
      run_simdgroup(ready[choice]);
    } else if (!pass_barrier()) {
      return;
    }
  }
}

// Cuts the threadgroup at `position` to the grid, as dispatchThreads does, and fills in the thread
// attributes.
void lay_out_threadgroup(const uint32_t position[3], const uint32_t full[3], const uint32_t groups[3]) {
  uint32_t size[3];
  for (int d = 0; d < 3; d++) size[d] = std::min(full[d], launch->grid[d] - position[d] * full[d]);
  fiber_count = size[0] * size[1] * size[2];
  for (uint32_t i = 0; i < (uint32_t)fiber_count; i++) {
    Thread& thread = fibers[i].thread;
    const uint32_t local[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      thread.position_in_grid[d] = position[d] * full[d] + local[d];
      thread.position_in_threadgroup[d] = local[d];
      thread.threadgroup_position[d] = position[d];
      thread.threadgroups[d] = groups[d];
      thread.grid[d] = launch->grid[d];
      thread.threads[d] = size[d];
      thread.dispatch_threads[d] = full[d];
    }
    thread.index = i;
    thread.lane = i % kSimdWidth;
    thread.simdgroup = i / kSimdWidth;
    thread.simdgroups = (fiber_count + kSimdWidth - 1) / kSimdWidth;
    thread.dispatch_simdgroups = (full[0] * full[1] * full[2] + kSimdWidth - 1) / kSimdWidth;
  }
}

void run_grid() {
  uint32_t full[3], groups[3];
  for (int d = 0; d < 3; d++) {
    full[d] = std::min(launch->threadgroup[d], launch->grid[d]);
    groups[d] = full[d] ? (launch->grid[d] + full[d] - 1) / full[d] : 0;
  }
  std::vector<uint32_t> order(size_t{groups[0]} * groups[1] * groups[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  arrange(order.data(), order.size());
  for (uint32_t index : order) {
    group = index;
    const uint32_t position[3] = {index % groups[0], index / groups[0] % groups[1],
                                  index / groups[0] / groups[1]};
    lay_out_threadgroup(position, full, groups);
    run_threadgroup();
    if (stopped) return;
    launch->threadgroups++;
  }
}

}  // namespace

void report(const char* kind, const char* format, ...) {
  size_t used = strlen(launch->report), room = launch->report_bytes - used;
  size_t head = snprintf(launch->report + used, room, "%s: ", kind);
  if (head >= room) return;
  va_list arguments;
  va_start(arguments, format);
  size_t body = vsnprintf(launch->report + used + head, room - head, format, arguments);
  va_end(arguments);
  if (head + body + 1 < room) strcat(launch->report, "\n");
}

void stop() {
  stopped = true;
  if (!current) return;
  void* abandoned;
  metal_cpu_switch(&abandoned, scheduler_stack);
}

const char* running_thread() {
  static char words[96];
  snprintf(words, sizeof words, "thread %u (simdgroup %u, lane %u) of threadgroup %u", current->thread.index,
           current->thread.simdgroup, current->thread.lane, group);
  return words;
}

}  // namespace metal_cpu

using namespace metal_cpu;

const Thread* metal_cpu_thread() { return &current->thread; }

__attribute__((noinline)) Exchange* metal_cpu_meet(const Site* site, const void* value, size_t bytes,
                                                   Combine combine) {
  Fiber& fiber = *current;
  Simdgroup& simdgroup = simdgroups[fiber.thread.simdgroup];
  Exchange& exchange = simdgroup.exchange[simdgroup.turn];
  fiber.site = *site;
  fiber.state = Fiber::kWaiting;
  fiber.path = launch->flags & kCheckLockstep ? path_hash(fiber, (void**)__builtin_frame_address(0)) : 0;
  if (bytes) memcpy(exchange.slot[fiber.thread.lane], value, bytes);
  leave_fiber();
  // The first lane to go on combines what was posted; nobody has read the result yet.
  if (combine && sweep_next == 0) combine(exchange);
  return &exchange;
}

void* metal_cpu_threadgroup_memory(const char* name, size_t bytes, size_t alignment) {
  constexpr size_t arena_bytes = 1 << 20, gap = 1024;  // a gap, so that no overrun lands in another array
  static char* arena =
      (char*)mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  static size_t used = gap;
  size_t rounded = (bytes + 63) & ~size_t{63};
  if (used + rounded + gap > arena_bytes)
    metal_cpu_fail("threadgroup memory", "far more than 32 KB", nullptr);
  char* data = arena + used;
  used += rounded + gap;
  memset(data, 0xFF, bytes);
  threadgroup_arrays.push_back({name, data, bytes, alignment});
  checker_add_threadgroup_array(threadgroup_arrays.back());
  return data;
}

void metal_cpu_fail(const char* kind, const char* what, const Place* place) {
  if (place)
    report(kind, "%s at %s:%d by %s", what, place->file, place->line, running_thread());
  else
    report(kind, "%s by %s", what, running_thread());
  stop();
}

// Lanes of a simdgroup execute a call together where they take it together: as often as the lane that takes it
// most often, between two meetings.
__attribute__((noinline)) void metal_cpu_count(Operation operation) {
  Calls& made = calls[__builtin_return_address(0)];
  if (made.sweep != sweeps) made = {sweeps, nullptr, 0, 0};
  if (made.lane != current) made.lane = current, made.own = 0;
  if (++made.own > made.most) made.most = made.own, launch->operations[operation]++;
}

void metal_cpu_loop(int event) {
  Fiber& fiber = *current;
  if (event == 0 && fiber.loop_depth++ < 32) fiber.iterations[fiber.loop_depth - 1] = 0;
  if (event == 1 && fiber.loop_depth <= 32) fiber.iterations[fiber.loop_depth - 1]++;
  if (event == 2) fiber.loop_depth--;
}

void metal_cpu_multiply_8x8(const float* a, const float* b, const float* c, float* d) {
  typedef float Row __attribute__((ext_vector_type(8), aligned(4)));
  const Row* rows = reinterpret_cast<const Row*>(b);
  for (int i = 0; i < 8; i++) {
    Row sum = reinterpret_cast<const Row*>(c)[i];
    for (int k = 0; k < 8; k++) sum = __builtin_elementwise_fma((Row)a[i * 8 + k], (Row)rows[k], sum);
    reinterpret_cast<Row*>(d)[i] = sum;
  }
}

// Returns 0 when nothing was reported.
extern "C" __attribute__((visibility("default"))) int metal_cpu_launch(Launch* request) {
  launch = request;
  launch->report[0] = 0;
  stopped = false;
  random_state = launch->seed * 0x9E3779B97F4A7C15ull + 1;
  if (!stacks) {
    stacks = (char*)mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fibers = new Fiber[kMaxThreads]();
    simdgroups = new Simdgroup[kMaxThreads / kSimdWidth]();
  }
  std::vector<void*> pointers(launch->buffer_count);
  for (size_t i = 0; i < pointers.size(); i++) pointers[i] = launch->buffers[i].data;
  buffer_pointers = pointers.data();

  checker_begin();
  for (const ThreadgroupArray& array : threadgroup_arrays) checker_add_threadgroup_array(array);
  run_grid();
  for (const ThreadgroupArray& array : threadgroup_arrays) launch->threadgroup_bytes += array.bytes;
  if (launch->threadgroup_bytes > kThreadgroupBytes) {
    report("threadgroup memory", "%zu bytes, and Metal has %zu", (size_t)launch->threadgroup_bytes,
           kThreadgroupBytes);
  }
  if (!stopped) checker_end();
  return launch->report[0] != 0;
}

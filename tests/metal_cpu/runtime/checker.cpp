// Judges every memory access of a checked kernel, and counts it.
// Kernels are compiled with -fsanitize=thread and a few of -fsanitize=undefined; the callbacks of those two
// are defined here, in place of the sanitizers' own runtimes, which know nothing of fibers, address spaces or
// mem_flags.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "internal.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this library, from the linker

namespace metal_cpu {
namespace {

// One earlier access. Threads are numbered from 1 over the whole grid; 0 means none.
struct Access {
  uint32_t thread;
  uint16_t group_epoch, simdgroup_epoch;
  uint32_t group() const { return (thread - 1) / kMaxThreads; }
  uint32_t simdgroup() const { return (thread - 1) / kSimdWidth; }
  bool operator==(const Access& other) const { return !memcmp(this, &other, sizeof *this); }
};
constexpr uint32_t kInitialised = ~0u;  // written before the launch, or by an atomic

// The past of one granule of memory: the last write, the last read since, and a read by another simdgroup and
// by another lane beside it. That is enough to find an unordered reader for any write.
struct Cell {
  Access write, read, read_elsewhere, read_beside;
};

struct Range {
  enum Kind { kInput, kOutput, kThreadgroup };
  uintptr_t begin, end;
  Kind kind;
  const char* name;
  Buffer* buffer;  // null for threadgroup arrays
  Cell* cells;     // one for each granule; null for inputs
  int shift;       // a granule is 1 << shift bytes: one element, or less after smaller accesses
};

std::vector<Range> ranges;
uint8_t likely_range[4096];  // by code address: one load or store in the source mostly goes to one buffer
int races;
constexpr int kMaxRaces = 4;

// With allow_equal_writes: a racing write that is innocent if it leaves the bytes as they were.
struct {
  const char* address = nullptr;
  size_t bytes;
  char before[16];
  char words[512];
} suspect;

const char* words_of(const Range& range) {
  static char words[128];
  const char* kinds[] = {"input", "output", "threadgroup array"};
  snprintf(words, sizeof words, "%s %s", kinds[range.kind], range.name);
  return words;
}

// A code address inside this library, of the call that returns to `pc`.
size_t code(const void* pc) { return (const char*)pc - 1 - &__ehdr_start; }

Range* find_range(uintptr_t address, const void* pc) {
  uint8_t& likely = likely_range[((uintptr_t)pc * 0x9E3779B1u >> 8) & 4095];
  if (likely < ranges.size() && address - ranges[likely].begin < ranges[likely].end - ranges[likely].begin)
    return &ranges[likely];
  for (size_t i = 0; i < ranges.size(); i++) {
    if (address >= ranges[i].begin && address < ranges[i].end) return &ranges[likely = i];
  }
  return nullptr;
}

void report_out_of_bounds(uintptr_t address, size_t bytes, const char* what, const void* pc) {
  const Range* nearest = nullptr;
  uintptr_t best = ~uintptr_t{0};
  for (const Range& range : ranges) {
    uintptr_t distance = address < range.begin  ? range.begin - address
                         : address >= range.end ? address - range.end
                                                : 0;
    if (distance < best) best = distance, nearest = &range;
  }
  if (nearest) {
    report("out of bounds", "%s of %zu bytes at byte %ld of %s, which has %zu bytes, @%#zx by %s", what,
           bytes, (long)(address - nearest->begin), words_of(*nearest),
           (size_t)(nearest->end - nearest->begin), code(pc), running_thread());
  } else {
    report("out of bounds", "%s of %zu bytes @%#zx by %s", what, bytes, code(pc), running_thread());
  }
  stop();
}

// Constant tables of the kernel, thread attributes, and what lanes have posted at a meeting.
bool ours(uintptr_t address, bool write) {
  if (!write && address >= (uintptr_t)&__ehdr_start && address < (uintptr_t)&_end) return true;
  return address - (uintptr_t)fibers < sizeof(Fiber) * kMaxThreads ||
         address - (uintptr_t)simdgroups < sizeof(Simdgroup) * kMaxThreads / kSimdWidth;
}

void settle_suspect() {
  if (memcmp(suspect.address, suspect.before, suspect.bytes) != 0 && races++ < kMaxRaces)
    report("race", "%s", suspect.words);
  suspect.address = nullptr;
}

void report_race(const char* what, const Range& range, size_t at, const Access& earlier, const void* pc,
                 uintptr_t address, size_t bytes) {
  if (races >= kMaxRaces) return;
  char words[sizeof suspect.words];
  snprintf(words, sizeof words, "%s at byte %zu of %s, @%#zx by %s, after thread %u of threadgroup %u", what,
           at, words_of(range), code(pc), running_thread(), (earlier.thread - 1) % kMaxThreads,
           earlier.group());
  if (!strcmp(what, "write after write") && launch->flags & kAllowEqualWrites &&
      bytes <= sizeof suspect.before) {
    suspect.address = (const char*)address;
    suspect.bytes = bytes;
    memcpy(suspect.before, suspect.address, bytes);
    strcpy(suspect.words, words);
  } else {
    races++;
    report("race", "%s", words);
  }
}

// Does the earlier access happen before what `now` does? Only barriers with the right mem_flags order
// threads.
bool ordered(const Access& earlier, const Access& now) {
  if (!earlier.thread || earlier.thread == now.thread || earlier.thread == kInitialised) return true;
  if (earlier.group() != now.group()) return false;
  if (earlier.group_epoch != now.group_epoch) return true;
  return earlier.simdgroup() == now.simdgroup() && earlier.simdgroup_epoch != now.simdgroup_epoch;
}

// Splits the granules of a range, for an access that is smaller or lies across them.
void refine(Range& range, int shift) {
  const size_t bytes = range.end - range.begin;
  Cell* cells = (Cell*)calloc((bytes >> shift) + 1, sizeof(Cell));
  for (size_t i = 0; i < bytes >> shift; i++) cells[i] = range.cells[i >> (range.shift - shift)];
  free(range.cells);
  range.cells = cells;
  range.shift = shift;
}

void judge(Range& range, uintptr_t address, size_t bytes, bool write, const void* pc) {
  const size_t offset = address - range.begin;
  if ((offset | bytes) & ((size_t{1} << range.shift) - 1)) refine(range, __builtin_ctzl(offset | bytes));
  const bool local = range.kind == Range::kThreadgroup;
  const Epochs& epochs = simdgroups[current->thread.simdgroup].epochs;
  const Access now = {group * kMaxThreads + current->thread.index + 1,
                      local ? group_epochs.threadgroup_memory : group_epochs.device_memory,
                      local ? epochs.threadgroup_memory : epochs.device_memory};
  for (size_t at = offset; at < offset + bytes; at += size_t{1} << range.shift) {
    Cell& cell = range.cells[at >> range.shift];
    if (!write && cell.read == now) continue;
    // What an earlier threadgroup left in threadgroup memory is nobody's.
    if (local && cell.write.thread && cell.write.group() != group) cell = {};
    if (write) {
      if (!ordered(cell.write, now)) {
        report_race("write after write", range, at, cell.write, pc, address, bytes);
      } else {
        for (const Access* earlier : {&cell.read, &cell.read_elsewhere, &cell.read_beside}) {
          if (ordered(*earlier, now)) continue;
          report_race("write after read", range, at, *earlier, pc, address, bytes);
          break;
        }
      }
      cell = {now, {}, {}, {}};
      continue;
    }
    if (!cell.write.thread) {
      if (races++ < kMaxRaces) {
        report("uninitialised", "read at byte %zu of %s, @%#zx by %s", at, words_of(range), code(pc),
               running_thread());
      }
      return;
    }
    if (!ordered(cell.write, now))
      return report_race("read after write", range, at, cell.write, pc, address, bytes);
    if (cell.read.thread && cell.read.thread != now.thread) {
      (cell.read.simdgroup() != now.simdgroup() ? cell.read_elsewhere : cell.read_beside) = cell.read;
    }
    cell.read = now;
  }
}

void access(const void* pointer, size_t bytes, bool write, const void* pc) {
  if (!current) return;
  if (suspect.address) settle_suspect();
  const uintptr_t address = (uintptr_t)pointer;
  const uintptr_t on_stacks = address - (uintptr_t)stacks;
  if (on_stacks < kStackBytes * kMaxThreads) {
    if (on_stacks / kStackBytes == (size_t)(current - fibers)) return;
    report("out of bounds", "%s in the private memory of another thread, @%#zx by %s",
           write ? "write" : "read", code(pc), running_thread());
    return stop();
  }
  Range* range = find_range(address, pc);
  if (!range || address + bytes > range->end) {
    if (!ours(address, write)) report_out_of_bounds(address, bytes, write ? "write" : "read", pc);
    return;
  }
  if (Buffer* buffer = range->buffer) {
    if (write)
      buffer->stores++, buffer->stored_bytes += bytes;
    else
      buffer->loads++, buffer->loaded_bytes += bytes;
    if (buffer->touched) memset(buffer->touched + (address - range->begin), 1, bytes);
  }
  if (range->cells) return judge(*range, address, bytes, write, pc);
  if (write) {
    report("write to input", "at byte %zu of %s, @%#zx by %s", (size_t)(address - range->begin), range->name,
           code(pc), running_thread());
    stop();
  }
}

}  // namespace

void checker_begin() {
  for (Range& range : ranges) free(range.cells);
  ranges.clear();
  races = 0;
  suspect.address = nullptr;
  if (!(launch->flags & kCheckMemory)) return;
  for (size_t i = 0; i < launch->buffer_count; i++) {
    Buffer& buffer = launch->buffers[i];
    const int shift = __builtin_ctzl(buffer.itemsize);
    const size_t granules = buffer.bytes >> shift;
    Cell* cells = buffer.writable ? (Cell*)calloc(granules + 1, sizeof(Cell)) : nullptr;
    if (buffer.initialised && cells) {
      for (size_t k = 0; k < granules; k++) cells[k].write.thread = kInitialised;
    }
    const uintptr_t begin = (uintptr_t)buffer.data;
    ranges.push_back({begin, begin + buffer.bytes, buffer.writable ? Range::kOutput : Range::kInput,
                      buffer.name, &buffer, cells, shift});
  }
}

void checker_add_threadgroup_array(const ThreadgroupArray& array) {
  if (!(launch->flags & kCheckMemory)) return;
  const int shift = __builtin_ctzl(array.alignment | array.bytes);
  Cell* cells = (Cell*)calloc((array.bytes >> shift) + 1, sizeof(Cell));
  const uintptr_t begin = (uintptr_t)array.data;
  ranges.push_back({begin, begin + array.bytes, Range::kThreadgroup, array.name, nullptr, cells, shift});
}

void checker_end() {
  if (suspect.address) settle_suspect();
  for (const Range& range : ranges) {
    if (range.kind != Range::kOutput) continue;
    size_t missing = 0, first = 0;
    const size_t granules = (range.end - range.begin) >> range.shift;
    for (size_t k = granules; k-- > 0;) {
      if (!range.cells[k].write.thread) missing++, first = k;
    }
    if (missing) {
      report("unwritten", "%zu of %zu elements of %s, the first at byte %zu", missing, granules,
             words_of(range), first << range.shift);
    }
  }
}

}  // namespace metal_cpu

using namespace metal_cpu;

// Atomics never race with each other; they must stay in bounds, and they leave memory initialised.
void metal_cpu_atomic_access(const void* pointer, size_t bytes, int reads, int writes) {
  if (!(launch->flags & kCheckMemory)) return;
  const uintptr_t address = (uintptr_t)pointer;
  const void* pc = __builtin_return_address(0);
  Range* range = find_range(address, pc);
  if (!range || address + bytes > range->end)
    return report_out_of_bounds(address, bytes, "atomic operation", pc);
  if (range->buffer) {
    if (reads) range->buffer->loads++, range->buffer->loaded_bytes += bytes;
    if (writes) range->buffer->stores++, range->buffer->stored_bytes += bytes;
  }
  if (!range->cells) return;
  for (size_t i = 0; i < bytes; i++) {
    Cell& cell = range->cells[(address - range->begin + i) >> range->shift];
    if (writes && !cell.write.thread) cell.write = {kInitialised, 0, 0};
  }
}

// ---- callbacks of -fsanitize=thread

#define CALLBACK extern "C" __attribute__((visibility("hidden")))
#define PC __builtin_return_address(0)
#define ACCESS(N)                                                                                            \
  CALLBACK void __tsan_read##N(void* p) { access(p, N, false, PC); }                                         \
  CALLBACK void __tsan_write##N(void* p) { access(p, N, true, PC); }                                         \
  CALLBACK void __tsan_unaligned_read##N(void* p) { access(p, N, false, PC); }                               \
  CALLBACK void __tsan_unaligned_write##N(void* p) { access(p, N, true, PC); }                               \
  CALLBACK void __tsan_read_write##N(void* p) { access(p, N, false, PC), access(p, N, true, PC); }           \
  CALLBACK void __tsan_unaligned_read_write##N(void* p) { access(p, N, false, PC), access(p, N, true, PC); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
CALLBACK void __tsan_init() {}
CALLBACK void __tsan_func_entry(void*) {}
CALLBACK void __tsan_func_exit() {}
CALLBACK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, PC), access(to, bytes, true, PC);
  return memcpy(to, from, bytes);
}
CALLBACK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, PC), access(to, bytes, true, PC);
  return memmove(to, from, bytes);
}
CALLBACK void* __tsan_memset(void* to, int value, size_t bytes) {
  access(to, bytes, true, PC);
  return memset(to, value, bytes);
}

// ---- callbacks of -fsanitize=undefined

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation location;
  void* type;
  unsigned char log_alignment, kind;
};

static void undefined(const char* kind, const SourceLocation& at, const char* what, long value) {
  report(kind, "%s (%ld), at %s:%u:%u by %s", what, value, at.file, at.line, at.column,
         current ? running_thread() : "nobody");
  stop();
}

CALLBACK void __ubsan_handle_out_of_bounds(SourceLocation* at, uintptr_t index) {
  undefined("out of bounds", *at, "array index", index);
}
CALLBACK void __ubsan_handle_type_mismatch_v1(TypeMismatch* at, uintptr_t pointer) {
  if (pointer == 0) return undefined("out of bounds", at->location, "null pointer", 0);
  undefined("misaligned", at->location, "address modulo the alignment of the type",
            pointer & ((1ul << at->log_alignment) - 1));
}
CALLBACK void __ubsan_handle_add_overflow(SourceLocation* at, uintptr_t a, uintptr_t) {
  undefined("overflow", *at, "signed addition", a);
}
CALLBACK void __ubsan_handle_sub_overflow(SourceLocation* at, uintptr_t a, uintptr_t) {
  undefined("overflow", *at, "signed subtraction", a);
}
CALLBACK void __ubsan_handle_mul_overflow(SourceLocation* at, uintptr_t a, uintptr_t) {
  undefined("overflow", *at, "signed multiplication", a);
}
CALLBACK void __ubsan_handle_negate_overflow(SourceLocation* at, uintptr_t a) {
  undefined("overflow", *at, "negation", a);
}
CALLBACK void __ubsan_handle_divrem_overflow(SourceLocation* at, uintptr_t a, uintptr_t) {
  undefined("overflow", *at, "integer division by zero", a);
}
CALLBACK void __ubsan_handle_shift_out_of_bounds(SourceLocation* at, uintptr_t, uintptr_t by) {
  undefined("overflow", *at, "shift by", by);
}

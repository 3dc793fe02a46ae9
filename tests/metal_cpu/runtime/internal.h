// Shared by the two halves of the runtime: fibers.cpp (who runs when) and checker.cpp (who may touch what).
#pragma once
#include "interface.h"

namespace metal_cpu {

struct Fiber {
  enum State : uint8_t { kRunning, kWaiting, kReturned };
  void* stack_pointer;
  Thread thread;
  State state;
  Site site;      // where it waits
  uint64_t path;  // call stack and loop iterations on the way there, when lockstep is checked
  int loop_depth;
  uint32_t iterations[32];
};

// How many barriers of each kind have passed: the clock of the happens-before checker.
struct Epochs {
  uint16_t threadgroup_memory;
  uint16_t device_memory;
  void advance(int mem_flags) {
    threadgroup_memory += (mem_flags & kMemThreadgroup) != 0;
    device_memory += (mem_flags & kMemDevice) != 0;
  }
};

struct Simdgroup {
  enum State : uint8_t { kReady, kAtBarrier, kReturned };
  int first, lanes;
  State state;
  int turn;  // two exchanges in turn: a lane may post again before the others have read
  Epochs epochs;
  Exchange exchange[2];
};

struct ThreadgroupArray {
  const char* name;
  char* data;
  size_t bytes, alignment;  // the alignment of an element
};

constexpr size_t kStackBytes = 256 * 1024;

// fibers.cpp
extern Launch* launch;
extern Fiber* fibers;
extern Simdgroup* simdgroups;
extern Fiber* current;  // null outside kernels
extern uint32_t group;  // linear index of the running threadgroup
extern Epochs group_epochs;
extern char* stacks;
void report(const char* kind, const char* format, ...);  // the kernel goes on
void stop();                                             // abandons the kernel, after a report
const char* running_thread();                            // in words

// checker.cpp
void checker_begin();
void checker_end();
void checker_add_threadgroup_array(const ThreadgroupArray& array);

}  // namespace metal_cpu

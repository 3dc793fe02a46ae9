// What all attention kernels share.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

using namespace metal;

// Private arrays are registers only where the loops over them are unrolled.
#define KSA_UNROLL _Pragma("clang loop unroll(full)")

namespace ksa {

// Where a running maximum starts. Not -infinity: the difference of two must be a number.
constant constexpr float kLowest = -3.402823466e+38f;

}  // namespace ksa

"""The lint refuses, with the line, what clang takes on a CPU and Metal does not; and nothing else."""

import re

import mlx.core as mx
import pytest

from . import metal_cpu
from .metal_cpu import lint

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

HEADER = """template <int N> inline float block_sum(float v, threadgroup float* parts, uint lane) {
    parts[lane] = simd_sum(v);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if constexpr (N > 1) return block_sum<N - 1>(parts[0], parts, lane);  // each N is a function of its own
    return parts[0];
}
constant constexpr float HALVES[2] = {0.5f, 1.0f};
template <int BYTES> struct Word {};
template <> struct Word<4> { typedef uint type; };
template <int N> inline uint first_word(const device float* p) {
    typedef typename Word<N * 4>::type Bits;
    return reinterpret_cast<const device Bits*>(p)[0];
}
struct Pair {
    float a, b;
    float sum() const { return a + b; }
    void scale(float s) thread { a *= s; b *= s; }
};
"""
BODY = """    threadgroup float parts[32];
    threadgroup Pair pairs[2];
    uint lane = thread_position_in_grid.x;
    float sums[4] = {0.0f};
    auto row = x + lane * D;
    const device T* also = x + lane;
    out += lane;
    for (int i = 0; i < 4; i++) sums[i] = static_cast<float>(row[i]) * s + HALVES[i % 2];
    thread float* p = sums;
    Pair pair = {p[0], p[1]};
    if (lane == 0) pairs[0] = pair;
    float4 v = float4(p[0], p[1], float2(p[2]));
    v.xy = v.zw * 2.0f + max(v.x, 1.0f);
    const device uint4* words = (const device uint4*)x;
    half2 h = as_type<half2>(words[0].x + first_word<1>((const device float*)x));
    T t = also[0] * also[0];
    t += t;
    T larger = lane < 3 ? also[0] : static_cast<T>(float(h.x));
    simdgroup_matrix<T, 8, 8> a;
    simdgroup_float8x8 sum(0.0f);
    simdgroup_load(a, x, 8);
    simdgroup_multiply_accumulate(sum, a, a, sum);
    thread auto& mine = sum.thread_elements();
    mine[0] += fast::exp(sums[1]) + precise::rsqrt(float(larger)) + INFINITY;
    out[0] = static_cast<T>(block_sum<2>(p[0], parts, lane) + dot(v, v) + pair.sum() + float(h.x) + float(t) + mine[0]);"""
ADDED = BODY.count("\n") + 2  # the line of what a fault adds to the body


def problems(header="", body="", dtype=mx.float32, scale=None):
    """Lint the kernel above with something added."""
    kernel = metal_cpu.metal_kernel(
        "linted", ["x", "s"], ["out"], BODY + "\n" + body, HEADER + header
    )
    inputs = [mx.zeros((64,), dtype=dtype), mx.array(1.0) if scale is None else scale]
    return lint.problems(kernel.for_types(inputs, [dtype], [("T", dtype), ("D", 4)]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_clean(dtype):
    assert problems(dtype=dtype) == []


IN_BODY = {  # what it says, what is added
    "pointer": ("without an address space", "float* z = p;"),
    "const pointer": (
        "without an address space",
        "const float* z = p; out[0] = static_cast<T>(z[0]);",
    ),
    "reference": ("without an address space", "float& z = sums[0];"),
    "cast that drops the space": ("without an address space", "float4 w = *(float4*)out;"),
    "reinterpret_cast that drops the space": (
        "without an address space",
        "float4 w = *reinterpret_cast<float4*>(out);",
    ),
    "typedef of a pointer": ("without an address space", "typedef float* FP;"),
    "device pointer to threadgroup memory": (
        "changes address space|cannot initialize",
        "device float* z = parts;",
    ),
    "thread pointer to device memory": (
        "changes address space|cannot initialize",
        "thread T* z = out;",
    ),
    "write through const": ("not assignable", "row[0] = static_cast<T>(1.0f);"),
    "write to an input": ("not assignable", "x[0] = static_cast<T>(1.0f);"),
    "write to a constant": ("cannot assign", "s = 1.0f;"),
    "const cast away": ("cannot initialize", "device T* z = row;"),
    "static variable": ("static variable", "static int calls = 0; calls++;"),
    "double": ("double", "double wide = 1.0f;"),
    "literal of type double": ("double precision constant", "float f = sums[0] * 1.5;"),
    "max of int and uint": ("ambiguous", "int m = max(1, lane);"),
    "max of float and int": ("ambiguous", "float m = max(sums[0], 0);"),
    "lambda": ("lambda", "auto f = [&](float v) { return v; }; out[0] = static_cast<T>(f(1.0f));"),
    "goto": ("goto is not in Metal", "goto end; end:;"),
    "new": ("new is not in Metal", "thread int* i = new int;"),
    "throw": ("throw is not in Metal", "throw 1;"),
    "inline assembler": ("asm is not in Metal", 'asm("nop");'),
    "standard library": ("std::max is not in Metal", "float f = std::max(1.0f, 2.0f);"),
    "printf": ("printf is not in Metal", 'printf("%f", sums[0]);'),
    "builtin of clang": ("__builtin_expf is clang's", "float f = __builtin_expf(1.0f);"),
    "address space of OpenCL": ("__global is OpenCL's", "__global float* f = nullptr;"),
    "function of OpenCL": ("undeclared identifier", "float f = native_exp(1.0f);"),
    "function of C": ("undeclared identifier", "float f = expf(1.0f);"),
    "unknown function": ("undeclared identifier", "float f = erf(1.0f);"),
    "array of variable length": ("not a constant expression", "float buffer[lane];"),
    "method in threadgroup memory": (
        "called on an object in threadgroup memory",
        "out[0] = static_cast<T>(pairs[0].sum());",
    ),
    "threadgroup variable in a block": (
        "own scope",
        "if (lane == 0) { threadgroup float more[4]; more[0] = 1.0f; }",
    ),
    "simd operation on bool": ("no matching function", "bool b = simd_sum(lane > 3);"),
    "matrix of another type": (
        "no matching function",
        "simdgroup_half8x8 m; simdgroup_load(m, (const device float*)x);",
    ),
    "helper with another space": (
        "no matching function",
        "out[0] = static_cast<T>(block_sum<1>(1.0f, sums, lane));",
    ),
    "narrow vector": ("no viable conversion", "half4 narrow = v;"),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("fault", IN_BODY)
def test_fault_in_the_body(fault):
    message, line = IN_BODY[fault]
    found = [p for p in problems(body=line) if p.startswith(f"linted:{ADDED}:")]
    assert _any(message, found), problems(body=line)


IN_HEADER = {
    "parameter": ("without an address space", "inline void f(float* p) { p[0] = 1.0f; }"),
    "reference parameter": ("without an address space", "inline void f(float& p) { p = 1.0f; }"),
    "parameter of a template": (
        "without an address space",
        "template <class U> inline void f(const U* p) {}",
    ),
    "field": ("without an address space", "struct Holder { float* p; };"),
    "result": ("without an address space", "inline float* f(thread float* p) { return p; }"),
    "global variable": ("not constant", "float counter;"),
    "global constant without constant": ("not constant", "const float third = 0.333f;"),
    "recursion": ("recursion", "inline int f(int n) { return n > 0 ? f(n - 1) : 0; }"),
    "mutual recursion": (
        "recursion",
        "int g(int n); inline int f(int n) { return g(n); } int g(int n) { return f(n); }",
    ),
    "recursive method": (
        "recursion",
        "struct R { int f(int n) const { return n > 0 ? f(n - 1) : 0; } };",
    ),
    "virtual function": ("virtual is not in Metal", "struct V { virtual void f(); };"),
    "function pointer": ("pointers to functions", "inline void f(float (*g)(float)) {}"),
    "try": ("try is not in Metal", "inline void f() { try {} catch (...) {} }"),
    "threadgroup variable": ("own scope", "inline void f() { threadgroup float a[4]; }"),
    "include": ("without files beside it", "#include <cmath>"),
    "function constant": ("no function constants", "constant bool flag [[function_constant(0)]];"),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("fault", IN_HEADER)
def test_fault_in_the_header(fault):
    message, line = IN_HEADER[fault]
    found = [
        p
        for p in problems(header=line)
        if p.startswith(f"linted header:{HEADER.count(chr(10)) + 1}:")
    ]
    assert _any(message, found), problems(header=line)


BFLOAT = {
    "narrowing": ("from float to bfloat", "T wide = sums[0];"),
    "narrowing an expression": ("from float to bfloat", "out[0] = also[0] * 1.5f;"),
    "compound assignment": ("from float to bfloat", "t *= 1.5f;"),
    "to half": ("cannot initialize", "half to_half = also[0];"),
    "from half": ("cannot initialize", "T from_half = h.x;"),
    "ternary": ("ternary of bfloat", "float f = lane < 3 ? also[0] : 0.0f;"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("fault", BFLOAT)
def test_bfloat(fault):
    message, line = BFLOAT[fault]
    assert problems(body=line) == []  # with T = float
    assert _any(message, problems(body=line, dtype=mx.bfloat16))


def test_a_small_input_is_constant():
    """Fewer than 8 elements: the same helper must take constant memory."""
    helper = "inline float first(const device float* p) { return p[0]; }"
    assert (
        problems(helper, "out[0] = static_cast<T>(first(s));", scale=mx.zeros(8)) != []
    )  # s is used as a number above
    kernel = metal_cpu.metal_kernel("small", ["x"], ["out"], "out[0] = first(x);", helper)
    assert lint.problems(kernel.for_types([mx.zeros(8)], [mx.float32], None)) == []
    assert _any(
        "no matching function", lint.problems(kernel.for_types([mx.zeros(7)], [mx.float32], None))
    )


def test_running_can_lint():
    with metal_cpu.running(lint=True):
        kernel = mx.fast.metal_kernel("linted", ["x"], ["out"], "static int i = 0; out[0] = x[0];")
        with pytest.raises(metal_cpu.LintError, match="linted:1: i: a static variable"):
            kernel(
                inputs=[mx.zeros(8)],
                output_shapes=[(1,)],
                output_dtypes=[mx.float32],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
            )


def _any(pattern: str, found: list[str]) -> bool:
    return any(re.search(pattern, problem) for problem in found)

"""The Metal source that MLX makes of a custom kernel, and the C++ that the instrument makes of that.

`metal_source` follows mlx/backend/common/metal_kernel.cpp; `cpu_source` adds what a CPU needs: storage for
threadgroup variables, line numbers for messages, and an entry point that passes the buffers and thread attributes.
"""

import re
from dataclasses import dataclass

import mlx.core as mx

TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
}
# Inputs with fewer elements are passed in the constant address space.
MAX_CONSTANT_SIZE = 8
# Thread attributes by name: Metal type, and where `thread` (runtime/interface.h) has the value.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "(thread.dispatch_simdgroups * 8)"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "thread.dispatch_simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", "thread.dispatch_threads"),
    "grid_origin": ("uint3", None),
    "grid_size": ("uint3", "thread.grid"),
    "quadgroup_index_in_threadgroup": ("uint", "thread.index / 4"),
    "quadgroups_per_threadgroup": ("uint", "(thread.simdgroups * 8)"),
    "simdgroup_index_in_threadgroup": ("uint", "thread.simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "thread.simdgroups"),
    "thread_execution_width": ("uint", "32u"),
    "thread_index_in_quadgroup": ("uint", "thread.index % 4"),
    "thread_index_in_simdgroup": ("uint", "thread.lane"),
    "thread_index_in_threadgroup": ("uint", "thread.index"),
    "thread_position_in_grid": ("uint3", "thread.position_in_grid"),
    "thread_position_in_threadgroup": ("uint3", "thread.position_in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "thread.threadgroup_position"),
    "threadgroups_per_grid": ("uint3", "thread.threadgroups"),
    "threads_per_grid": ("uint3", "thread.grid"),
    "threads_per_simdgroup": ("uint", "32u"),
    "threads_per_threadgroup": ("uint3", "thread.threads"),
}


@dataclass(frozen=True)
class Argument:
    """One buffer of a kernel: its Metal parameter, and its type for the entry point."""

    name: str  # as in the kernel
    declaration: str  # without [[buffer(i)]]
    pointee: str
    reference: bool  # a 0-d input or an _ndim
    of: str = ""  # the input whose shape, strides or ndim it holds, else empty
    what: str = "data"  # "data", "shape", "strides", "ndim" or "output"


@dataclass(frozen=True)
class KernelSource:
    """A custom kernel as the caller gave it, for one set of input and output types."""

    name: str
    function: str  # the name of the kernel function, as MLX makes it
    header: str
    body: str
    arguments: tuple[Argument, ...]
    template: tuple[tuple[str, object], ...]

    @property
    def attributes(self) -> list[str]:
        return [name for name in ATTRIBUTES if name in self.body]

    def signature(self) -> str:
        kinds = {bool: "bool", int: "int", mx.Dtype: "typename"}
        template = ", ".join(f"{kinds[type(value)]} {name}" for name, value in self.template)
        parameters = [f"  {a.declaration} [[buffer({i})]]" for i, a in enumerate(self.arguments)]
        parameters += [f"  {ATTRIBUTES[name][0]} {name} [[{name}]]" for name in self.attributes]
        head = f"template <{template}>\n" if template else ""
        return f"{head}[[kernel]] void {self.function}(\n" + ",\n".join(parameters) + ") {\n"

    def template_arguments(self) -> str:
        values = ", ".join(_template_value(value) for _, value in self.template)
        return f"<{values}>" if values else ""


def _template_value(value) -> str:
    if isinstance(value, mx.Dtype):
        return TYPES[value]
    return str(int(value))  # MLX writes booleans as 0 and 1


def kernel_source(
    name, header, body, input_names, inputs, output_names, output_dtypes, template, atomic_outputs
):
    """Write the parameters of a kernel for these inputs (anything with .dtype, .ndim and .size)."""
    function = f"custom_kernel_{name}"
    if template := tuple((n, v) for n, v in template or ()):
        function += "__" + "_".join(_template_value(value) for _, value in template)
    arguments = []
    for input_name, array in zip(input_names, inputs, strict=True):
        small = array.size < MAX_CONSTANT_SIZE
        space, dtype, mark = (
            "constant" if small else "device",
            TYPES[array.dtype],
            "*" if array.ndim else "&",
        )
        function += f"_{dtype}" + ("" if not small else "c" if array.ndim else "s")
        arguments.append(
            Argument(
                input_name,
                f"const {space} {dtype}{mark} {input_name}",
                dtype,
                mark == "&",
                input_name,
            )
        )
        for what, dtype, mark in (
            ("shape", "int", "*"),
            ("strides", "int64_t", "*"),
            ("ndim", "int", "&"),
        ):
            extra = f"{input_name}_{what}"
            if array.ndim and extra in body:
                arguments.append(
                    Argument(
                        extra,
                        f"const constant {dtype}{mark} {extra}",
                        dtype,
                        mark == "&",
                        input_name,
                        what,
                    )
                )
    for output_name, dtype in zip(output_names, output_dtypes, strict=True):
        function += f"_{TYPES[dtype]}"
        dtype = f"atomic<{TYPES[dtype]}>" if atomic_outputs else TYPES[dtype]
        arguments.append(
            Argument(output_name, f"device {dtype}* {output_name}", dtype, False, "", "output")
        )
    return KernelSource(name, function, header, body, tuple(arguments), template)


def metal_source(kernel: KernelSource) -> str:
    """What MLX would hand to Metal's compiler, after its own utilities."""
    text = kernel.header + kernel.signature() + kernel.body + "\n}\n"
    if kernel.template:
        instance = kernel.function + kernel.template_arguments()
        text += f'\ntemplate [[host_name("{kernel.function}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text


def cpu_source(kernel: KernelSource) -> str:
    """C++ for the same kernel. Messages name the body by the kernel's name, and its lines count from 1."""
    values = [
        f"{'*' if a.reference else ''}static_cast<const {a.pointee}*>(buffers[{i}])"
        if a.what != "output"
        else f"static_cast<{a.pointee}*>(buffers[{i}])"
        for i, a in enumerate(kernel.arguments)
    ]
    for name in kernel.attributes:
        kind, value = ATTRIBUTES[name]
        if kind == "uint3":
            value = f"uint3({value}[0], {value}[1], {value}[2])" if value else "uint3(0, 0, 0)"
        values.append(value)
    body, header = (
        place_threadgroup_variables(kernel.body),
        place_threadgroup_variables(kernel.header),
    )
    signature = kernel.signature()
    return (
        "#include <metal_stdlib>\n"
        f'#line 1 "{kernel.name} header"\n{header}\n'
        f'#line 1 "{kernel.name} signature"\n{signature}'
        f'#line 1 "{kernel.name}"\n{body}\n}}\n'
        "#undef thread\n"
        'extern "C" __attribute__((no_sanitize("thread", "undefined")))\n'
        "void metal_cpu_entry(void* const* buffers, const metal_cpu::Thread* of) {\n"
        "  const metal_cpu::Thread& thread = *of;\n"
        f"  {kernel.function}{kernel.template_arguments()}({', '.join(values)});\n}}\n"
    )


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_TYPE = r"(?:[\w:]+(?:\s*<[^;<>{}]*(?:<[^;<>{}]*>[^;<>{}]*)*>)?)"
_VARIABLE = r"\w+(?:\s*\[[^\];]*\])*"
_THREADGROUP_VARIABLE = re.compile(
    rf"(?<=[;{{}}])(\s*)threadgroup\s+({_TYPE})\s+({_VARIABLE}(?:\s*,\s*{_VARIABLE})*)\s*;"
)
_OTHER_THREADGROUP = re.compile(r"\bthreadgroup\b(?!\s*\()(?![^;,(){}=]*[*&>])")


def strip_comments(source: str) -> str:
    """Blank out comments, keeping line numbers and columns."""
    return _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def place_threadgroup_variables(
    source: str, storage: str = 'metal_cpu_threadgroup<{type}, __COUNTER__>("{name}")'
) -> str:
    """Turn `threadgroup T x[N];` into a reference to storage that all threads of a threadgroup share.

    Any other threadgroup variable would silently become private to each thread, so it is an error.
    """

    def place(match):
        space, base, variables = match.groups()
        out = space
        for variable in re.split(r",(?![^\[]*\])", variables):
            name, dims = re.match(r"\s*(\w+)\s*(.*)", variable, re.DOTALL).groups()
            out += f"auto& {name} = " + storage.format(type=base + dims, name=name) + "; "
        return out

    source = ";" + strip_comments(
        source
    )  # the lookbehind needs a statement's end before the first one
    before = None
    while before != source:
        before, source = source, _THREADGROUP_VARIABLE.sub(place, source)
    source = source[1:]
    if other := _OTHER_THREADGROUP.search(source):
        line = source.count("\n", 0, other.start()) + 1
        text = source[other.start() :].split("\n")[0]
        raise SyntaxError(
            f"line {line}: write a threadgroup variable as a statement, without initialiser: {text}"
        )
    return source

"""Refuse what clang takes on a CPU and Metal does not.

Three passes over a wrapped kernel:
 - words that Metal does not have;
 - clang's front end for C++ for OpenCL, whose address spaces and prohibitions are nearly Metal's, with a
   header that declares Metal's library (lint_include/metal_lint.h): an unknown call is an error, and so is
   max(1, 2u);
 - the syntax tree that clang made: pointers without an address space, recursion, static and global
   variables, lambdas, narrowing to bfloat.

The rules are those of the Metal Shading Language Specification; no Metal compiler took part.
"""

import json
import re
import shlex
import tempfile
from bisect import bisect_right
from pathlib import Path

from . import build, wrap

FRONT_END = shlex.split(
    "-x clcpp -cl-std=clc++2021 -cl-no-stdinc --target=x86_64-linux-gnu -fsyntax-only "
    "-Wno-unknown-attributes -ferror-limit=12 -Xclang -cl-ext="
    "+cl_khr_fp16,-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_pipes,-__opencl_c_device_enqueue "
    "-Xclang -ast-dump=json"
)

WORDS = {
    r"\b(goto|asm|__asm__|try|catch|throw|new|delete|virtual|double)\b": "{} is not in Metal",
    r"\b(typeid|dynamic_cast|thread_local)\b": "{} is not in Metal",
    r"\b(std::\w+|printf|malloc|free|memcpy|memset|assert)\b": "{} is not in Metal",
    r"\b__builtin_\w+": "{} is clang's, not Metal's",
    r"\b__(global|local|private|constant|generic|kernel)\b": "{} is OpenCL's, not Metal's",
    r"#\s*include\s*(?!<metal_)\S+": "{}: MLX compiles kernels from text, without files beside it",
    r"\w+\s+\[\[function_constant": "{}: mx.fast.metal_kernel sets no function constants",
}
TYPED = {"VarDecl", "ParmVarDecl", "FieldDecl", "FunctionDecl", "TypedefDecl", "TypeAliasDecl"}
CASTS = {"CStyleCastExpr", "CXXStaticCastExpr", "CXXReinterpretCastExpr", "CXXConstCastExpr"}
NARROWING, WIDENING = ("float", "__bf16"), ("__bf16", "float")


class LintError(Exception):
    """A kernel has constructs that Metal would refuse."""


class _Text:
    """The file that clang reads, and where each offset in it comes from."""

    def __init__(self):
        self.text, self.starts, self.labels = "", [], []

    def add(self, label: str, part: str):
        self.text += f'#line 1 "{label}"\n'
        self.starts.append(len(self.text))
        self.labels.append(label)
        self.text += part + "\n"

    def place(self, offset: int) -> str:
        i = bisect_right(self.starts, offset) - 1
        return f"{self.labels[i]}:{self.text.count(chr(10), self.starts[i], offset) + 1}"


def problems(kernel: wrap.KernelSource) -> list[str]:
    """What Metal would refuse, each with the line; empty if the kernel is clean."""
    found = []
    parts = {f"{kernel.name} header": kernel.header, kernel.name: kernel.body}
    for label, part in parts.items():
        found += _word_problems(label, wrap.strip_comments(part))
    found += _threadgroup_problems(kernel)
    text = _Text()
    text.text = '#include "metal_lint.h"\n'
    storage = "metal_lint_threadgroup<{type}>()"
    text.add(f"{kernel.name} header", wrap.place_threadgroup_variables(kernel.header, storage))
    text.add(f"{kernel.name} signature", kernel.signature().replace("[[kernel]] ", ""))
    text.add(kernel.name, wrap.place_threadgroup_variables(kernel.body, storage) + "\n}")
    if kernel.template:
        instance = kernel.function + kernel.template_arguments()
        text.add("instance", f"template decltype({instance}) {instance};")
    diagnostics, tree = _front_end(text.text)
    found += diagnostics
    if tree:
        found += _TreeProblems(tree, text).found
    return list(dict.fromkeys(found))


def check(kernel: wrap.KernelSource) -> None:
    """Raise LintError if Metal would refuse the kernel."""
    if found := problems(kernel):
        raise LintError(f"kernel {kernel.name}\n" + "\n".join(found))


def _word_problems(label: str, source: str) -> list[str]:
    return [
        f"{label}:{source.count(chr(10), 0, match.start()) + 1}: "
        + message.format(match.group().strip())
        for pattern, message in WORDS.items()
        for match in re.finditer(pattern, source)
    ]


def _threadgroup_problems(kernel: wrap.KernelSource) -> list[str]:
    """Threadgroup variables belong to the kernel function itself, outside of any block."""
    mark = "\x00"
    found = []
    for label, source in ((f"{kernel.name} header", kernel.header), (kernel.name, kernel.body)):
        depth = 1 if source is kernel.header else 0
        line = 1
        for character in wrap.place_threadgroup_variables(source, mark):
            depth += (character == "{") - (character == "}")
            line += character == "\n"
            if character == mark and depth > 0:
                found.append(
                    f"{label}:{line}: a threadgroup variable outside of the kernel's own scope"
                )
    return found


def _front_end(source: str) -> tuple[list[str], dict | None]:
    """clang's errors and warnings, and its syntax tree if there were no errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.clcpp"
        path.write_text(source)
        include = str(build.HERE / "lint_include")
        done = build.run([build.COMPILER, *FRONT_END, "-I", include, str(path)])
    diagnostic = re.compile(r"^(\S.*?:\d+):\d+: (?:fatal )?(?:error|warning): (.*)$", re.MULTILINE)
    diagnostics = diagnostic.findall(done.stderr)
    found = [f"{at}: {message}" for at, message in diagnostics if not at.startswith("instance")]
    if done.returncode and not found:
        found = [done.stderr[:2000]]
    return found, None if done.returncode else json.loads(done.stdout)


class _TreeProblems:
    """Walks the declarations that come from the kernel's own text."""

    def __init__(self, tree: dict, text: _Text):
        self.text, self.found = text, []
        self.calls: dict[str, set[str]] = {}  # function id -> ids of what it calls
        self.names: dict[str, tuple[str, dict]] = {}  # function id -> name, declaration
        own = [node for node in tree["inner"] if self._is_own(node)]
        self.methods: set[str] = set()
        self.first: dict[str, str] = {}  # id of a redeclaration -> id of the first declaration
        for node in own:
            self._collect_methods(node)
        for node in own:
            self._walk(node, None)
        self._find_recursion()

    def _is_own(self, node) -> bool:
        at = self._location(node)
        return "includedFrom" not in at and at.get("offset", -1) >= self.text.starts[0]

    @staticmethod
    def _location(node) -> dict:
        at = node.get("range", {}).get("begin", {})
        return at.get("expansionLoc", at)

    def _report(self, node, message: str):
        place = self.text.place(self._location(node).get("offset", len(self.text.text)))
        if not place.startswith("instance"):
            self.found.append(f"{place}: {message}")

    def _collect_methods(self, node):
        if node.get("kind") == "CXXMethodDecl":
            self.methods.add(node["id"])
        for child in node.get("inner", []):
            self._collect_methods(child)

    def _walk(self, node, function: str | None):
        if node.get("isImplicit"):
            return
        kind = node.get("kind")
        if kind in ("FunctionDecl", "CXXMethodDecl"):
            function = self._canonical(node["id"], node.get("previousDecl"))
            self.names[function] = (node.get("name"), node)
        self._check_declaration(node, kind, function)
        self._check_expression(node, kind)
        if function:
            self._note_call(node, kind, function)
        for child in node.get("inner", []):
            self._walk(child, function)

    def _check_declaration(self, node, kind, function):
        name, written = node.get("name"), _type(node)
        if kind in TYPED and ("__generic" in written or _is_unplaced(written)):
            name = name or "a parameter"
            self._report(node, f"{name}: a pointer or reference without an address space")
        if kind == "VarDecl" and not node.get("constexpr") and "__constant" not in written:
            if node.get("storageClass") == "static":
                self._report(node, f"{name}: a static variable")
            elif not function:
                self._report(node, f"{name}: a variable outside of functions that is not constant")

    def _check_expression(self, node, kind):
        if kind in CASTS and re.search(r"__generic.*[*&]", _type(node)):
            self._report(node, "a cast to a pointer or reference without an address space")
        elif kind == "LambdaExpr":
            self._report(node, "a lambda")
        elif kind == "CXXMemberCallExpr":
            self._check_method_call(node["inner"][0])
        elif kind == "ConditionalOperator" and WIDENING in map(_conversion, node["inner"][1:]):
            self._report(node, "a ternary of bfloat and another type: cast to one of them")
        elif kind == "CompoundAssignOperator":
            if (_plain(node["computeResultType"]), _plain(node["type"])) == NARROWING:
                self._report(node, "an implicit conversion from float to bfloat")
        elif _conversion(node) == NARROWING:
            self._report(node, "an implicit conversion from float to bfloat")

    def _check_method_call(self, member):
        if member.get("referencedMemberDecl") not in self.methods:
            return
        place = member["inner"][0]
        while place["kind"] == "ImplicitCastExpr":
            place = place["inner"][0]
        spaces = {"__local": "threadgroup", "__global": "device", "__constant": "constant"}
        for opencl, metal in spaces.items():
            if opencl in _type(place):
                called = f"method {member['name']} called"
                self._report(node=member, message=f"{called} on an object in {metal} memory")

    def _note_call(self, node, kind, function):
        called = None
        if kind == "DeclRefExpr":
            called = node.get("referencedDecl", {}).get("id")
        elif kind == "MemberExpr":
            called = node.get("referencedMemberDecl")
        if called:
            self.calls.setdefault(function, set()).add(self._canonical(called))

    def _canonical(self, function: str, previous: str | None = None) -> str:
        if previous:
            self.first[function] = self.first.get(previous, previous)
        return self.first.get(function, function)

    def _find_recursion(self):
        done: set[str] = set()

        def visit(function: str, above: tuple[str, ...]):
            if function in above:
                name, node = self.names[function]
                self._report(node, f"{name}: recursion")
            elif function not in done and function in self.names:
                for callee in self.calls.get(function, ()):
                    visit(callee, (*above, function))
                done.add(function)

        for function in self.names:
            visit(function, ())


def _type(node) -> str:
    return node.get("type", {}).get("qualType", "")


def _is_unplaced(written: str) -> bool:
    """Is it a pointer or reference in a template, without an address space? Elsewhere it is generic."""
    return bool(re.search(r"[*&]$", written)) and not re.search(r"__|\bauto\b", written)


def _plain(written: dict) -> str:
    """A scalar type without typedefs, qualifiers and address space."""
    name = written.get("desugaredQualType", written.get("qualType", ""))
    return re.sub(
        r"\b(const|volatile|__\w*(private|local|global|generic|constant))\b", "", name
    ).strip()


def _conversion(node) -> tuple[str, str] | None:
    """From which floating-point type to which other one, if the node is such an implicit conversion."""
    if node.get("castKind") != "FloatingCast" or node["kind"] != "ImplicitCastExpr":
        return None
    if node.get("isPartOfExplicitCast"):
        return None
    return _plain(node["inner"][0]["type"]), _plain(node["type"])

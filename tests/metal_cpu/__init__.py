"""Execute Metal kernels on a CPU, lane by lane, and check them. See README.md."""

from .build import CompileError, unavailable
from .counts import per_key
from .kernel import Log, Settings, metal_kernel, running, settings
from .launch import KernelFault, Launch, Traffic
from .lint import LintError


def available() -> bool:
    """Can kernels run here? `unavailable()` says why not."""
    return unavailable() is None


__all__ = [
    "CompileError", "KernelFault", "Launch", "LintError", "Log", "Settings", "Traffic",
    "available", "metal_kernel", "per_key", "running", "settings", "unavailable",
]  # fmt: skip

"""What the machine is, and what it does at best: memory, arithmetic, launches."""

import importlib.metadata
import os
import platform
import re
import subprocess
from functools import partial
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from ..attention import record
from ..attention.choice import name_of
from ..benchmark.timing import in_turns
from .stage import Cases, Found, Options, Stage

TURNS = 7
CHAIN = 1000  # operations in a row


def system(*command: str) -> str:
    """What a tool of the system prints; nothing where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def wheel() -> str:
    """The tag of MLX's wheel: macosx_26_0 ones hold other kernels than macosx_14_0 ones."""
    for name in ("mlx-metal", "mlx"):
        try:
            text = importlib.metadata.distribution(name).read_text("WHEEL") or ""
        except importlib.metadata.PackageNotFoundError:
            continue
        if tags := re.findall(r"^Tag: (\S+)$", text, re.M):
            return tags[0]
    return "built from source"


def has_tensor_units(architecture: str, macos: str) -> bool:
    """Whether MLX multiplies matrices on the tensor units, by its own rule: GPUs of generation 17
    on (M5), macOS 26.2 on."""
    generation = re.search(r"applegpu_g(\d+)", architecture)
    version = tuple(int(n) for n in re.findall(r"\d+", macos)[:2])
    return generation is not None and int(generation[1]) >= 17 and version >= (26, 2)


def who() -> Found:
    """This machine, and the software on it."""
    info, macos = mx.device_info(), platform.mac_ver()[0]
    architecture = info.get("architecture", "unknown")
    power = re.search(r"lowpowermode\s+(\d)", system("pmset", "-g"))
    thermal = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", system("pmset", "-g", "therm"))
    return {
        "chip": system("sysctl", "-n", "machdep.cpu.brand_string").strip()
        or info.get("device_name", "unknown"),
        "gpu": architecture,
        "memory_gb": round((info.get("memory_size") or _memory()) / 1e9, 1),
        "system": f"macOS {macos}" if macos else f"{platform.system()} {platform.machine()}",
        "build": record.macos_build(),
        "metal": mx.metal.is_available() and mx.default_device() == mx.gpu,
        "tensor_units": has_tensor_units(architecture, macos),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "wheel": wheel(),
        "mlx_lm": mlx_lm.__version__,
        "sources": record.machine().rpartition(" ")[2],
        "low_power": power is not None and power[1] == "1",
        "speed_limit": int(thermal[1]) if thermal else 100,
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("MLX_", "KSA_MLX_"))
        },
    }


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def who_lines(name: str, x: Found) -> str:
    power = ", LOW POWER MODE" * x["low_power"]
    power += f", slowed to {x['speed_limit']} %" * (x["speed_limit"] < 100)
    units = f", tensor units: {'yes' if x['tensor_units'] else 'no'}" * x["metal"]
    said = "".join(f" {k}={v}" for k, v in x["environment"].items())
    return (
        f"{x['chip']} ({x['gpu']}), {x['memory_gb']:g} GB, {x['system']} {x['build']}{power}; "
        f"{'Metal' if x['metal'] else 'no Metal'}{units}; MLX {x['mlx']} ({x['wheel']}), mlx-lm "
        f"{x['mlx_lm']}, Python {x['python']}, sources {x['sources']}{';' * bool(said)}{said}"
    )


def seconds(run: Any, turns: int = TURNS) -> float:
    return float(np.median(in_turns({"run": run}, turns, 2)["run"]))


def cases(options: Options) -> Cases:
    size = 256 << 20 if options.metal else 16 << 20
    side = 4096 if options.metal else 256

    def bandwidth(copies: bool):
        x = mx.ones(size // 4)
        mx.eval(x)
        took = seconds(lambda: mx.eval(-x if copies else mx.max(x)))
        return {"gb_s": (2 if copies else 1) * size / took / 1e9}

    def product(dtype: mx.Dtype):
        a, b = (mx.random.normal((side, side), dtype) for _ in range(2))
        mx.eval(a, b)
        return {"tflops": 2 * side**3 / seconds(lambda: mx.eval(a @ b)) / 1e12}

    def launches():
        x = mx.ones(32)
        mx.eval(x)

        def in_a_row():
            y = x
            for _ in range(CHAIN):
                y = y + x
            mx.eval(y)

        empty = seconds(lambda: mx.eval(x + x), 50)
        row = seconds(in_a_row)
        apart = seconds(lambda: mx.eval([x + i for i in range(CHAIN)]))
        return {
            "us": (row - empty) / CHAIN * 1e6,
            "independent_us": (apart - empty) / CHAIN * 1e6,
            "eval_us": empty * 1e6,
        }

    dtypes = [mx.float16, mx.bfloat16, mx.float32] if options.metal else [mx.float32]
    return {
        "read": lambda: bandwidth(False),
        "copy": lambda: bandwidth(True),
        **{name_of(dtype): partial(product, dtype) for dtype in dtypes},
        "launches": launches,
    }


def lines(found: dict[str, Found]) -> list[str]:
    said = [
        f"{k} {found[k]['gb_s']:.3g} GB/s" for k in ("read", "copy") if "gb_s" in found.get(k, {})
    ]
    said += [f"{k} {x['tflops']:.3g} TFLOPS" for k, x in found.items() if "tflops" in x]
    if "us" in (x := found.get("launches", {})):
        said.append(
            f"an operation in a row {x['us']:.2f} us, independent {x['independent_us']:.2f}, one "
            f"evaluation {x['eval_us']:.0f}"
        )
    return ["; ".join(said)] if said else []


WHO = Stage("who", "This machine", lambda options: {"this machine": who}, who_lines)
MACHINE = Stage("machine", "At best", cases, end=lines, seconds=45, case_seconds=30)

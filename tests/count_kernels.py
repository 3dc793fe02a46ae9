"""Count exactly what the Metal kernels do, executed on a CPU; needs clang.

    python -m tests.count_kernels --shape 4b --dtype bfloat16 --contexts 1024 16384

The flags are those of `python -m ksa_mlx benchmark --kernels`.
"""

import sys

from ksa_mlx.benchmark.__main__ import main

from . import metal_cpu

if __name__ == "__main__":
    sys.exit(main(["--kernels", *sys.argv[1:]], instrument=metal_cpu))

"""Convert a KSA checkpoint to MLX: python convert.py --hf-path SRC --mlx-path DST [-q]"""

import sys

from ksa_mlx.convert import main

if __name__ == "__main__":
    sys.exit(main())

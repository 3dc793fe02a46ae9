"""Talk to a KSA model: python generate.py [--model MODEL] [--prompt TEXT]"""

import sys

from ksa_mlx.generate import main

if __name__ == "__main__":
    sys.exit(main())

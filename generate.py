"""Talk to a KSA model: python generate.py [--model MODEL] [--prompt TEXT]"""

import os
import signal
import sys

if __name__ == "__main__":
    # Until there is somebody to handle Ctrl-C: a traceback of half an import helps nobody.
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from ksa_mlx.generate import main

    signal.signal(signal.SIGINT, handler)
    sys.exit(main())

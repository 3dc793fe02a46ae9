"""What tests/test_retrofit_stages.py starts, once or twice: prints the losses of a run as JSON.

Usage: _retrofit_worker.py FOLDER TEXTS_A_STEP [STEP_TO_DIE_AT | stop]
With "stop" the first machine is told to stop at its second step.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from tests._retrofit import SETTINGS, retrofit

folder, batch, *die = sys.argv[1:]
group = mx.distributed.init()
losses = []


def tick(stage, step, steps, said):
    if steps is not None:
        losses.append(said["loss"])
    if die and die[0] == f"{stage}-{step}":
        os.kill(os.getpid(), signal.SIGKILL)


settings = replace(SETTINGS, batch_size=int(batch))
stop = lambda: die == ["stop"] and group.rank() == 0 and len(losses) == 1
run = retrofit(Path(folder), settings, group if group.size() > 1 else None, tick=tick, stop=stop)
try:
    run.run()
except KeyboardInterrupt:
    print(f"STOPPED {group.rank()} {run.stage} {run.step}", flush=True)
if group.rank() == 0:
    print("LOSSES", json.dumps(losses), flush=True)

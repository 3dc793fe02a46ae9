"""The stages, in order: what can do no harm first, so that whatever happens leaves something."""

from .costs import COSTS
from .kernels import CHOICE, DECODE, PREFILL, RIGHT
from .machine import MACHINE, WHO
from .models import BATCH, MODEL, RAISED_LIMITS
from .reference import REFERENCE

STAGES = [
    WHO,
    MACHINE,
    RIGHT,
    COSTS,
    DECODE,
    PREFILL,
    CHOICE,
    REFERENCE,
    MODEL,
    RAISED_LIMITS,
    BATCH,
]

"""mlx-lm's continuous batching, in which a long prompt does not hold up the answers that run.

mlx-lm reads a fixed number of tokens between two tokens of the others, `--prefill-step-size`:
seconds, on most machines. Here that is the most, and a step takes about as long as `RUNNING` says.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

# Seconds of a step while answers run, and while none does. A step may take twice as long before the
# next one is shorter.
RUNNING, IDLE = 0.25, 1.0

# Tokens of the first step, and of the shortest one.
FIRST, SHORTEST = 32, 8


class Pace:
    """How many tokens take how long, by the last steps."""

    def __init__(self):
        self.rate = 0.0  # tokens a second, 0: not known
        self.asked = (0, 0.0)

    def step(self, seconds: float, rows: int, longest: int) -> int:
        """Tokens a row that take so long, as a power of two: few different shapes."""
        wanted = int(self.rate * seconds / rows) if self.rate else FIRST
        size = 1 << max(1, wanted).bit_length() - 1
        size = min(max(size, SHORTEST), longest)
        self.asked = size * rows, seconds
        return size

    def took(self, tokens: int, seconds: float):
        """Of the step that was asked for. The short end of a text says little of the next step."""
        wanted, most = self.asked
        if tokens and (2 * tokens >= wanted or seconds > most):
            self.rate = tokens / max(seconds, 1e-6)


class PacedGenerator(BatchGenerator):
    """mlx-lm's, whose prompts are read in steps that are short in time, whatever the machine."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.longest, self.pace = self.prefill_step_size, Pace()
        # Several machines have to take the same steps, and have clocks of their own.
        self.paced = mx.distributed.init().size() == 1

    def _next(self):
        waiting = len(self._currently_processing) + len(self._unprocessed_sequences)
        if not (self.paced and waiting):
            return super()._next()
        seconds = RUNNING if len(self._generation_batch) else IDLE
        size = self.pace.step(seconds, min(waiting, self.prefill_batch_size), self.longest)
        self.prefill_step_size = self._prompt_batch.prefill_step_size = size
        before = self._counters.prompt_tokens, self._counters.prompt_time
        found = super()._next()
        after = self._counters.prompt_tokens, self._counters.prompt_time
        self.pace.took(after[0] - before[0], after[1] - before[1])
        return found

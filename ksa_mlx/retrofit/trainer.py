"""Adam on named arrays of a model, with a state that a killed run goes on from to the bit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn import average_gradients

from .trainable import Params, put

# A loss: of the model with these parameters on a batch, and what else there is to say.
Loss = Callable[[Any], tuple[mx.array, dict[str, mx.array]]]


@dataclass
class Rates:
    """Learning rates of one schedule: warm-up, then a straight line to a tenth at the last step.

    of: the rate of a parameter, by its name. clip: the largest norm of a gradient.
    """

    steps: int
    of: Callable[[str], float]
    warmup: int = 8
    clip: float = 1.0

    def share(self, step: int) -> float:
        """Of the full rate, at a step counted from 0."""
        return min((step + 1) / self.warmup, 1.0) * (1 - 0.9 * (step + 1) / self.steps)


class Trainer:
    """Args: model, whose `params` (float32, by dotted name) are trained; rates; group: of
    machines that share each batch, of whose gradients the mean is taken."""

    def __init__(self, model, params: Params, rates: Rates, group: Any = None):
        self.model, self.params, self.rates, self.group = model, params, rates, group
        self.dtype = model.model.norm.weight.dtype
        self.step = 0
        names: dict[float, set[str]] = {}
        for name in params:
            names.setdefault(rates.of(name), set()).add(name)
        self.optimizers = {
            rate: optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=0.0) for rate in names
        }
        self.names = names
        for rate, optimizer in self.optimizers.items():
            optimizer.init({name: params[name] for name in sorted(names[rate])})
        put(model, params, self.dtype)

    def learn(self, loss: Loss, batch: Any) -> dict[str, float]:
        """One step. Returns the loss and what it says of itself, means over machines."""

        def of(params: Params):
            put(self.model, params, self.dtype)
            value, said = loss(batch)
            return value, said

        (value, said), grads = mx.value_and_grad(of)(self.params)
        # Names have dots, which MLX's trees would take apart.
        grads = dict(zip(grads, average_gradients(list(grads.values()), self.group), strict=True))
        grads, norm = optim.clip_grad_norm(grads, self.rates.clip)
        share = self.rates.share(self.step)
        for rate, optimizer in self.optimizers.items():
            optimizer.learning_rate = rate * share
            some = self.names[rate]
            new = optimizer.apply_gradients(
                {k: grads[k] for k in sorted(some)}, {k: self.params[k] for k in sorted(some)}
            )
            self.params.update(new)
        mx.eval(self.params, [o.state for o in self.optimizers.values()], value, said, norm)
        put(self.model, self.params, self.dtype)
        self.step += 1
        found = {"loss": value, **said, "norm": norm}
        return {k: self._mean(v) for k, v in found.items()}

    def _mean(self, x: mx.array) -> float:
        if self.group is None or self.group.size() == 1:
            return x.item()
        return (mx.distributed.all_sum(x, group=self.group) / self.group.size()).item()

    def state(self) -> Params:
        """All that the next step depends on, but for the batch: flat arrays."""
        found = {f"params/{name}": x for name, x in self.params.items()}
        for i, optimizer in enumerate(self.optimizers.values()):
            for name, held in optimizer.state.items():
                moments = held if isinstance(held, dict) else {"": held}
                found |= {f"adam/{i}/{name}/{kind}": x for kind, x in moments.items()}
        return found

    def load(self, state: Params, step: int):
        """Go on from `state()` of a trainer of the same parameters, `step` steps done."""
        self.step = step
        self.params.update(below("params/", state))
        for i, optimizer in enumerate(self.optimizers.values()):
            for key, x in below(f"adam/{i}/", state).items():
                name, _, kind = key.rpartition("/")
                if kind:
                    optimizer.state[name][kind] = x
                else:
                    optimizer.state[name] = x
        put(self.model, self.params, self.dtype)


def below(prefix: str, state: Params) -> Params:
    """The arrays of a state under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

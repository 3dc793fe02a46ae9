import random
import signal
from collections import defaultdict

import pytest

from ksa_mlx.chat import notebook
from ksa_mlx.convert import convert


def pytest_sessionstart():
    """A background job inherits that SIGINT is ignored, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the cases of a test with `@pytest.mark.quick(n)` all but n, always the same, are slow."""
    grids = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("quick"):
            grids[item.path, item.originalname, mark.args[0]].append(item)
    for (_, _, n), cases in grids.items():
        kept = random.Random(0).sample(range(len(cases)), min(n, len(cases)))
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def notebook_models(tmp_path_factory):
    """Folders of the embedded model in float32, and of a coarse 3-bit copy as its draft."""
    model, draft = (tmp_path_factory.mktemp("notebook") / name for name in ("model", "draft"))
    convert(str(notebook.CHECKPOINT), str(model), dtype="float32")
    convert(str(model), str(draft), quantize=True, q_bits=3, q_group_size=32)
    return model, draft

import os
import random
import signal
from collections import defaultdict
from unittest import mock

import pytest

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.chat.session import Session
from ksa_mlx.convert import convert

from ._chat import SYSTEM, ask_once


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


@pytest.fixture(autouse=True)
def environment():
    """Commands that a test runs in its own process may set variables for the models they load."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def notebook_models(tmp_path_factory):
    """Folders of the embedded model in float32, and of a coarse 3-bit copy as its draft."""
    model, draft = (tmp_path_factory.mktemp("notebook") / name for name in ("model", "draft"))
    convert(str(notebook.CHECKPOINT), str(model), dtype="float32")
    convert(str(model), str(draft), quantize=True, q_bits=3, q_group_size=32)
    return model, draft


@pytest.fixture(scope="session")
def folder():
    return notebook.CHECKPOINT


@pytest.fixture(scope="session")
def loaded(folder):
    """The embedded model and its tokenizer; nobody changes them."""
    return ksa_mlx.load(folder)


@pytest.fixture
def session(loaded, folder):
    return Session(*loaded, str(folder), system_prompt=SYSTEM, max_tokens=12)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def asked(loaded):
    """A session that has answered one question about the sample notebook, and its trace."""
    return ask_once(loaded)

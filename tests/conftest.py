import pytest

from ksa_mlx.chat import notebook
from ksa_mlx.convert import convert


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "feature(name, entry_point, verdict): a row of docs/features.md, shown by this test",
    )


@pytest.fixture(scope="session")
def notebook_models(tmp_path_factory):
    """Folders of the embedded model in float32, and of a coarse 3-bit copy as its draft."""
    model, draft = (tmp_path_factory.mktemp("notebook") / name for name in ("model", "draft"))
    convert(str(notebook.CHECKPOINT), str(model), dtype="float32")
    convert(str(model), str(draft), quantize=True, q_bits=3, q_group_size=32)
    return model, draft

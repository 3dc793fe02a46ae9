"""The table in docs/mlx-lm.md is what the tests' markers say."""

import pytest

from . import features


def test_table_is_what_the_markers_say():
    assert features.written() == features.table(), "run: python -m tests.features"


def test_rows_are_told_apart(tmp_path):
    assert len(features.rows()) >= 10
    file = tmp_path / "test_x.py"
    file.write_text("@pytest.mark.feature('a', 'b', 'c')\ndef test(): pass\n")
    assert features.rows_of(file) == [("a", "b", "c")]
    for wrong in ("'a', 'b'", "'a', 'b', c", "'a', 'b', ''", "'a', 'b', verdict='c'"):
        file.write_text(f"@pytest.mark.feature({wrong})\ndef test(): pass\n")
        with pytest.raises(ValueError, match=r"test_x\.py, line 1: found pytest\.mark\.feature"):
            features.rows_of(file)

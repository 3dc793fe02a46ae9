"""Which arm is taken: the right ones, and of these the fastest, by a clock of the tests' own."""

import json
import math
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest

from ksa_mlx.attention import choice, record
from ksa_mlx.attention.choice import OPERATIONS, Inputs, Key, Trial
from ksa_mlx.cache.storage import PLAIN

KEY = Key("decode", mx.float32, 64, 2, 4, 1, (PLAIN,), 1024)
LAYERS = 8


class Clock:
    """Arms that take as long as they are told, on a clock that moves with them alone."""

    def __init__(self):
        self.now, self.pending, self.calls = 0.0, 0.0, []

    def arm(self, name, ms, value=1.0, fault=None):
        """An arm that takes so many ms a layer. fault: (rows, error) raised at so many rows."""

        def run(queries, layer):
            self.calls.append((name, queries.shape[2], layer))
            if fault and (fault[0] is None or queries.shape[2] == fault[0]):
                raise fault[1]
            self.pending += ms / 1e3
            return queries * 0 + value

        return run

    def evaluate(self, *_):
        self.now += self.pending + 250e-6  # what an evaluation costs by itself
        self.pending = 0.0

    @property
    def runs(self):
        """Names of arms whose chains were run, in order."""
        chains = [name for name, _, layer in self.calls if layer == LAYERS - 1]
        return "".join(name[0] for name in chains)


def make(key, keys, fill):
    queries = mx.zeros((1, 2, key.rows, 4))
    return Inputs(queries, list(range(LAYERS if fill else 1)), None if fill else queries + 1)


TRIAL = Trial(make, checked=(10, 100), timed=(1024, 4096))


@pytest.fixture
def clock(monkeypatch):
    """A Mac with enough memory, where nothing is known yet."""
    clock = Clock()
    monkeypatch.setattr(choice, "clock", lambda: clock.now)
    monkeypatch.setattr(choice, "evaluate", clock.evaluate)
    monkeypatch.setattr(choice, "can_time", lambda: True)
    restart(monkeypatch)
    return clock


def restart(monkeypatch, file=None, machine="M9"):
    """As in a new process, with the file of a machine."""
    kept = record.Record(file, machine)
    monkeypatch.setattr(record, "here", lambda: kept)
    monkeypatch.setattr(choice, "_taken", {})
    monkeypatch.setattr(choice, "_retuned", set())
    monkeypatch.setattr(choice, "_warned", False)
    return kept


def arms(clock, operations=1.0, **kernels):
    return {OPERATIONS: clock.arm("operations", operations)} | {
        name: clock.arm(name, ms) if isinstance(ms, float) else ms for name, ms in kernels.items()
    }


def chosen(arms, key=KEY, untimed=OPERATIONS, retune=False):
    return choice.chosen(key, arms, TRIAL, untimed, retune)


# ---- Speed


@pytest.mark.parametrize(
    "kernel, taken", [(0.5, "kernel"), (0.96, "kernel"), (0.98, OPERATIONS), (2.0, OPERATIONS)]
)
def test_the_kernel_must_be_faster_by_three_percent(clock, kernel, taken):
    assert chosen(arms(clock, 1.0, kernel=kernel)) == taken
    assert chosen(arms(clock, 1.0, kernel=kernel), untimed="kernel") == taken


def test_of_several_kernels_the_fastest(clock):
    assert chosen(arms(clock, 1.0, kernel=0.9, rows=0.6, splits=0.7)) == "rows"


def test_they_are_timed_in_turns(clock):
    chosen(arms(clock, 0.1, kernel=0.05))
    each = "ok" + "okko" * choice.TURNS  # once to warm up
    assert clock.runs == each * len(TRIAL.timed)


def test_slow_arms_are_timed_less_often(clock):
    chosen(arms(clock, 20.0, kernel=15.0))
    assert clock.runs == ("ok" + "okko" * 2) * len(TRIAL.timed)


def test_times_are_of_a_layer(clock, monkeypatch):
    kept = restart(monkeypatch)
    chosen(arms(clock, 1.0, kernel=0.5))
    found = kept.find("milliseconds", str(KEY))
    # The fixed cost of an evaluation is spread over the layers of a chain.
    assert found == pytest.approx({OPERATIONS: 1.0, "kernel": 0.5}, abs=0.25 / LAYERS * 1.01)


def test_one_slow_turn_does_not_decide(clock, monkeypatch):
    kernel, calls = clock.arm("kernel", 0.5), []

    def hiccups(queries, layer):
        calls.append(layer)
        clock.pending += 0.05 * (len(calls) == 30)
        return kernel(queries, layer)

    assert chosen(arms(clock, 1.0, kernel=hiccups)) == "kernel"


def test_all_lengths_at_once(clock):
    """A text that grows meets no further timing; other numbers of rows have their own."""
    ways = arms(clock, 1.0, kernel=0.5)
    chosen(ways)
    timed = len(clock.calls)
    assert chosen(ways, KEY._replace(keys=4096)) == "kernel" and len(clock.calls) == timed
    assert chosen(ways, KEY._replace(rows=3)) == "kernel"
    assert {rows for _, rows, _ in clock.calls[timed:]} == {4, 3}, "timed at 4, compared at 3 too"
    timed = len(clock.calls)
    assert chosen(ways, KEY._replace(rows=2)) == "kernel"
    assert {layer for _, _, layer in clock.calls[timed:]} == {0}, "compared, not timed"


def test_buckets():
    assert [choice.bucket_of_rows(n) for n in range(1, 10)] == [1, 4, 4, 4, 8, 8, 8, 8, 9]
    trial = Trial(make, (), (1024, 4096, 16384))
    lengths = [1, 2048, 2049, 8192, 8193, 10**6]
    assert [trial.bucket(n) for n in lengths] == [1024, 1024, 4096, 4096, 16384, 16384]


# ---- Right


WRONG = [
    (1.021, None, r"the Metal kernel decode differs by 0.021 of the largest value"),
    (-1.0, None, "differs by 2 of"),
    (math.nan, None, "gives values that are no numbers"),
    (1.0, (None, RuntimeError("line 1: error\n  here")), "does not run: line 1: error here"),
    (1.0, (None, ValueError("threadgroup too large")), "does not run: threadgroup too large"),
]


@pytest.mark.parametrize("value, fault, message", WRONG)
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
def test_a_wrong_kernel_is_not_taken(clock, monkeypatch, value, fault, message, timed):
    """However fast it is, with one warning a process, in the next one too."""
    monkeypatch.setattr(choice, "can_time", lambda: timed)
    ways = arms(clock, 1.0, kernel=clock.arm("kernel", 0.1, value, fault))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=message) as caught:
            assert chosen(ways, untimed="kernel") == OPERATIONS
            assert chosen(ways, KEY._replace(keys=4096), "kernel") == OPERATIONS
        assert len(caught) == 1
        text = str(caught[0].message)
        assert "report" in text and "macOS" in text and mx.__version__ in text
        restart(monkeypatch)


def test_two_percent_are_allowed(clock):
    assert chosen(arms(clock, 1.0, kernel=clock.arm("kernel", 0.5, 1.019))) == "kernel"


def test_the_next_best_is_taken(clock):
    with pytest.warns(RuntimeWarning, match=r"decode \(rows\) differs"):
        fast = clock.arm("rows", 0.1, value=2.0)
        assert chosen(arms(clock, 1.0, kernel=0.5, rows=fast)) == "kernel"


def test_every_number_of_rows_is_compared(clock):
    """It is compiled in: what is right for 4 rows need not be for 3."""
    broken = clock.arm("kernel", 0.5, fault=(3, RuntimeError("rows 3")))
    ways = arms(clock, 1.0, kernel=broken)
    assert chosen(ways, KEY._replace(rows=4)) == "kernel"
    with pytest.warns(RuntimeWarning, match="rows 3"):
        assert chosen(ways, KEY._replace(rows=3)) == OPERATIONS
    assert chosen(ways, KEY._replace(rows=2)) == "kernel"


def test_a_chain_that_fails_is_not_taken(clock):
    """A kernel may be refused at the size that is timed alone."""

    def refused(queries, layer):
        if layer:
            raise RuntimeError("threadgroup memory")
        return queries + 1

    with pytest.warns(RuntimeWarning, match="threadgroup memory"):
        assert chosen(arms(clock, 1.0, kernel=refused)) == OPERATIONS


def test_wrong_operations_are_named(clock):
    """As in mlx#4022: the reference is neither arm, so MLX's own may be the wrong one."""
    ways = {OPERATIONS: clock.arm("operations", 0.1, 3.0), "kernel": clock.arm("kernel", 1.0)}
    with pytest.warns(RuntimeWarning, match="MLX's own attention differs by 2 of"):
        assert chosen(ways) == "kernel"


# ---- The file


def test_what_was_found_is_kept(clock, monkeypatch, tmp_path):
    file = tmp_path / "deep" / "kernels.json"
    restart(monkeypatch, file)
    ways = arms(clock, 1.0, kernel=0.5)
    chosen(ways)
    count = len(clock.calls)
    restart(monkeypatch, file)
    for keys in TRIAL.timed:
        assert chosen(ways, KEY._replace(keys=keys)) == "kernel"
    assert len(clock.calls) == count, "nothing was run again"
    assert [x.name for x in file.parent.iterdir()] == ["kernels.json"], "no parts are left"
    kept = json.loads(file.read_text())["M9"]
    assert set(kept) == {"difference", "milliseconds"}
    assert str(KEY) == (
        "decode, float32, head_dim 64, 2 KV heads of 4, rows 1, plain, keys 1024"
    ), "what a reader of the file sees"
    assert set(kept["milliseconds"][str(KEY)]) == set(ways)


def test_another_machine_finds_out_itself(clock, monkeypatch, tmp_path):
    """Another GPU, macOS, MLX or source; and neither forgets."""
    file = tmp_path / "kernels.json"
    restart(monkeypatch, file, "M9")
    assert chosen(arms(clock, 1.0, kernel=0.5)) == "kernel"
    restart(monkeypatch, file, "M10")
    assert chosen(arms(clock, 1.0, kernel=2.0)) == OPERATIONS
    count = len(clock.calls)
    restart(monkeypatch, file, "M9")
    assert chosen(arms(clock, 1.0, kernel=2.0)) == "kernel" and len(clock.calls) == count


def test_other_arms_are_timed_anew(clock, monkeypatch, tmp_path):
    """A version with another variant does not go by what it was not compared with."""
    file = tmp_path / "kernels.json"
    restart(monkeypatch, file)
    assert chosen(arms(clock, 1.0, kernel=0.5)) == "kernel"
    restart(monkeypatch, file)
    assert chosen(arms(clock, 1.0, kernel=0.5, rows=0.25)) == "rows"


def test_retune(clock, monkeypatch, tmp_path):
    """Everything is measured once more in a process, and kept."""
    file = tmp_path / "kernels.json"
    restart(monkeypatch, file)
    assert chosen(arms(clock, 1.0, kernel=0.5)) == "kernel"
    restart(monkeypatch, file)
    slower = arms(clock, 1.0, kernel=2.0)
    assert chosen(slower, retune=True) == OPERATIONS
    count = len(clock.calls)
    assert chosen(slower, KEY._replace(keys=4096), retune=True) == OPERATIONS
    assert len(clock.calls) == count, "once"
    restart(monkeypatch, file)
    assert chosen(arms(clock, 1.0, kernel=0.5)) == OPERATIONS


DAMAGED = [
    "", "{", "[]", "7", "null", '{"M9": 1}', '{"M9": {"milliseconds": []}}', "\x00\x01",
    '{"M9": {"difference": {"x": {"kernel": [0]}}}}', '{"M9": {"x": {"y": {"z": null}}}}',
    "[" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=lambda x: x[:40].encode("unicode_escape").decode())
def test_a_damaged_file_is_ignored(clock, monkeypatch, tmp_path, text):
    file = tmp_path / "kernels.json"
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="it is ignored, and will be written anew") as caught:
        restart(monkeypatch, file)
        assert chosen(arms(clock, 1.0, kernel=0.5)) == "kernel"
    assert len(caught) == 1 and str(file) in str(caught[0].message)
    restart(monkeypatch, file)
    assert chosen(arms(clock, 9.0, kernel=9.0)) == "kernel", "it was written anew"


def test_bytes_that_are_no_text(clock, monkeypatch, tmp_path):
    file = tmp_path / "kernels.json"
    file.write_bytes(b"\xff\xfe\x00{")
    with pytest.warns(RuntimeWarning, match="ignored"):
        restart(monkeypatch, file)


@pytest.mark.parametrize("where", ["a file in the way", "a folder in its place"])
def test_a_file_that_cannot_be_written_costs_one_line(clock, monkeypatch, tmp_path, where):
    """Permissions say nothing to root, so the ways are blocked otherwise."""
    if where == "a file in the way":
        (tmp_path / "caches").write_text("")
        file = tmp_path / "caches" / "kernels.json"
    else:
        file = tmp_path / "kernels.json"
        (file / "x").mkdir(parents=True)
    restart(monkeypatch, file)
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        assert chosen(arms(clock, 1.0, kernel=0.5)) == "kernel"
        assert chosen(arms(clock, 1.0, kernel=0.5), KEY._replace(rows=4)) == "kernel"
    assert len(caught) == 1


def test_where_the_file_lies(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/x"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert record.folder() == Path("/Users/x/Library/Caches/ksa-mlx")
    monkeypatch.setattr(sys, "platform", "linux")
    for value, expected in (("/c", "/c"), ("", "/Users/x/.cache"), ("c", "/Users/x/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert record.folder() == Path(expected) / "ksa-mlx"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    record.here.cache_clear()
    assert record.here().file is None
    record.here.cache_clear()


def test_the_machine(monkeypatch, tmp_path):
    """Everything that may change what is right or fast is in the name."""
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g17s"})
    file = tmp_path / "SystemVersion.plist"
    file.write_text(
        '<?xml version="1.0"?><plist version="1.0"><dict><key>ProductBuildVersion</key>'
        "<string>25B78</string></dict></plist>"
    )
    monkeypatch.setattr(record, "SYSTEM", file)
    name = record.machine()
    assert name.startswith(f"applegpu_g17s, 25B78, MLX {mx.__version__}, sources ")
    source = tmp_path / "decode.metal"
    source.write_text("other")
    monkeypatch.setattr(record.metal, "files", lambda: [source])
    assert record.machine() != name
    file.write_text("damaged")
    assert record.macos_build() == record.platform.release()


# ---- When


def test_what_can_be_timed(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not choice.can_time()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for size, expected in ((16 << 30, True), (1 << 30, False), (None, False)):
        found = {} if size is None else {"max_recommended_working_set_size": size}
        monkeypatch.setattr(mx, "get_active_memory", lambda: 1 << 29)
        monkeypatch.setattr(mx, "device_info", lambda found=found: found)
        assert choice.can_time() == expected


def test_untimed(clock, monkeypatch):
    monkeypatch.setattr(choice, "can_time", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(arms(clock, 1.0, kernel=0.1)) == OPERATIONS
        key = KEY._replace(head_dim=80)
        assert chosen(arms(clock, 1.0, kernel=9.0), key, "kernel") == "kernel"

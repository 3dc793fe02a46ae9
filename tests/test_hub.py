"""Converting and loading from a repo id, with the real huggingface_hub client.

The client reads its settings when it is imported, so one subprocess makes all the runs, in
order; each test looks at its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

import ksa_mlx

from ._convert_helpers import GOLDENS, WEIGHTS, add_tokenizer, hub_folder, sharded
from ._hub_server import HubServer

HYBRID = GOLDENS / "hybrid_mix1"
TORCH = importlib.util.find_spec("torch") is not None

# (name, repo, revision); the destination is the name
RUNS = [
    ("whole", "me/ksa"),
    ("cut", "me/cut"),
    ("tag", "me/ksa", "v1"),
    ("broken", "me/broken"),
    ("broken again", "me/broken"),
    ("absent", "me/absent"),
    ("gated", "me/gated"),
    ("revision", "me/ksa", "v9"),
    ("plain", "me/plain"),
    ("empty", "me/empty"),
    ("shards", "me/shards"),
    ("names", "me/names"),
    *([("pickle", "me/pickle")] if TORCH else []),
]

CHILD = """
import json, sys
import huggingface_hub.constants
import ksa_mlx, ksa_mlx.convert

# It keeps what it has by pieces of 10 MB, and our files are smaller.
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
results = {}
for name, repo, *revision in json.loads(sys.argv[1]):
    try:
        ksa_mlx.convert.convert(repo, f"out/{name}", revision=revision[0] if revision else None)
        results[name] = [0, ""]
    except ksa_mlx.errors.CheckpointError as e:
        results[name] = [1, str(e)]

model, tokenizer = ksa_mlx.load("me/ksa")  # unconverted, from the Hub
results["load"] = [tokenizer.encode("w5 w6"), [w.shape for w in [model.model.summary_embedding]]]
try:
    ksa_mlx.load_model("me/absent")
except ValueError as e:
    results["load absent"] = str(e)
# What another program might have left in the cache: what is needed, and not even that.
huggingface_hub.snapshot_download("me/part", allow_patterns=["*.json", "model*.safetensors"])
huggingface_hub.snapshot_download("me/config", allow_patterns=["config.json"])
huggingface_hub.snapshot_download(
    "me/half", allow_patterns=["*.json", "model-00001-of-00003.safetensors"]
)
print(json.dumps(results))
"""

ALONE = """
import json, sys
import ksa_mlx, ksa_mlx.convert

results = {}
for repo in ("me/part", "me/config", "me/half", "me/never"):
    for name, call in (
        ("load", lambda: ksa_mlx.load(repo, trust_remote_code=True)),
        ("convert", lambda: ksa_mlx.convert.convert(repo, sys.argv[1] + repo.replace("/", "-"))),
    ):
        try:
            call()
            results[f"{name} {repo}"] = "right"
        except ksa_mlx.errors.CheckpointError as e:
            results[f"{name} {repo}"] = str(e)
print(json.dumps(results))
"""


pytestmark = pytest.mark.slow  # a server, and downloads of whole models


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after all the runs, with their results, and the folder of their output."""
    folder = tmp_path_factory.mktemp("hub")
    repos = {"me/ksa": hub_folder(folder / "ksa")}
    add_tokenizer(repos["me/ksa"])
    (repos["me/ksa"] / "modeling_qwen3sa.py").write_text("raise SystemExit")
    repos["me/cut"] = repos["me/ksa"]
    repos["me/broken"] = repos["me/ksa"]
    repos["me/plain"] = hub_folder(folder / "plain", use_summary_attention=None)
    repos["me/shards"] = sharded(folder / "shards")
    repos["me/half"] = repos["me/shards"]
    repos["me/names"] = sharded(folder / "names", name="part-{}.[4bit].safetensors")
    shutil.copy(HYBRID / WEIGHTS, repos["me/names"] / "model-fp32.safetensors")
    repos["me/part"] = repos["me/config"] = hub_folder(folder / "part")
    add_tokenizer(repos["me/part"])
    for name in ("README.md", "LICENSE", "chat_template.jinja", "modeling_qwen3sa.py"):
        (repos["me/part"] / name).write_text("not in the cache")
    repos["me/empty"] = folder / "empty"
    repos["me/empty"].mkdir()
    (repos["me/empty"] / "README.md").write_text("nothing")
    if TORCH:
        import torch  # noqa: PLC0415 (an extra)

        repos["me/pickle"] = hub_folder(folder / "pickle")
        state = {n: torch.from_numpy(w) for n, w in load_file(HYBRID / WEIGHTS).items()}
        (repos["me/pickle"] / WEIGHTS).unlink()
        torch.save(state, repos["me/pickle"] / "pytorch_model.bin")

    breaks = {("me/cut", WEIGHTS): ["cut", "cut"], ("me/broken", WEIGHTS): ["cut", 503]}
    (folder / "work" / "out").mkdir(parents=True)
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(ksa_mlx.__file__).parents[1]),
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    with HubServer(repos, breaks, gated=("me/gated",)) as server:
        environment["HF_ENDPOINT"] = server.url
        command = [sys.executable, "-c", CHILD, json.dumps(RUNS)]
        done = subprocess.run(
            command, env=environment, cwd=folder / "work", capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    server.results = json.loads(done.stdout.splitlines()[-1])
    server.out = folder / "work" / "out"
    server.environment = environment
    return server


@pytest.fixture(
    scope="module", params=["HF_HUB_OFFLINE", pytest.param("no network", marks=pytest.mark.slow)]
)
def alone(request, hub):
    """What can be done with the cache alone."""
    environment = dict(hub.environment)  # its server is gone by now
    if request.param == "HF_HUB_OFFLINE":
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", ALONE, request.param]
    cwd = hub.out.parent
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_in_the_cache_is_enough(alone):
    """A README, a license or code that the cache lacks is no fault."""
    assert alone["load me/part"] == alone["convert me/part"] == "right"


def test_what_the_cache_lacks_is_named(alone):
    for name in ("load", "convert"):
        for repo, lacks in (
            ("me/config", "no model*.safetensors"),
            ("me/half", "no model-00002-of-00003.safetensors, model-00003-of-00003.safetensors"),
            ("me/never", "no config.json"),
        ):
            message = alone[f"{name} {repo}"]
            assert message.startswith(f"{repo}: ") and lacks in message
            assert "the Hub cannot be reached" in message and "\n" not in message


def test_only_the_files_of_the_index_are_downloaded(hub):
    assert not downloads(hub, "me/names", "model-fp32.safetensors")


def error_of(hub, name):
    """The one line of a run that must have failed."""
    status, message = hub.results[name]
    assert status == 1 and "\n" not in message
    return message


def test_nothing_half_written(hub):
    names = {p.name for p in hub.out.iterdir()}
    assert names == {"whole", "cut", "tag", "shards", "names", "broken again"} | (
        {"pickle"} if TORCH else set()
    )


@pytest.mark.parametrize("name", ["whole", "cut", "tag", "shards", "names", "broken again"])
def test_converted_from_the_hub(name, hub):
    assert hub.results[name][0] == 0
    model, _ = ksa_mlx.load_model(hub.out / name)
    here, _ = ksa_mlx.load_model(HYBRID)
    ids = mx.arange(40)[None]
    assert mx.array_equal(model(ids), here(ids))
    assert (hub.out / name / "tokenizer.json").exists() == (name not in ("shards", "names"))
    assert [p.name for p in (hub.out / name).glob("*.py")] == ["ksa_model.py"]


@pytest.mark.skipif(not TORCH, reason="the torch extra is not installed")
def test_pickle_from_the_hub(hub):
    assert hub.results["pickle"][0] == 0
    here, there = (ksa_mlx.load_model(p)[0] for p in (HYBRID, hub.out / "pickle"))
    ids = mx.arange(40)[None]
    assert mx.array_equal(here(ids), there(ids))


def downloads(hub, repo, file=WEIGHTS):
    path = f"{repo}/resolve/{hub.commit(repo)}/{file}"
    return [r for method, p, r in hub.log if method == "GET" and p == path]


def test_broken_connection_resumes(hub):
    """Cut in the middle twice: the client asks for the rest, not for the whole again."""
    first, *others = downloads(hub, "me/cut")
    assert first == "" and len(others) == 2
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in others]
    assert 0 < starts[0] < starts[1]


def test_broken_for_good(hub):
    message = error_of(hub, "broken")
    assert "me/broken: " in message and "not to be had from the Hub" in message
    # It tried to go on where it was cut, and then met an error that stays.
    first, second, *_ = downloads(hub, "me/broken")
    assert first == "" and second.startswith("bytes=")


def test_refusals(hub):
    assert "me/absent: no such folder here, and no such repo" in error_of(hub, "absent")
    assert "me/gated: this repo asks for your consent" in error_of(hub, "gated")
    assert "me/ksa: this repo has no revision 'v9'" in error_of(hub, "revision")
    assert "me/empty: " in error_of(hub, "empty") and "no config.json" in error_of(hub, "empty")
    assert "no such repo on the Hub" in hub.results["load absent"]


def test_plain_qwen3_is_refused_before_its_weights_are_downloaded(hub):
    assert "a plain qwen3 model, not a KSA model" in error_of(hub, "plain")
    assert downloads(hub, "me/plain", "config.json") and not downloads(hub, "me/plain")


def test_no_python_is_downloaded_to_convert(hub):
    assert not downloads(hub, "me/cut", "modeling_qwen3sa.py")


def test_load_from_the_hub(hub):
    assert hub.results["load"] == [[5, 6], [[1, 64]]]

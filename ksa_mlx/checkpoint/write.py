"""Writing a converted model: shards as they fill, and a folder that appears whole or not at all."""

import fcntl
import json
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..errors import CheckpointError, one_line
from ..weights import Plan
from .tensors import Checkpoint


class ShardWriter:
    """Collects weights and writes `model-*.safetensors` files of up to `limit` bytes, and
    their index, as `mlx_lm.utils.save_model` does."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.shard: dict[str, mx.array] = {}
        self.files: list[list[str]] = []  # names in each file
        self.held, self.nbytes, self.parameters = 0, 0, 0

    def add(self, name: str, array: mx.array):
        if self.shard and self.held + array.nbytes > self.limit:
            self.flush()
        self.shard[name] = array
        self.held += array.nbytes
        self.nbytes += array.nbytes

    def flush(self):
        file = self.folder / f"part-{len(self.files)}.safetensors"
        try:
            mx.save_safetensors(str(file), self.shard, metadata={"format": "mlx"})
        except RuntimeError as e:  # MLX does not tell a full disk from other faults
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"{self.folder.parent}: not writable, perhaps full, {free / 1e9:.1f} GB free "
                f"({one_line(e)})"
            ) from None
        self.files.append(list(self.shard))
        self.shard, self.held = {}, 0
        mx.clear_cache()

    def finish(self):
        """Write the last shard and the index, and give the files their names."""
        self.flush()
        count, weight_map = len(self.files), {}
        for i, names in enumerate(self.files):
            name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            name = name if count > 1 else "model.safetensors"
            os.rename(self.folder / f"part-{i}.safetensors", self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        total = {"total_size": self.nbytes, "total_parameters": self.parameters}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        with open(self.folder / "model.safetensors.index.json", "w") as f:
            json.dump(index, f, indent=4)


def write_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    writer: ShardWriter,
    dtype: mx.Dtype | None,
    quantized: dict[str, nn.Module],
    quiet: bool,
):
    """Read every tensor that the plan uses, check it, cast it, quantise it and write it."""
    made_of = defaultdict(list)
    for name, part in plan.parts.items():
        made_of[part.source].append(name)
    bar = tqdm(
        total=sum(checkpoint.tensors[n].nbytes for n in made_of),
        desc="Converting",
        unit="B",
        unit_scale=True,
        disable=quiet,
    )

    def check_finite(array: mx.array, origin: str, why: str):
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{checkpoint.tensors[origin].file}: {origin}: {why}")

    def write(name: str, array: mx.array):
        writer.parameters += array.size
        path = name.removesuffix(".weight")
        if path not in quantized:
            mx.eval(array)
            writer.add(name, array)
            return
        layer = quantized[path]
        arrays = mx.quantize(array, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
        mx.eval(arrays)
        for end, part in zip(("weight", "scales", "biases"), arrays, strict=False):
            writer.add(f"{path}.{end}", part)

    with bar:
        for origin in (n for n in checkpoint.tensors if n in made_of):
            tensor = checkpoint.read(origin)
            for name in made_of[origin]:
                array = plan.parts[name].of(tensor)
                check_finite(array, origin, "found NaN or Inf")
                if dtype is not None and dtype != array.dtype:
                    array = array.astype(dtype)
                    check_finite(array, origin, f"too large for {dtype}")
                write(name, array)
                del array
            del tensor
            bar.update(checkpoint.tensors[origin].nbytes)
        for name, shape in plan.zeros.items():
            write(name, mx.zeros(shape, dtype or mx.float32))


def dropped(checkpoint: Checkpoint, plan: Plan) -> dict[str, tuple[int, int]]:
    """Parameters and bytes that the converted model leaves out, by reason."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    used: dict[str, int] = defaultdict(int)
    for part in plan.parts.values():
        start, end = part.rows or (0, plan.source[part.source][0])
        used[part.source] += end - start
    for name, tensor in checkpoint.tensors.items():
        if name in plan.dead:
            why, size = plan.dead[name][1], tensor.size
        else:
            rows = tensor.shape[0]
            why, size = "padding rows", (rows - used[name]) * tensor.size // rows
        if size:
            total[why][0] += size
            total[why][1] += size * tensor.nbytes // tensor.size
    return {why: (n, b) for why, (n, b) in total.items()}


def new_folder(path: str | Path, flag: str = "--mlx-path") -> Path:
    """The path of a flag's folder, which must not be there yet. Raises `CheckpointError`."""
    destination = Path(path).expanduser()
    if not str(path):
        raise CheckpointError(f"{flag}: found '', expected the name of a new folder")
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination}: exists already; name a new folder")
    return destination


@contextmanager
def workspace(destination: Path):
    """A folder beside `destination` that takes its name at the end, or vanishes on an error.

    Its name is fixed and a running conversion locks it, so that what a killed one left behind
    is known for what it is, and is removed by the next.
    """
    parents = [p for p in destination.absolute().parents if not p.exists()]
    folder = destination.absolute().parent / f".{destination.name}.converting"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        why = e.strerror or one_line(e)
        raise CheckpointError(f"{destination}: cannot be created ({why})") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have renamed or removed it between our two calls.
            mine = folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder))
        except BlockingIOError:
            mine = False
        if not mine:
            raise CheckpointError(f"{destination}: another conversion is writing it")
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            for file in folder.iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            os.rename(folder, destination)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise
    finally:
        os.close(lock)

"""Reading checkpoints from disk: nothing in them is trusted, and nothing in them is run.

A checkpoint is a mapping of names to tensors that are read one at a time. Every fault is a
`CheckpointError` of one line that names the file.
"""

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.utils import infer_quant_config
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, one_line
from ..weights import Shape, some
from .source import PICKLES, SAFETENSORS, weight_files

# safetensors' and PyTorch's names of the dtypes that weights may have, and their size in bytes.
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Tensor:
    """What a checkpoint says of a tensor before it is read."""

    shape: Shape
    dtype: str
    file: Path

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES.get(self.dtype, 4)


class Checkpoint:
    """Tensors by name, in the order in which they are best read."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor):
        if name in self.tensors:
            first = self.tensors[name].file
            raise CheckpointError(f"{tensor.file}: {name} is in {first.name} too")
        self.tensors[name] = tensor

    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def check_dtypes(self, names):
        for name in names:
            tensor = self.tensors[name]
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor.file}: {name}: found dtype {tensor.dtype}, "
                    "expected float32, float16 or bfloat16"
                )

    def read(self, name: str) -> mx.array:
        """The tensor. Quickest once each, in order; only what is asked for is in memory."""
        raise NotImplementedError


class SafetensorsFiles(Checkpoint):
    def __init__(self, path: Path, files: list[Path]):
        super().__init__(path)
        self._open: Path | None = None
        self._arrays: dict[str, mx.array] = {}
        for file in files:
            try:
                with safe_open(file, framework="np") as f:
                    for name in f.keys():  # noqa: SIM118 (no mapping)
                        part = f.get_slice(name)
                        self.add(name, Tensor(tuple(part.get_shape()), part.get_dtype(), file))
            except (SafetensorError, OSError) as e:
                raise CheckpointError(
                    f"{file}: not a whole safetensors file ({one_line(e)})"
                ) from None

    def read(self, name: str) -> mx.array:
        file = self.tensors[name].file
        if file != self._open or name not in self._arrays:
            # Lazy: a tensor is read when it is evaluated, and freed because we let it go.
            arrays: Any = mx.load(str(file), format="safetensors")
            self._open, self._arrays = file, arrays
        return self._arrays.pop(name)


class PickleFiles(Checkpoint):
    """`torch.save` files, read as weights only: a pickle that asks for more is refused."""

    def __init__(self, path: Path, files: list[Path]):
        super().__init__(path)
        self._open: Path | None = None
        self._arrays: dict[str, Any] = {}
        for file in files:
            for name, tensor in self._load(file, "meta").items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.add(name, Tensor(tuple(tensor.shape), dtype, file))

    @staticmethod
    def _load(file: Path, device: str) -> dict[str, Any]:
        torch = import_torch(file)
        try:
            try:
                state = torch.load(file, device, weights_only=True, mmap=device == "cpu")
            except RuntimeError:
                # Files from before PyTorch 1.6 cannot be mapped into memory.
                state = torch.load(file, device, weights_only=True)
        except Exception as e:  # whatever a broken or hostile file makes of the reader
            raise CheckpointError(f"{file}: {_why_refused(e)}") from None
        for key in ("app", "model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise CheckpointError(f"{file}: found a {type(state).__name__}, expected a state dict")
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise CheckpointError(f"{file}: {name!r}: found no plain tensor")
        return state

    def read(self, name: str) -> mx.array:
        file = self.tensors[name].file
        if file != self._open or name not in self._arrays:
            self._arrays = {}
            self._open, self._arrays = file, self._load(file, "cpu")
        return from_torch(self._arrays.pop(name))


class DCPFolder(Checkpoint):
    """A `torch.distributed.checkpoint` folder, `{"app": {"model": state dict}}`.

    Its `.metadata` is a pickle, and PyTorch's reader would run whatever it asks for: ours
    allows the classes that such metadata is made of and refuses everything else.
    """

    PREFIX = "app.model."

    def __init__(self, path: Path):
        super().__init__(path)
        torch = import_torch(path)
        dcp = torch.distributed.checkpoint

        file = path / ".metadata"
        try:
            with open(file, "rb") as f:
                metadata = _Metadata(f).load()
            # Tensors only, and the model's only: an optimizer may be there too.
            tensors = {
                name: (tuple(int(n) for n in t.size), t.properties.dtype)
                for name, t in metadata.state_dict_metadata.items()
                if isinstance(t, dcp.metadata.TensorStorageMetadata)
                and name.startswith(self.PREFIX)
            }
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"found {info.relative_path!r}, expected a plain file name")
        except Exception as e:  # whatever a broken or hostile file makes of the reader
            raise CheckpointError(
                f"{file}: not the metadata of a checkpoint ({one_line(e)})"
            ) from None
        if not tensors:
            raise CheckpointError(f"{file}: found no tensor named {self.PREFIX}*")
        for name, (shape, dtype) in tensors.items():
            tensor = Tensor(shape, str(dtype).removeprefix("torch."), path)
            self.add(name[len(self.PREFIX) :], tensor)

        class Reader(dcp.FileSystemReader):  # type: ignore[name-defined]
            def read_metadata(self, *args, **kwargs):
                return metadata

        self._torch, self._dcp, self._reader = torch, dcp, Reader(path)

    def read(self, name: str) -> mx.array:
        tensor = self.tensors[name]
        # NaN, so that a part of the tensor that the folder lacks cannot pass for weights.
        target = self._torch.full(
            tensor.shape, float("nan"), dtype=getattr(self._torch, tensor.dtype)
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that it runs without a process group
                self._dcp.load(
                    {self.PREFIX + name: target}, storage_reader=self._reader, no_dist=True
                )
        except (Exception, self._dcp.api.CheckpointException) as e:  # the latter is no Exception
            why = e
            for failure in getattr(e, "failures", {}).values():
                why = failure[0] if isinstance(failure, tuple) else failure
            raise CheckpointError(f"{self.path}: {name}: not readable ({one_line(why)})") from None
        return from_torch(target)


class _Metadata(pickle.Unpickler):
    """Reads the metadata of a `torch.distributed.checkpoint` folder, and nothing else."""

    ALLOWED: ClassVar = {
        "torch": {
            "Size",
            *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
            *("int64", "int32", "int16", "int8", "uint8", "bool"),
        },
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return lambda *parts: "/".join(parts)  # where it was saved; nobody reads it
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"this pickle asks for {module}.{name}")


def _why_refused(error: Exception) -> str:
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"this pickle asks for {asked[1]}; only plain weights are read from a pickle"
    return f"not a whole PyTorch file of plain weights ({one_line(error)})"


def import_torch(file: Path | str = "PyTorch"):
    """PyTorch, with its readers, which is needed for pickles and Muse folders only."""
    try:
        import torch  # noqa: PLC0415 (an extra)
        import torch.distributed.checkpoint  # noqa: PLC0415
    except ImportError:
        raise CheckpointError(
            f"{file}: reading it needs PyTorch; in a clone of ksa-mlx: pip install -e '.[torch]'"
        ) from None
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        # CVE-2025-32434: weights_only does not protect before 2.6.
        raise CheckpointError(f"{file}: found PyTorch {torch.__version__}, expected at least 2.6")
    return torch


def from_torch(tensor) -> mx.array:
    """A PyTorch tensor on the CPU as an MLX array (a copy)."""
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # which numpy does not know
        return mx.array(tensor.view(import_torch().uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder (Hub layout or Kuaishou's Muse) or a single file."""
    if path.is_file():
        kind = SafetensorsFiles if path.suffix == ".safetensors" else PickleFiles
        return kind(path, [path])
    if files := weight_files(path, SAFETENSORS):
        return SafetensorsFiles(path, files)
    if files := weight_files(path, PICKLES):
        return PickleFiles(path, files)
    folders = sorted(f.parent for f in (*path.glob(".metadata"), *path.glob("*/.metadata")))
    pickles = sorted(f for p in ("*.pt", "*.pth", "*.bin") for f in path.glob(p))
    if len(found := folders or pickles) > 1:
        raise CheckpointError(f"{path}: found {some(p.name for p in found)}; name one of them")
    if folders:
        return DCPFolder(folders[0])
    if pickles:
        return PickleFiles(path, pickles)
    raise CheckpointError(
        f"{path}: no weights: found no model*.safetensors, no pytorch_model*.bin, "
        "no .metadata (Muse) and no state dict"
    )


class Dequantized(Checkpoint):
    """A quantised checkpoint of ours as the plain tensors that it stands for."""

    def __init__(self, packed: Checkpoint, settings: dict[str, Any], shapes: dict[str, Shape]):
        """Args: `settings` the config's `quantization`; `shapes` of the weights, unquantised."""
        super().__init__(packed.path)
        self._packed, self._settings = packed, settings
        parts = set()
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            if (scales := packed.tensors.get(f"{path}.scales")) and name in packed.tensors:
                # Scales of 8 bits are those of a float format, which MLX decodes to bfloat16.
                dtype = "BF16" if scales.dtype == "U8" else scales.dtype
                self.add(name, Tensor(shape, dtype, packed.tensors[name].file))
                parts |= {f"{path}.{end}" for end in ("weight", "scales", "biases")}
        for name, tensor in packed.tensors.items():
            if name not in parts:
                self.add(name, tensor)

    def read(self, name: str) -> mx.array:
        path, packed = name.removesuffix(".weight"), self._packed
        if f"{path}.scales" not in packed.tensors:
            return packed.read(name)
        parts = [
            packed.read(f"{path}.{end}")
            for end in ("weight", "scales", "biases")
            if f"{path}.{end}" in packed.tensors
        ]
        weights = {f"{path}.weight": parts[0], f"{path}.scales": parts[1]}
        # It asks the layer for the shape of its weight, no more.
        layer: Any = SimpleNamespace(weight=SimpleNamespace(shape=self.tensors[name].shape))
        try:
            how = self._settings.get(path) or infer_quant_config(path, layer, weights)
            biases = parts[2] if len(parts) == 3 else None
            return mx.dequantize(parts[0], parts[1], biases, **how)
        except (TypeError, ValueError, ZeroDivisionError) as e:
            raise CheckpointError(
                f"{self.tensors[name].file}: {name}: not dequantised ({one_line(e)})"
            ) from None

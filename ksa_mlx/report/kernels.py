"""Whether the kernels compile and are right, how fast they are, and what is chosen by itself."""

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from ..attention import choice, decode, metal, prefill, record, trial, tune
from ..attention.choice import OPERATIONS, Arm, Key, Trial
from ..cache.storage import PLAIN, Affine, Form
from .stage import Cases, Found, Options, Stage

FORMS: dict[str, tuple[Form, ...]] = {
    "plain": (PLAIN,),
    "8 bit": (Affine(8, 64),),
    "4 bit": (Affine(4, 64),),
    "4 bit, text 8": (Affine(4, 64), Affine(8, 64)),
}
# The released model's: 8 KV heads of 4 query heads, head_dim 128.
KV_HEADS, GROUP, DIM = 8, 4, 128


def key_of(
    dtype: mx.Dtype,
    dim: int,
    rows: int,
    form: str,
    keys: int = 0,
    name: str = "decode",
    sequences: int = 1,
) -> Key:
    return Key(name, dtype, dim, KV_HEADS, GROUP, rows, FORMS[form], keys, sequences)


def arms_of(key: Key) -> Mapping[str, Arm]:
    return prefill.ARMS if key.kernel == "prefill" else decode.arms_of(key)


def short(dtype: mx.Dtype) -> str:
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[choice.name_of(dtype)]


# Right


def variants() -> dict[str, tuple[Key, str, Arm, Trial]]:
    """What is compiled: every arm but operations, over head_dims, formats, rows and dtypes."""
    made = {}

    def add(key: Key, tried: Trial, form: str):
        for name, arm in arms_of(key).items():
            if name != OPERATIONS:
                what = f"{key.kernel} {name}, {short(key.dtype)}, head_dim {key.head_dim}"
                case = f"{what}, {form}, rows {key.rows}"
                case += f", {key.sequences} sequences" * (key.sequences > 1)
                made[case] = key, name, arm, tried

    bf16, dims = mx.bfloat16, sorted(metal.HEAD_DIMS, key=lambda dim: dim != DIM)
    for form in FORMS:
        for rows in (1, 2, 4, 8):
            add(key_of(bf16, DIM, rows, form), trial.DECODE, form)
    for dim in dims:
        for dtype in (bf16, mx.float16, mx.float32):
            key = key_of(dtype, dim, prefill.ROWS, "plain", 0, "prefill")
            add(key, trial.PREFILL, "plain")
            for form in ("plain", "4 bit"):
                if dim % 64 == 0 or form == "plain":
                    add(key_of(dtype, dim, 1, form), trial.DECODE, form)
    for form, sequences in (("plain", 2), ("plain", 8), ("4 bit", 2)):
        add(key_of(bf16, DIM, 1, form, sequences=sequences), trial.DECODE, form)
    for dim in dims:
        for rows in (4, 8):
            add(key_of(bf16, dim, rows, "plain"), trial.DECODE, "plain")
    return made


def compiles(key: Key, arm: Arm, tried: Trial) -> Found:
    """Compile what a variant runs, and compare it."""
    began = choice.clock()
    off = choice.difference(key, arm, tried)
    return {"off": off, "seconds": choice.clock() - began}


def right_cases(options: Options) -> Cases:
    if not options.metal:
        return {}
    return {
        case: partial(compiles, key, arm, tried)
        for case, (key, _, arm, tried) in variants().items()
    }


def is_right(found: Found) -> bool:
    off = found.get("off")
    return isinstance(off, float | int) and off <= choice.ALLOWED


def right_line(case: str, found: Found) -> str | None:
    if is_right(found):
        return None
    off = found.get("off", found.get("error"))
    return f"{case}: {off if isinstance(off, str) else f'off by {off:.2g}'}"


def right_lines(found: dict[str, Found]) -> list[str]:
    good = [x for x in found.values() if is_right(x)]
    if not good:
        return [f"0 of {len(found)} right"] if found else []
    worst, slowest = max(x["off"] for x in good), max(x["seconds"] for x in good)
    return [
        f"{len(good)} of {len(found)} compile and are right; off by {worst:.1e} of the largest "
        f"value at most; {sum(x['seconds'] for x in good):.1f} s in all, at most {slowest:.2f} s"
    ]


# Fast


def running(key: Key, metal: bool) -> dict[str, Arm]:
    return {n: arm for n, arm in arms_of(key).items() if metal or n == OPERATIONS}


def timed(key: Key, metal: bool) -> Found:
    """Milliseconds a layer of each arm that runs, as `choice` measures them."""
    inputs = trial.DECODE.make(key, key.keys, choice.CHAIN_BYTES if metal else 1)
    return {"ms": choice.measure(key, running(key, metal), inputs), "bytes": trial.nbytes(key)}


def decode_cases(options: Options) -> Cases:
    if not options.metal:
        keys = [key_of(mx.float32, DIM, 1, form, 1024) for form in ("plain", "4 bit")]
        return {decode_name(key): partial(timed, key, False) for key in keys}
    bf16, long = mx.bfloat16, 17408
    keys = [
        key_of(bf16, DIM, 1, form, n)
        for n in (1024, 3072, long, 65536)
        for form in ("plain", "8 bit", "4 bit")
    ]
    keys += [key_of(mx.float16, DIM, 1, "plain", long), key_of(bf16, DIM, 1, "4 bit, text 8", long)]
    keys += [
        key_of(bf16, DIM, rows, form, long) for form in ("plain", "4 bit") for rows in (2, 4, 8)
    ]
    keys += [key_of(bf16, dim, 1, "plain", 4096) for dim in (80, 256)]
    keys.append(key_of(bf16, DIM, 1, "plain", 4096, sequences=8))
    return {decode_name(key): partial(timed, key, True) for key in keys}


def decode_name(key: Key) -> str:
    form = next(name for name, forms in FORMS.items() if forms == key.forms)
    name = f"{short(key.dtype)}, {form}, rows {key.rows}, {key.keys} keys"
    name += f", head_dim {key.head_dim}" * (key.head_dim != DIM)
    return name + f", {key.sequences} sequences" * (key.sequences > 1)


def best(ms: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest kernel and its time."""
    kernels = [(took, name) for name, took in ms.items() if name != OPERATIONS]
    return (min(kernels)[1], min(kernels)[0]) if kernels else None


def ratio(found: Found | None) -> float | None:
    """How many times as long as operations the fastest kernel takes."""
    ms = (found or {}).get("ms", {})
    kernel = best(ms)
    return kernel[1] / ms[OPERATIONS] if kernel and OPERATIONS in ms else None


def timed_line(case: str, found: Found) -> str:
    ms, kernel = found.get("ms", {}), best(found.get("ms", {}))
    if not ms:
        return f"{case}: {found.get('error', 'nothing runs')}"

    def said(name: str, took: float) -> str:
        work = f"{found['flops'] / took / 1e9:.3g} TFLOPS" if "flops" in found else (
            f"{found['bytes'] / took / 1e6:.3g} GB/s")  # fmt: skip
        return (
            f"{name} {took * 1e3:.0f} us ({work})"
            if took < 10
            else f"{name} {took:.1f} ms ({work})"
        )

    parts = [said("MLX", ms[OPERATIONS])] if OPERATIONS in ms else []
    if kernel:
        parts.append(said(*kernel))
        if (times := ratio(found)) is not None:
            parts[-1] += f": {times:.2f}"
    if "causal" in found:
        parts.append(said("causal", found["causal"]))
    return f"{case}: " + ", ".join(parts)


def prefilled(key: Key, metal: bool) -> Found:
    """Prefill of the key's rows, beside MLX's causal attention of as many keys: the ceiling."""
    inputs = trial.PREFILL.make(key, key.keys, 1)
    layer = inputs.layers[0]
    keys = layer.end + layer.keys.shape[2]
    text = trial.random(key.dtype, *[(1, key.kv_heads, keys, key.head_dim)] * 2)
    mx.eval(text)

    def causal(queries, _):
        scale = key.head_dim**-0.5
        return mx.fast.scaled_dot_product_attention(queries, *text, scale=scale, mask="causal")

    ms = choice.measure(key, {**running(key, metal), "causal": causal}, inputs)
    pairs = key.rows * (keys - key.rows / 2) * key.kv_heads * key.group
    ceiling = ms.pop("causal", None)
    return {"ms": ms, "flops": 4 * pairs * key.head_dim, **({"causal": ceiling} if ceiling else {})}


def prefill_cases(options: Options) -> Cases:
    if options.metal:
        asked = [(rows, keys) for rows in (512, 2048) for keys in (4096, 17408)]
        dtype = mx.bfloat16
    else:
        asked, dtype = [(16, 1200)], mx.float32
    return {
        f"{short(dtype)}, {rows} rows on {keys} keys": partial(
            prefilled, key_of(dtype, DIM, rows, "plain", keys, "prefill"), options.metal
        )
        for rows, keys in asked
    }


# Chosen


def chosen(rows: int, form: str) -> Found:
    """What would be taken by itself, measured now, and kept for this machine."""
    found = {}
    for keys in trial.DECODE.timed:
        key = key_of(mx.bfloat16, DIM, rows, form, keys)
        taken = choice.chosen(key, arms_of(key), trial.DECODE, decode.untimed(key), True)
        found[str(keys)] = [taken, record.here().find("milliseconds", str(key)) or {}]
    return found


def chosen_for_prefill() -> Found:
    key = key_of(mx.bfloat16, DIM, prefill.ROWS, "plain", prefill.KEYS, "prefill")
    taken = choice.chosen(key, prefill.ARMS, trial.PREFILL, OPERATIONS, True)
    return {"512 rows": [taken, record.here().find("milliseconds", str(key)) or {}]}


def choice_cases(options: Options) -> Cases:
    if not options.metal:
        return {}
    made: Cases = {
        "MLX's attention": lambda: tune.check_attention(
            mx.bfloat16, KV_HEADS * GROUP, KV_HEADS, DIM
        ),
        "prefill": chosen_for_prefill,
    }
    for form in FORMS:
        for rows in (1, 4, 8) if form == "plain" else (1,):
            made[f"decode, {form}, rows {rows}"] = partial(chosen, rows, form)
    return made


def choice_line(case: str, found: Found) -> str:
    if "error" in found:
        return f"{case}: {found['error']}"
    parts = []
    for name, x in found.items():
        if name == "warnings":
            parts += x
        elif isinstance(x, list):
            times = ratio({"ms": {k: v for k, v in x[1].items() if not isinstance(v, str)}})
            parts.append(f"{name} {x[0]}" + (f" ({times:.2f})" if times else " (untimed)"))
        else:
            parts.append(f"{name} {x}" if isinstance(x, str) else f"{name} off by {x:.1e}")
    return f"{case}: " + ", ".join(parts)


RIGHT = Stage(
    "compiles",
    "Kernels that compile and are right",
    right_cases,
    right_line,
    right_lines,
    seconds=150,
    case_seconds=10,
    most=8,
)
DECODE = Stage(
    "decode",
    "Decode, one windowed layer of the 4B's shape: MLX's operations, best kernel: kernel / MLX",
    decode_cases,
    timed_line,
    seconds=60,
    most=26,
)
PREFILL = Stage(
    "prefill", "Prefill, the same layer, beside as many causal keys", prefill_cases, timed_line,
    seconds=40,
)  # fmt: skip
CHOICE = Stage(
    "choice",
    "Chosen by itself, at so many keys (kernel / operations)",
    choice_cases,
    choice_line,
    seconds=45,
)

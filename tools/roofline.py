"""Write docs/roofline.md: what a token costs the 4B in bytes and operations. Computed, not measured.

python tools/roofline.py > docs/roofline.md
"""

import argparse

from ksa_mlx.benchmark.models import keys_read, ksa_args

# Memory bandwidth in GB/s, from Apple's technical specifications (the larger GPU where two exist).
CHIPS = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
}
BITS = {"bf16": 16, "8 bit": 8.5, "4 bit": 4.5}  # with a bf16 scale and bias a group of 64
CONTEXTS = (1024, 4096, 16384, 32768, 65536, 131072)
BATCH = 16  # chunks summarised at once


def weights(args) -> float:
    """Numbers that a decode step reads: all layers and the tied head."""
    heads = args.num_attention_heads + args.num_key_value_heads
    layer = args.hidden_size * (2 * args.head_dim * heads + 3 * args.intermediate_size)
    return layer * args.num_hidden_layers + args.summary_token_begin * args.hidden_size


def keys(args, n: int, full: bool) -> float:
    """Keys that a decode step reads after n tokens, over all layers."""
    return n * args.num_hidden_layers if full else sum(keys_read(args, n))


def step(args, n: int, weight_bits: float, kv_bits: float, full: bool):
    """Bytes and multiply-adds of one decode step after n tokens, summary rows spread out."""
    per_key = 2 * args.num_key_value_heads * args.head_dim
    read = weights(args) * weight_bits / 8
    work = weights(args) + keys(args, n, full) * 2 * args.num_attention_heads * args.head_dim
    if not full and keys(args, n, full) < keys(args, n, True):
        k = args.summary_chunk_size
        read *= 1 + 1 / (BATCH * k)
        work += weights(args) * args.summary_token_num / k
    return read, keys(args, n, full) * per_key * kv_bits / 8, work


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    args = ksa_args("4b")
    print(
        f"""# What a token costs the 4B

Computed by `.venv/bin/python tools/roofline.py`, not measured: nobody has timed this project on
Apple hardware yet. `.venv/bin/python -m ksa_mlx benchmark --shape 4b --dtype bfloat16` measures on
a Mac; see [performance.md](performance.md).

A decode step reads every weight once ({weights(args) / 1e9:.2f} G numbers, the dropped own
projections not among them) and the keys and values that its query sees. In a full layer these are
all n, in a windowed layer n / 8 summaries and at most 1032 text tokens. Once in {BATCH} chunks a
step carries {BATCH} more rows, which read the weights with it: 1 / 128 more bytes and 1 / 8 more
operations a token, counted below. 8 and 4 bit are mlx's affine format, groups of 64: 8.5 and 4.5
bits a number.

## Bytes and operations a token

GB read a token: weights + keys and values; the last columns are billions of multiply-adds.
"""
    )
    rows = []
    for n in CONTEXTS:
        row = [f"{n // 1024}K"]
        for bits in BITS.values():
            for full in (False, True):
                w, kv, _ = step(args, n, bits, bits, full)
                row.append(f"{w / 1e9:.2f} + {kv / 1e9:.2f}")
        row += [f"{step(args, n, 16, 16, full)[2] / 1e9:.1f}" for full in (False, True)]
        rows.append(row)
    head = ["context"]
    head += [f"{name}, {kind}" for name in BITS for kind in ("KSA", "full")]
    print(table([*head, "operations, KSA", "operations, full"], rows))
    print(
        """
## What the memory's bandwidth allows

Tokens a second if each byte were read once at the chip's full bandwidth and nothing else took time: an upper bound, one
sequence. KSA / full attention, weights and caches in the same format. Machines with too little memory are not left out.
"""
    )
    for name, bits in BITS.items():
        rows = []
        for chip, bandwidth in CHIPS.items():
            row = [f"{chip} ({bandwidth:g} GB/s)"]
            for n in (1024, 16384, 65536, 131072):
                both = [
                    bandwidth * 1e9 / sum(step(args, n, bits, bits, f)[:2]) for f in (False, True)
                ]
                row.append("{:.1f} / {:.1f}".format(*both))
            rows.append(row)
        print(f"{name}\n\n{table(['chip', '1K', '16K', '64K', '128K'], rows)}\n")
    print(
        "Bandwidths: Apple's technical specifications, the larger GPU where a chip comes with two.\n"
        "Decode is bound by bytes at these sizes: with one sequence a step does one to three multiply-adds a byte at 8 bit."
    )


if __name__ == "__main__":
    main()

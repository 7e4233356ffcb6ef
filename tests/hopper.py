"""Compile the Triton kernels for a Hopper GPU on a machine that has none: run as a script in a fresh process.

A launch compiles instead of running: the interpreter takes what the compiler does not (two returns of different values, types
that differ between branches, tiles too large for shared memory), so both are asked.
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from seqloom.core.segments import Track, resolve
from seqloom.kernels import decay_scan, delta_scan, diagonal_scan, row_norm, selective_scan, short_conv

TARGET, SHARED = GPUTarget("cuda", 90, 32), 227 * 1024
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1", torch.int8: "*i8",
            torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
done = {}


def launch(kernel, *given, **named):
    named.pop("grid", None), named.pop("warmup", None)
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = {**dict(zip((p.name for p in kernel.params), given, strict=False)), **named}
    signature, constants = {}, {}
    for p in kernel.params:
        value = values.get(p.name, p.default if p.has_default else None)
        if p.is_constexpr or value is None or (type(value) is int and value == 1 and not p.do_not_specialize):
            constants[p.name], signature[p.name] = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[p.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i1" if isinstance(value, bool) else "i32" if abs(value) < 2**31 else "i64"
    key = kernel.__name__, str(signature), str(constants), str(options)
    if key not in done:
        built = triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=options)
        done[key] = built.metadata.shared
        assert built.metadata.shared <= SHARED, f"{kernel.__name__} wants {built.metadata.shared} bytes of shared memory"


JITFunction.run = launch
JITFunction.__getitem__ = lambda kernel, grid: lambda *given, **named: launch(kernel, *given, **named)


def streams(*shapes, dtype):
    return [torch.rand(*shape).to(dtype).requires_grad_() for shape in shapes]


def back(mixed):
    y = mixed if isinstance(mixed, torch.Tensor) else mixed.y
    (y.float().sum() + (0 if y is mixed else mixed.state.float().sum())).backward()


B, T, H = 2, 70, 2
ids = torch.ones(B, T, dtype=torch.int64).index_fill_(1, torch.arange(40, T), 2)
packed = resolve(ids, Track.start(B))[0]
CASES = {
    "diagonal_scan": lambda dtype, seg, n: back(diagonal_scan.fused(*streams((B, T, n), (B, T, n), dtype=dtype), segments=seg)),
    "decay_scan": lambda dtype, seg, n: [back(decay_scan.fused(
        *streams((B, T, H, n), (B, T, H, n), (B, T, H, n), *gate, dtype=dtype), segments=seg, axis=axis))
        for gate, axis in (((), "key"), (((B, T, H),), "key"), (((B, T, H, n),), "key"), (((B, T, H, n),), "value"))],
    "delta_scan": lambda dtype, seg, n: [back(delta_scan.fused(
        *streams((B, T, H, n), (B, T, H, n), (B, T, H, n), (B, T, H), *gate, dtype=dtype), segments=seg))
        for gate in ((), ((B, T, H),))],
    "selective_scan": lambda dtype, seg, n: back(selective_scan.fused(
        *streams((B, T, n), (B, T, n), (B, T, 16), (B, T, 16), dtype=dtype), A=-torch.rand(n, 16), D=torch.rand(n),
        segments=seg)),
    "short_conv": lambda dtype, seg, n: back(short_conv.fused(
        *streams((B, T, n), dtype=dtype), weight=torch.rand(n, 4).requires_grad_(), bias=None, segments=seg,
        activation="silu")),
    "row_norm": lambda dtype, seg, n: [back(y) for x in streams((B, T, n), dtype=dtype) for y in (
        row_norm.fused_l2_norm(x, eps=1e-6), row_norm.fused_rms_norm(x, torch.ones(n), eps=1e-6),
        *(row_norm.fused_rms_norm(x, torch.ones(n), x, eps=1e-6, gate_first=first) for first in (False, True)))],
}

if __name__ == "__main__":
    name, sizes = sys.argv[1], [int(n) for n in sys.argv[2:]]
    for size in sizes:
        for kind, segments in ((torch.bfloat16, packed), (torch.float32, None)):
            CASES[name](kind, segments, size)
    print(f"{name}: {len(done)} kernels compile for sm_90, at most {max(done.values())} bytes of shared memory")

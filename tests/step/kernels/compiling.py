"""Compiles every kernel for GPUs that need not be here, and prints a line for each.

python -m tests.step.kernels.compiling
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jumprelu_plugin.step.kernels import compaction, estimators, prefixes, products, rows, screening

F, H, W, L, N = "*fp32", "*fp16", "*i32", "*i64", "i32"
SUMS = dict(
    index=L, ends=L, weights=F, matrix=F, center=F, out=F, sum_of_piece=L, piece_ends=L,
    sums=N, columns=N, stride=N, longest=N,
)  # fmt: skip
PREFIXES = dict(cols=L, ends=L, values=F, weight=F, offset=F, target=F)

# The kernel, the types of its arguments, its compile-time arguments besides the tiles'.
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (
        screening._round_rows_kernel,
        dict(
            matrix=F, center=F, b_enc=F, edge=F, low=H, scaled=F, columns=N, width=N, stride=N,
            of_sums="fp32",
        ),
        dict(HAS_CENTER=True, TOKENS=True, BLOCK=1024),
    ),
    (
        screening._screen_kernel,
        dict(
            tokens=H, weights=H, token_scale=F, lowest=F, words=W, batch=N, d_sae=N, width=N,
            n_words=N,
        ),
        dict(UPCAST=False),
    ),
    (compaction._count_kernel, dict(words=W, counts=W, n_words=N), dict(BLOCK=64)),
    (
        compaction._write_kernel,
        dict(words=W, ends=L, rows=W, cols=W, n_words=N, capacity=N),
        dict(BLOCK=1024),
    ),
    (
        compaction._keep_kernel,
        dict(
            keep="*i1", before=L, before_by_latent=L, rows=W, cols=W, z=F, order=L, new_pairs=L,
            new_z=F, new_order=L, capacity=N, batch=N, d_sae=N, unused_z="fp32",
        ),
        dict(BLOCK=512),
    ),
    (
        products._sampled_kernel,
        dict(
            order=L, rows=L, cols=L, count=L, left=F, right=F, center=F, b_enc=F, edge=F, out=F,
            keep="*i1", keep_in_order="*i1", capacity=N, columns=N, left_stride=N, right_stride=N,
        ),
        dict(HAS_CENTER=True, SELECT=True),
    ),
    (
        estimators._forward_kernel,
        dict(z=F, cols=L, threshold=F, out=F, capacity=N),
        dict(JUMP=True, BLOCK=1024),
    ),
    (
        estimators._backward_kernel,
        dict(
            z=F, cols=L, threshold=F, grad=F, to_z=F, to_threshold=F, capacity=N,
            bandwidth="fp32", share="fp32",
        ),  # fmt: skip
        dict(JUMP=True, TO_INPUT=True, BLOCK=1024),
    ),
    (products._zero_divided_kernel, dict(out=F, piece_ends=L, columns=N), dict(BLOCK=512)),
    (products._sums_kernel, SUMS, dict(HAS_CENTER=True, SHARED=True)),
    (products._sums_kernel, SUMS, dict(HAS_CENTER=False, SHARED=False)),
    (
        prefixes._errors_kernel,
        PREFIXES | dict(x_hat=F, squares=F, columns=N, offset_stride=N),
        dict(BLOCKS=5, ENTRIES=8, COLUMNS=256),
    ),
    (
        prefixes._gradients_kernel,
        PREFIXES | dict(scale=F, grad_x_hat=F, gradients=F, columns=N, offset_stride=N),
        dict(BLOCKS=5, ENTRIES=8, COLUMNS=256),
    ),
    (rows._tangential_kernel, dict(gradient=F, matrix=F, columns=N), dict(BLOCK=4096)),
    (rows._unit_rows_kernel, dict(matrix=F, columns=N, smallest="fp32"), dict(BLOCK=4096)),
]  # fmt: skip
ALIGNED = {"width", "columns", "stride", "left_stride", "right_stride"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """Compile one kernel with each of its tile sizes for each target."""
    configs = getattr(kernel, "configs", [None])
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    for config in configs:
        tiles = {} if config is None else config.kwargs
        options = {} if config is None else dict(
            num_warps=config.num_warps, num_stages=config.num_stages
        )  # fmt: skip
        fixed = constants | tiles
        signature = {
            name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*") or name in ALIGNED
        }
        source = ASTSource(kernel, signature, fixed, aligned)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            ptx, shared = made.asm["ptx"], made.metadata.shared
            assert made.asm["cubin"]
            units = "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "no mma"
            local = " spills" if ".local" in ptx else ""
            print(f"{kernel.__name__} sm_{capability} {tiles} {units}, {shared} B shared{local}")


if __name__ == "__main__":
    for case in KERNELS:
        compiled(*case)

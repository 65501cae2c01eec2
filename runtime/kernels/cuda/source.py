"""From a variant to CUDA source: the generators' TIR, lowered by TVM. No GPU and no CUDA toolkit are needed."""

from __future__ import annotations

import re

from anncvt.runtime.kernels.cuda import prelude
from anncvt.runtime.kernels.cuda.variant import Variant


def source(variant: Variant) -> str:
    """A translation unit without ``#include`` lines; its one kernel is named ``variant.name``, with C linkage.

    Raises:
        RuntimeError: the compiler passes other arguments, or in another order, than the variant says.
    """
    import tvm

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
    options = {
        "config": {"tirx.UnrollLoop": {"explicit_unroll": False}},
        # Barriers are where the generators put them: TVM, which takes a buffer's halves for one, would add another.
        "disabled_pass": ["s_tir.ThreadSync"],
    }
    with tvm.transform.PassContext(**options):
        module = tvm.compile(tvm.IRModule({variant.name: _generate(variant)}), target).mod
    kernel = re.search(r'extern "C" __global__ [^;{]*\{.*', module.imports[0].inspect_source(), re.DOTALL)
    assert kernel is not None
    bounds = f"__launch_bounds__({variant.tile.threads}"
    text = kernel.group().replace(f"{variant.name}_kernel", variant.name)
    text = text.replace("#pragma unroll", f"#pragma unroll {variant.tile.unrolled}")
    # The loop over steps alternates between two buffers: unrolled, it would not fit the cache of instructions.
    text = re.sub(r"^( *)(for \(.*\{\n *__syncthreads)", r"\1#pragma unroll 1\n\1\2", text, flags=re.MULTILINE)
    if variant.vector == 4:
        text = text.replace(f"{bounds})", f"{bounds}, {variant.tile.blocks})")
    _check(variant, text)
    return f"{prelude.TEXT}\n{text}"


def _generate(variant: Variant) -> object:
    from anncvt.runtime.kernels.cuda.depthwise import depthwise
    from anncvt.runtime.kernels.cuda.epilogue import finish
    from anncvt.runtime.kernels.cuda.tiles import walk
    from anncvt.runtime.kernels.cuda.weights import weight_gradient

    if variant.kind.startswith("depthwise"):
        return depthwise(variant)
    if variant.kind == "finish":
        return finish(variant)
    return weight_gradient(variant) if variant.kind == "dw" else walk(variant)


def _check(variant: Variant, text: str) -> None:
    head = re.search(rf"\b{variant.name}\(([^)]*)\)", text)
    found = [] if head is None else [re.sub(r"_ptr$", "", p.split()[-1]) for p in head.group(1).split(",")]
    expected = [*variant.pointers, *variant.numbers]
    if found != expected:
        raise RuntimeError(f"{variant.name}: generated for the arguments {found}, launched with {expected}")

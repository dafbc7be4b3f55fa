"""Compiles the Triton kernels for GPUs that are not here and reads what the compilers report.

`python tests/ops/compile_all.py` prints a table of every kernel × architecture × dtype × head dimension × block
size and exits with 1 if one spills registers or asks for more shared memory than a GPU has; `--subset` takes a
representative few, `--json` prints one JSON line a kernel. It runs without TRITON_INTERPRET and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stream_kernels.block_attention.configs import compile_constants
from stream_kernels.block_attention.forward import _block_attention_fwd_kernel
from stream_kernels.block_attention.key_gradient import _key_gradient_kernel
from stream_kernels.block_attention.query_gradient import _query_gradient_kernel
from stream_kernels.launch import ENABLE_FP_FUSION

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes one block may have. The sm_80 tiles also serve sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
KERNELS: dict[str, Any] = {
    "forward": _block_attention_fwd_kernel,
    "query_gradient": _query_gradient_kernel,
    "key_gradient": _key_gradient_kernel,
}
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCKS = (16, 32, 64, 128)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT_POINTERS = ("gate", "sinks", "logsumexp", "mass", "scratch", "delta", "gate_parts", "dk_parts", "dv_parts")
INT_POINTERS = ("indices", "used_slots", "entries", "item_block", "item_first", "item_last", "item_part")
SECONDS = 300  # for one kernel; a shape that takes longer is a shape to avoid


@dataclass(frozen=True)
class Case:
    kernel: str
    architecture: str
    dtype: str
    d_head: int
    block: int
    plain: bool = False  # without gate, mask, sinks, soft-cap and window


@dataclass(frozen=True)
class Report:
    case: Case
    registers: int
    spilled: int  # bytes on the stack; on AMD the spilled registers are added
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.case.architecture]


def every_case() -> Iterator[Case]:
    for kernel in KERNELS:
        for architecture in TARGETS:
            for d_head in HEAD_DIMS:
                for block in BLOCKS:
                    yield Case(kernel, architecture, "bf16", d_head, block)
                    yield Case(kernel, architecture, "fp32", d_head, block)
                yield Case(kernel, architecture, "fp16", d_head, 64)
                yield Case(kernel, architecture, "bf16", d_head, 64, plain=True)


def subset() -> Iterator[Case]:
    """The cases with the largest tiles, one per kernel and architecture, and one odd head dimension."""
    for kernel in KERNELS:
        for architecture in TARGETS:
            yield Case(kernel, architecture, "bf16", 256, 128)
        yield Case(kernel, "sm_90", "bf16", 128, 64)
        yield Case(kernel, "sm_90", "bf16", 80, 32)
        yield Case(kernel, "sm_80", "fp32", 64, 32)


def compile_case(case: Case) -> Report:
    kernel = KERNELS[case.kernel]
    constants = compile_constants(
        case.kernel,  # type: ignore[arg-type]
        case.architecture,
        DTYPES[case.dtype],
        d_head=case.d_head,
        q_block=case.block,
        k_block=case.block,
        query_len=1 << 20,
    )
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    options["enable_fp_fusion"] = ENABLE_FP_FUSION
    constants |= {name: not case.plain for name in kernel.arg_names if name.startswith("HAS_")}
    if case.plain:
        constants |= {
            f"{name}_ptr": None for name in ("gate", "key_mask", "sinks") if f"{name}_ptr" in kernel.arg_names
        }
    signature = {name: _argument_type(name, case.dtype) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # As a launch would find them: pointers aligned, strides multiples of 16 numbers.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.startswith("stride_") or name.endswith("_ptr")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[kernel.arg_names[i]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[case.architecture], options=options)
    if case.architecture.startswith("gfx"):
        return _amd_report(case, compiled)
    return _nvidia_report(case, compiled)


def _argument_type(name: str, dtype: str) -> str:
    stem = name.removesuffix("_ptr")
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "softcap") else "i32"
    if stem in FLOAT_POINTERS:
        return "*fp32"
    if stem in INT_POINTERS:
        return "*i32"
    return "*u8" if stem == "key_mask" else f"*{dtype}"


def _nvidia_report(case: Case, compiled: Any) -> Report:
    """From the cubin: ptxas keeps spilled registers on the stack, which these kernels use for nothing else."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Report(case, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def _amd_report(case: Case, compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the compiler's report on {case} does not name {name}")
        return int(found.group(1))

    registers = number("vgpr_count")
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Report(case, registers, spilled, max(compiled.metadata.shared, number("group_segment_fixed_size")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subset", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="cases whose fields, joined by spaces, match this pattern")
    options = parser.parse_args()
    cases = [case for case in (subset() if options.subset else every_case()) if re.search(options.only, _label(case))]
    good = True
    with ProcessPoolExecutor(max_workers=1) as pool:
        for case in cases:
            try:
                report = pool.submit(compile_case, case).result(timeout=SECONDS)
            except FutureTimeout:
                print(f"{_label(case)}: not compiled within {SECONDS} seconds", file=sys.stderr)
                for process in pool._processes.values():
                    process.kill()
                return 1
            good &= report.fits
            if options.json:
                print(json.dumps(asdict(report) | {"fits": report.fits}), flush=True)
            else:
                print(
                    f"{_label(case):44} registers {report.registers:3} spilled {report.spilled:4} "
                    f"shared {report.shared:6} {'' if report.fits else 'DOES NOT FIT'}",
                    flush=True,
                )
    return 0 if good else 1


def _label(case: Case) -> str:
    return " ".join(map(str, asdict(case).values()))


if __name__ == "__main__":
    sys.exit(main())

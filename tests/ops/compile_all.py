"""Compiles the Triton kernels for GPUs that are not here and reads what the compilers report.

`python -m tests.ops.compile_all` prints a line for every kernel × architecture × dtype × head dimension × block size,
and exits with 1 if one spills registers, asks for more shared memory than a GPU has or takes too long to compile.
`--subset` takes a representative few, `--only` those that match a pattern, `--json FILE` keeps the figures.
It runs without TRITON_INTERPRET and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stream_kernels.block_attention import configs as attention_configs
from stream_kernels.block_attention.forward import _block_attention_fwd_kernel
from stream_kernels.block_attention.key_gradient import _key_gradient_kernel
from stream_kernels.block_attention.query_gradient import _query_gradient_kernel
from stream_kernels.launch import ENABLE_FP_FUSION
from stream_kernels.select_blocks import configs as select_configs
from stream_kernels.select_blocks.kernel import _select_blocks_kernel

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
    "select": _select_blocks_kernel,
}
ATTENTION = ("forward", "query_gradient", "key_gradient")
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCKS = (16, 32, 64, 128)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# slots, oversample, query_stride, representative, reduce, rank
SEARCHES: dict[str, tuple[int, int, int, str, str, str]] = {
    "default": (16, 6, 4, "mean_var", "mass", "mass"),
    "paper": (16, 1, 1, "first", "max", "max"),
    "mean": (16, 4, 4, "mean", "mass", "max"),
    "k_64": (64, 4, 4, "mean", "mass", "mass"),
    "k_128_centre": (128, 4, 4, "centre", "mass", "max"),
    "strided_peak": (16, 4, 4, "strided", "peak", "peak"),
    "most_rows": (128, 4, 2, "centre", "mass", "mass"),  # with blocks of 128
    "every_row": (16, 6, 1, "mean_var", "mass", "mass"),
    "every_row_last": (64, 2, 1, "last", "max", "max"),
}
KINDS_OF_POINTERS = {
    "*fp32": "gate sinks logsumexp mass scratch delta gate_parts dk_parts dv_parts logits scores",
    "*i32": "indices used_slots entries item_block item_first item_last item_part counts ranges free branches",
    "*u8": "key_mask",
    "*fp64": "sums squares",
}
SECONDS = 300  # for one kernel; a shape that takes longer is a shape to avoid


@dataclass(frozen=True)
class Case:
    """`variant`: "full" or "plain" (no gate, mask, sinks, soft-cap or window); of the search, a name in `SEARCHES`."""

    kernel: str
    architecture: str
    dtype: str
    d_head: int
    block: int
    variant: str = "full"

    def __str__(self) -> str:
        return " ".join(map(str, asdict(self).values()))


@dataclass(frozen=True)
class Report:
    case: Case
    registers: int
    spilled: int  # bytes on the stack; on AMD the spilled registers are added
    shared: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.case.architecture]


def every_case() -> Iterator[Case]:
    """80 and 96 are padded to 128: fewer block sizes for them. The search's binary does not depend on the head."""
    for architecture in TARGETS:
        for kernel in ATTENTION:
            for d_head in HEAD_DIMS:
                for block in (32, 64) if d_head in (80, 96) else BLOCKS:
                    yield Case(kernel, architecture, "bf16", d_head, block)
                    yield Case(kernel, architecture, "fp32", d_head, block)
                yield Case(kernel, architecture, "fp16", d_head, 64)
                yield Case(kernel, architecture, "bf16", d_head, 64, "plain")
        for search in SEARCHES:
            yield Case("select", architecture, "bf16", 128, 32, search)
        yield Case("select", architecture, "bf16", 128, 128, "most_rows")
        yield Case("select", architecture, "fp32", 128, 128, "most_rows")
        for block in BLOCKS:
            yield Case("select", architecture, "bf16", 128, block, "default")
            yield Case("select", architecture, "fp32", 128, block, "default")


def subset() -> Iterator[Case]:
    """Every kernel and every architecture, in cases that compile quickly."""
    yield Case("forward", "sm_90", "bf16", 128, 64)
    yield Case("forward", "gfx942", "bf16", 128, 64)
    yield Case("forward", "sm_80", "fp32", 64, 32)
    yield Case("query_gradient", "sm_80", "bf16", 80, 64)
    yield Case("key_gradient", "sm_100", "bf16", 64, 64)
    yield Case("key_gradient", "gfx942", "bf16", 64, 32)
    for architecture, search in (("sm_80", "k_64"), ("sm_90", "paper"), ("sm_100", "default"), ("gfx942", "default")):
        yield Case("select", architecture, "bf16", 128, 32, search)


def compile_case(case: Case) -> Report:
    kernel = KERNELS[case.kernel]
    sizes = {"d_head": case.d_head, "q_block": case.block, "k_block": case.block, "query_len": 1 << 20}
    dtype, plain = DTYPES[case.dtype], case.variant == "plain"
    if case.kernel == "select":
        names = ("slots", "oversample", "query_stride", "representative", "reduce", "rank")
        search: dict[str, Any] = dict(zip(names, SEARCHES[case.variant], strict=True))
        constants = select_configs.compile_constants(case.architecture, dtype, **sizes, **search)
    else:
        constants = attention_configs.compile_constants(case.kernel, case.architecture, dtype, **sizes)  # type: ignore[arg-type]
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    options["enable_fp_fusion"] = ENABLE_FP_FUSION
    constants |= {name: not plain for name in kernel.arg_names if name.startswith("HAS_")}
    if plain:
        absent = [f"{name}_ptr" for name in ("gate", "key_mask", "sinks")]
        constants |= dict.fromkeys(set(absent) & set(kernel.arg_names))
    signature = {name: _argument_type(name, case) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # As a launch would find them: pointers aligned, strides multiples of 16 numbers.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.startswith("stride_") or name.endswith("_ptr")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[kernel.arg_names[i]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=TARGETS[case.architecture], options=options)
    seconds = round(time.perf_counter() - start, 1)
    if case.architecture.startswith("gfx"):
        return _amd_report(case, compiled, seconds)
    return _nvidia_report(case, compiled, seconds)


def _argument_type(name: str, case: Case) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "softcap") else "i32"
    stem = name.removesuffix("_ptr")
    if case.kernel == "select" and stem == "out":
        return "*i32"
    return next((kind for kind, stems in KINDS_OF_POINTERS.items() if stem in stems.split()), f"*{case.dtype}")


def _nvidia_report(case: Case, compiled: Any, seconds: float) -> Report:
    """From the cubin: ptxas keeps spilled registers on the stack, which these kernels use for nothing else."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Report(case, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, seconds)


def _amd_report(case: Case, compiled: Any, seconds: float) -> Report:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the compiler's report on {case} does not name {name}")
        return int(found.group(1))

    registers = number("vgpr_count")
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    shared = max(compiled.metadata.shared, number("group_segment_fixed_size"))
    return Report(case, registers, spilled, shared, seconds)


def compile_within(case: Case, seconds: int) -> Report | None:
    """In a process of its own; None if it takes longer, or fails: the compiler's complaint is then on stderr."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(compile_case(case)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subset", action="store_true")
    parser.add_argument("--sabotage", action="store_true", help="one case whose tiles are too large")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="", help="cases whose fields, joined by spaces, match this pattern")
    options = parser.parse_args()
    if options.sabotage:
        attention_configs.TILES["forward"]["sm_80"][False, 128] = attention_configs.Tiles(32, 32, 4, 2)
        options.only = "^forward sm_80 fp32 128 32 full$"
    cases = [case for case in (subset() if options.subset else every_case()) if re.search(options.only, str(case))]
    figures, bad = [], 0
    for case in dict.fromkeys(cases):
        report = compile_within(case, SECONDS)
        if report is None:
            bad += 1
            print(f"{case}: failed, or not compiled within {SECONDS} seconds", flush=True)
            figures.append(asdict(case) | {"fits": False})
            continue
        bad += not report.fits
        row = asdict(report)
        figures.append(row.pop("case") | row | {"fits": report.fits})
        print(
            f"{case!s:44} registers {report.registers:3} spilled {report.spilled:4} shared {report.shared:6} "
            f"seconds {report.seconds:5} {'' if report.fits else 'DOES NOT FIT'}",
            flush=True,
        )
    if options.json:
        versions = {"triton": triton.__version__, "shared_limit": SHARED_LIMIT}
        options.json.write_text(json.dumps(versions | {"cases": figures}, indent=1) + "\n")
    print(f"{len(figures)} cases, {bad} that do not fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

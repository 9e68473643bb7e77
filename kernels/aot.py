"""Compile every kernel and configuration ahead of time, without a GPU, and hold it to written limits.

    python -P -m bough.kernels.aot [substring ...]      the variants whose names hold every substring; 1 on a breach

A variant is one kernel with one set of compile-time constants for one architecture. No kernel may spill: `LIMITS` has
the registers of a thread and the shared memory of a block that each may take, chosen so that the programs which
`tuning` counts on fit a multiprocessor, and the matrix instruction it must use.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bough.kernels import decode, draw, filtered_draw, gated_silu, logits, merge, prefill, rms_norm, rope, store_kv
from bough.kernels.tuning import SHARED_BYTES, Arch, AttentionConfig, decode_config, padded_head_dim, prefill_config

ARCHS: tuple[Arch, ...] = ((8, 0), (9, 0))
HEAD_DIMS = (64, 80, 96, 128, 256)
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1, "fp8e4nv": 1}
_BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True, slots=True)
class Limit:
    """What a kernel may take. instruction: one that must be there on (sm_80, sm_90), None where none is expected."""

    registers: int
    shared_bytes: int | None  # None: what the architecture has
    instruction: tuple[str | None, str | None] = (None, None)


# By the start of a variant's name, the first that fits. Registers: 168 lets 3 programs of 4 warps run on a
# multiprocessor, 255 is what a thread can have. Shared memory: 72 KB lets 3 run on sm_90.
LIMITS: dict[str, Limit] = {
    "decode_narrow_fp32q": Limit(168, 52 << 10, ("HMMA", "HMMA")),
    "decode_wide_fp32q": Limit(255, 104 << 10, ("HMMA", "HGMMA")),
    "prefill_fp32q": Limit(192, 68 << 10, ("HMMA", "HMMA")),
    "decode_narrow_fp32": Limit(128, 52 << 10),
    "decode_narrow_d256": Limit(255, 76 << 10, ("HMMA", "HMMA")),
    "decode_narrow": Limit(168, 72 << 10, ("HMMA", "HMMA")),
    "decode_wide_fp32": Limit(255, 104 << 10),
    "decode_wide_d256": Limit(255, 128 << 10, ("HMMA", "HGMMA")),
    "decode_wide": Limit(255, 113 << 10, ("HMMA", "HGMMA")),
    "prefill_fp32": Limit(128, 68 << 10),
    "prefill": Limit(255, None, ("HMMA", "HGMMA")),
    "merge": Limit(64, 4 << 10),
    "rms_norm": Limit(128, 1 << 10),
    "gated_silu": Limit(64, 1 << 10),
    "store_kv": Limit(64, 1 << 10),
    "rotate_and_store": Limit(128, 4 << 10),
    "penalise": Limit(64, 1 << 10),
    "draw": Limit(64, 4 << 10),
    "prepare_logits": Limit(64, 4 << 10),
    "survey": Limit(128, 8 << 10),
    "gather": Limit(128, 8 << 10),
    "filtered": Limit(128, 4 << 10),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation: types of the run-time arguments ("*bf16", "fp32", "i32"), constants for the others."""

    name: str
    arch: Arch
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled variant takes. spilled_bytes: of a thread, on its stack or in local memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: frozenset[str]


def variants() -> Iterator[Variant]:
    """Yield every variant: all head sizes and dtypes for attention, the largest and an odd shape for the rest."""
    for arch in ARCHS:
        yield from _attention_variants(arch)
        yield from _layer_variants(arch)


def _attention_variants(arch: Arch) -> Iterator[Variant]:
    for dtype, kv_dtype in (
        ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "i8"), ("bf16", "fp8e4nv"),
        ("fp32", "fp32"), ("fp32", "i8"), ("fp32", "fp8e4nv"),
    ):  # fmt: skip
        if kv_dtype == "fp8e4nv" and arch < (8, 9):
            continue
        for head_dim in HEAD_DIMS:
            yield from _attention(arch, dtype, kv_dtype, head_dim, page_size=16, group=4)
    yield from _attention(arch, "bf16", "bf16", 128, page_size=1, group=1)
    yield from _attention(arch, "bf16", "bf16", 64, page_size=16, group=7)
    yield from _attention(arch, "bf16", "bf16", 64, page_size=16, group=71, num_kv_heads=1)
    yield from _attention(arch, "bf16", "bf16", 256, page_size=16, group=2, window=4096, soft_cap=50.0)
    yield from _attention(arch, "bf16", "bf16", 128, page_size=16, group=4, window=1024)


def _attention(
    arch: Arch, dtype: str, kv_dtype: str, head_dim: int, *, page_size: int, group: int, num_kv_heads: int = 8,
    window: int = 0, soft_cap: float = 0.0,
) -> Iterator[Variant]:  # fmt: skip
    """Yield narrow and wide items and prefill of one model shape, and the merge."""
    quantised, element_bytes = kv_dtype != dtype, 4 if dtype == "fp32" else _BYTES[kv_dtype]
    scales = "*fp32" if quantised else f"*{kv_dtype}"
    shared_types = {"q": f"*{dtype}", "k_pages": f"*{kv_dtype}", "v_pages": f"*{kv_dtype}", "k_scales": scales,
                    "v_scales": scales, "kv_indices": "*i32", "scale": "fp32", "q_stride": "i32"}  # fmt: skip
    items = {"visible_lens": "*i32", "items": "*i32", "num_items": "*i32", "rows": "*i32", "part_out": "*fp32",
             "part_lse": "*fp32"}  # fmt: skip
    extras = f"_w{window}" * bool(window) + f"_c{soft_cap:g}" * bool(soft_cap)
    kind = ("fp32q_" if quantised else "fp32_") if dtype == "fp32" else ""
    shape = f"d{head_dim}_{dtype}_{kv_dtype}_p{page_size}_g{group}{extras}"

    def variant(name: str, kernel: Any, types: dict[str, str], config: AttentionConfig) -> Variant:
        constants = {
            "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
            "PAGE_SIZE": page_size, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "WINDOW": window,
            "SOFT_CAP": soft_cap, "QUANTISED": quantised, "PRECISION": "ieee" if kv_dtype == "fp32" else "tf32",
        }  # fmt: skip
        name = f"{name}_{kind}{shape}"
        return Variant(name, arch, kernel, shared_types | types, constants, config.num_warps, config.num_stages)

    narrow, wide = (decode_config(head_dim, element_bytes, arch, wide=wide) for wide in (False, True))
    yield variant("decode_narrow", decode.attend_items_kernel, items, narrow)
    yield variant("decode_wide", decode.attend_items_kernel, items, wide)
    config = prefill_config(head_dim, element_bytes, arch, windowed=window > 0)
    yield variant("prefill", prefill.prefill_attention_kernel, {"tiles": "*i32", "out": f"*{dtype}"}, config)
    types = {"part_out": "*fp32", "part_lse": "*fp32", "merge_indptr": "*i32", "merge_indices": "*i32",
             "out": f"*{dtype}"}  # fmt: skip
    constants = {"NUM_HEADS": num_kv_heads * group, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
                 "BLOCK_P": merge.BLOCK_PARTS}  # fmt: skip
    if not quantised and not extras:
        yield Variant(f"merge_{shape}", arch, merge.merge_partials_kernel, types, constants, merge.warps_for(head_dim))


def _layer_variants(arch: Arch) -> Iterator[Variant]:
    for size in (896, 4096, 8192):
        for has_residual in (False, True):
            block = triton.next_power_of_2(size)
            types = dict.fromkeys(("x", "residual", "weight", "out"), "*bf16") | {"eps": "fp32", "x_stride": "i32"}
            constants = {"SIZE": size, "BLOCK": block, "HAS_RESIDUAL": has_residual}
            name = f"rms_norm_{size}" + "_residual" * has_residual
            yield Variant(name, arch, rms_norm.rms_norm_kernel, types, constants, rms_norm.warps_for(block))
    types = {"gate_up": "*bf16", "out": "*bf16"}
    for size in (4864, 14336):
        constants = {"SIZE": size, "BLOCK": gated_silu.BLOCK}
        yield Variant(f"gated_silu_{size}", arch, gated_silu.gated_silu_kernel, types, constants, 4)
    for kv_dtype, largest in (("bf16", 0.0), ("i8", 127.0), ("fp8e4nv", 448.0)):
        if kv_dtype == "fp8e4nv" and arch < (8, 9):
            continue
        for head_dim in (80, 128, 256):
            yield from _kv_write_variants(arch, kv_dtype, largest, head_dim)
    types = {"logits": "*fp32", "indptr": "*i32", "token_ids": "*i32", "counts": "*i32", "biases": "*fp32",
             "repetition": "*fp32", "frequency": "*fp32", "presence": "*fp32", "stride": "i32"}  # fmt: skip
    yield Variant("penalise", arch, logits.penalise_kernel, types, {"BLOCK": logits.ENTRIES}, 4)
    types = {"logits": "*fp32", "block_max": "*fp32", "block_sum": "*fp32", "block_argmax": "*i32",
             "temperatures": "*fp32", "points": "*fp64", "tokens": "*i32"}  # fmt: skip
    constants = {"VOCAB_SIZE": 128256, "NUM_BLOCKS": 126, "BLOCK_B": 128, "BLOCK": logits.BLOCK}
    yield Variant("draw", arch, draw.draw_kernel, types, constants, 4)
    types = {"masks": "*i32", "mask_rows": "*i32", "temperatures": "*fp32", "out": "*fp32", "block_max": "*fp32",
             "block_sum": "*fp32", "block_argmax": "*i32", "stride": "i32", "mask_stride": "i32"}  # fmt: skip
    for dtype in ("bf16", "fp32"):
        constants = {"VOCAB_SIZE": 128256, "BLOCK": logits.BLOCK}
        name, kernel = f"prepare_logits_{dtype}", logits.prepare_logits_kernel
        yield Variant(name, arch, kernel, {"logits": f"*{dtype}"} | types, constants, 4)
    yield from _filter_variants(arch)


def _filter_variants(arch: Arch) -> Iterator[Variant]:
    rows = {"logits": "*fp32", "block_max": "*fp32", "block_sum": "*fp32", "rows": "*i32"}
    tiers = {"tier_counts": "*i32", "tier_masses": "*fp32"}
    filters = {"top_k": "*i32", "top_p": "*fp64", "min_p": "*fp32"}
    found = {"candidates": "*i32", "num_candidates": "*i32"}
    drawn = {"points": "*fp64", "tokens": "*i32"}
    constants = {"VOCAB_SIZE": 128256, "NUM_BLOCKS": 126, "BLOCK_B": 128, "TIERS": filtered_draw.TIERS}
    blocks = constants | {"BLOCK": logits.BLOCK}
    yield Variant("survey", arch, filtered_draw.survey_kernel, rows | tiers, blocks, 8)
    yield Variant("gather", arch, filtered_draw.gather_kernel, rows | tiers | filters | found, blocks, 8)
    blocks = constants | {"BLOCK": filtered_draw.CANDIDATES, "WAYS": filtered_draw.WAYS}
    kernel = filtered_draw.draw_filtered_kernel
    yield Variant("filtered", arch, kernel, rows | filters | found | drawn, blocks, 8)


def _kv_write_variants(arch: Arch, kv_dtype: str, largest: float, head_dim: int) -> Iterator[Variant]:
    scales = "*fp32" if largest else f"*{kv_dtype}"
    pages = {"k_pages": f"*{kv_dtype}", "v_pages": f"*{kv_dtype}", "k_scales": scales, "v_scales": scales}
    constants: dict[str, Any] = {"LARGEST": largest, "IS_INTEGER": kv_dtype == "i8"}
    constants |= {"NUM_KV_HEADS": 8, "HEAD_DIM": head_dim}
    types = {"k": "*bf16", "v": "*bf16", "slots": "*i64", "k_stride": "i32", "v_stride": "i32"}
    blocks: dict[str, Any] = {"BLOCK_D": padded_head_dim(head_dim)}
    name = f"store_kv_d{head_dim}_{kv_dtype}"
    yield Variant(name, arch, store_kv.store_kv_kernel, pages | types, constants | blocks, 1)
    types = {"qkv": "*bf16", "positions": "*i32", "cos": "*fp32", "sin": "*fp32", "slots": "*i32", "q_weight": "*bf16",
             "k_weight": "*bf16", "eps": "fp32", "stride": "i32"}  # fmt: skip
    half = triton.next_power_of_2(head_dim // 2)
    for group in (1, 8):
        for has_norm in (False, True):
            blocks = {"GROUP": group, "BLOCK_G": triton.next_power_of_2(group + 1), "BLOCK_HALF": half,
                      "HAS_NORM": has_norm}  # fmt: skip
            name = f"rotate_and_store_d{head_dim}_{kv_dtype}_g{group}" + "_norm" * has_norm
            kernel = rope.rotate_and_store_kernel
            yield Variant(name, arch, kernel, pages | types, constants | blocks, rope.warps_for(group))


def is_aligned(name: str, kind: str) -> bool:
    """Tell whether an argument is a multiple of 16 at a launch, which Triton compiles for.

    PyTorch's allocations and our buffers' parts are, and rows of our shapes; masks' rows are 4,008 words for 128,256
    tokens.
    """
    return kind.startswith("*") or (name.endswith("stride") and name != "mask_stride")


def resources_of(variant: Variant) -> Resources:
    """Compile a variant (about a second; Triton keeps results on disk) and return what it takes."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    assert {name for name in names if name not in variant.types} == set(variant.constants), variant.name
    aligned = [is_aligned(name, signature[name]) for name in names]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, is_so in enumerate(aligned) if is_so},
    )
    major, minor = variant.arch
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output_of("cuobjdump", "-res-usage", file.name)
        code = _output_of("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump's answer is not understood: {usage}"
    registers, stack, local = map(int, found.groups())
    instructions = frozenset(re.findall(r"\b(HGMMA|QGMMA|HMMA|LDGSTS|STL|LDL)\b", code))
    return Resources(registers, stack + local, compiled.metadata.shared, instructions)


def _output_of(program: str, *arguments: str) -> str:
    command = [os.path.join(_BINARIES, program), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def limit_of(variant: Variant) -> Limit:
    """Return the first limit whose key starts the variant's name, with `_d256` after the kind where there is one."""
    kind, _, shape = variant.name.partition("_d")
    if shape.startswith("256") and f"{kind}_d256" in LIMITS:
        return LIMITS[f"{kind}_d256"]
    return next(limit for prefix, limit in LIMITS.items() if variant.name.startswith(prefix) and "_d" not in prefix)


def breaches(variant: Variant, resources: Resources) -> list[str]:
    """Return what a variant takes beyond its limits, in words; empty if nothing."""
    limit = limit_of(variant)
    shared = SHARED_BYTES[variant.arch] if limit.shared_bytes is None else limit.shared_bytes
    instruction = limit.instruction[variant.arch >= (9, 0)]
    found = []
    if resources.spilled_bytes or resources.instructions & {"STL", "LDL"}:
        found.append(f"spills {resources.spilled_bytes} bytes")
    if resources.registers > limit.registers:
        found.append(f"{resources.registers} registers, limit {limit.registers}")
    if resources.shared_bytes > shared:
        found.append(f"{resources.shared_bytes} bytes of shared memory, limit {shared}")
    if instruction is not None and instruction not in resources.instructions:
        found.append(f"no {instruction} among its instructions")
    return found


def main(wanted: list[str]) -> int:
    """Compile the variants whose names hold every wanted substring, print a line for each, return how many breach."""
    num_bad = num_compiled = 0
    for variant in variants():
        name = f"sm_{variant.arch[0]}{variant.arch[1]} {variant.name}"
        if not all(part in name for part in wanted):
            continue
        resources = resources_of(variant)
        bad = breaches(variant, resources)
        num_compiled, num_bad = num_compiled + 1, num_bad + bool(bad)
        verdict = "; ".join(bad) or "ok"
        print(
            f"{name:52} {resources.registers:4} registers {resources.shared_bytes:7} bytes  "
            f"{' '.join(sorted(resources.instructions)):12}  {verdict}",
            flush=True,
        )
    print(f"{num_compiled} compiled, {num_bad} beyond their limits")
    return num_bad


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))

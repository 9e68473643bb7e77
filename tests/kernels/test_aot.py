"""Kernels compiled for GPUs without one: a set that holds every kernel and kind of tile. `make kernels` does all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bough.kernels.aot import LIMITS, Resources, Variant, breaches, limit_of, resources_of, variants
from bough.kernels.tuning import SHARED_BYTES, decode_config, padded_head_dim, prefill_config

VARIANTS = {f"sm_{variant.arch[0]}{variant.arch[1]} {variant.name}": variant for variant in variants()}
REPRESENTATIVES = [
    "sm_80 decode_narrow_d128_bf16_bf16_p16_g4",
    "sm_80 decode_wide_d256_bf16_i8_p16_g4",
    "sm_80 prefill_d80_bf16_bf16_p16_g4",
    "sm_80 merge_d128_bf16_bf16_p16_g4",
    "sm_80 prepare_logits_bf16",
    "sm_80 rotate_and_store_d128_i8_g8_norm",
    "sm_80 gated_silu_14336",
    "sm_90 decode_narrow_d128_bf16_bf16_p16_g4",
    "sm_90 decode_narrow_d128_bf16_fp8e4nv_p16_g4",
    "sm_90 decode_wide_d128_bf16_bf16_p1_g1",
    "sm_90 decode_wide_d64_bf16_bf16_p16_g71",
    "sm_90 decode_wide_d256_bf16_bf16_p16_g2_w4096_c50",
    "sm_90 prefill_d128_bf16_bf16_p16_g4",
    "sm_90 prefill_d256_bf16_i8_p16_g4",
    "sm_90 merge_d256_fp16_fp16_p16_g4",
    "sm_90 rms_norm_8192_residual",
    "sm_90 store_kv_d80_fp8e4nv",
    "sm_90 rotate_and_store_d80_bf16_g1",
    "sm_80 decode_wide_fp32q_d256_fp32_i8_p16_g4",
    "sm_90 prefill_fp32q_d128_fp32_fp8e4nv_p16_g4",
    "sm_90 penalise",
    "sm_90 draw",
    "sm_90 survey",
    "sm_80 gather",
    "sm_90 filtered",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_compiled_kernel_keeps_to_its_limits(name: str) -> None:
    assert breaches(VARIANTS[name], resources_of(VARIANTS[name])) == []


def test_the_set_holds_every_kernel_and_every_limit_has_its_kernels() -> None:
    assert {VARIANTS[name].kernel for name in REPRESENTATIVES} == {variant.kernel for variant in VARIANTS.values()}
    used = {id(limit_of(variant)) for variant in VARIANTS.values()}
    assert used == {id(limit) for limit in LIMITS.values()}
    assert Counter((v.arch, v.name) for v in variants()).most_common(1)[0][1] == 1


def test_pages_are_loaded_ahead_of_their_use() -> None:
    """Three stages hold two tiles of keys and values in flight: 64 KB, and the pages of the next tile are carried."""
    variant = VARIANTS["sm_90 decode_narrow_d128_bf16_bf16_p16_g4"]
    assert resources_of(variant).shared_bytes >= 2 * 2 * 64 * 128 * 2
    assert resources_of(replace(variant, num_stages=2)).shared_bytes < 2 * 2 * 64 * 128 * 2


def test_what_a_breach_says() -> None:
    variant: Variant = VARIANTS["sm_90 decode_wide_d128_bf16_bf16_p16_g4"]
    fine = Resources(255, 0, 100_000, frozenset({"HGMMA", "LDGSTS"}))
    assert breaches(variant, fine) == []
    assert breaches(variant, replace(fine, spilled_bytes=8)) == ["spills 8 bytes"]
    assert breaches(variant, replace(fine, instructions=frozenset({"HGMMA", "STL"}))) == ["spills 0 bytes"]
    assert breaches(variant, replace(fine, shared_bytes=120_000, registers=256)) == [
        "256 registers, limit 255",
        "120000 bytes of shared memory, limit 115712",
    ]
    assert breaches(variant, replace(fine, instructions=frozenset({"HMMA"}))) == ["no HGMMA among its instructions"]


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
def test_configurations_fit_every_architecture_they_are_chosen_for(arch: tuple[int, int], element_bytes: int) -> None:
    """Two tiles, of keys and of values, for each stage in flight, and the queries."""
    for head_dim in (16, 64, 80, 96, 128, 256):
        width = padded_head_dim(head_dim)
        assert width >= max(16, head_dim)
        chosen = [decode_config(head_dim, element_bytes, arch, wide=wide) for wide in (False, True)]
        for config in [*chosen, prefill_config(head_dim, element_bytes, arch)]:
            assert min(config.block_m, config.block_n) >= 16, "the smallest product of tensor cores"
            stages = max(1, config.num_stages - 1)
            needed = (config.block_m + 2 * stages * config.block_n) * width * element_bytes
            assert needed <= SHARED_BYTES.get(arch, 101376)

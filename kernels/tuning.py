"""Tile sizes, warps and pipeline depth of the attention kernels: one pure function per kernel, no tuning at run time.

Figures behind the choices, compiled for sm_90 (registers, shared memory) and not yet timed on a GPU: with 16 rows the
products are mma.sync, from 64 rows on wgmma; 32 rows cost the registers of 64 and gain nothing. Wider heads take
smaller tiles of keys, so that the tile and the accumulator fit 255 registers without spills. `SHARED_BYTES` is what a
block may use on an architecture; stages are dropped until the tiles fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448}
_DEFAULT_SHARED_BYTES = 101376  # what every architecture from sm_80 on has
NARROW_ROWS = 16
WIDE_ROWS = 64

Arch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How one attention kernel is compiled and launched.

    block_m: query rows (tokens times heads of a group). block_n: keys. per_sm: programs of a fixed grid for each
    multiprocessor, as many as run at a time.
    """

    name: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int = 1


def padded_head_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, that a head's channels are padded to: tiles have no other sizes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def decode_config(head_dim: int, element_bytes: int, arch: Arch, *, wide: bool = False) -> AttentionConfig:
    """Return the configuration of `decode.attend_items` for items of up to 16 rows, or 64 if wide.

    element_bytes: of one number in the KV pages, or 4 where queries are float32: their products use no tensor cores, or
    with quantised keys twice the registers.
    """
    width = padded_head_dim(head_dim)
    rows = WIDE_ROWS if wide else NARROW_ROWS
    if wide and width > 128 and element_bytes == 4 and arch < (9, 0):
        rows = WIDE_ROWS // 2  # 64 spill where keys are widened
    num_warps = 8 if width > 128 and (wide or element_bytes == 4) else 4
    block_n, num_stages = (64 if width <= 128 else 32), 3
    if element_bytes == 1:  # the widened copy of a tile takes registers of its own
        block_n, num_stages = 32, 4
    if element_bytes == 4:  # no tensor cores: products are sums of one thread, whose registers a tile must fit
        block_n, num_stages, num_warps = 16, 2, 8 if wide else num_warps
    config = AttentionConfig(
        f"decode_{rows}x{block_n}_d{width}",
        rows,
        block_n,
        num_warps,
        num_stages,
        1 if width > 128 else 2 if wide else 3,
    )
    return _fitted(config, width, element_bytes, arch)


def prefill_config(head_dim: int, element_bytes: int, arch: Arch, *, windowed: bool = False) -> AttentionConfig:
    """Return the configuration of `prefill.prefill_attention`; one per model, so that a row's bits do not depend on how
    a prompt was cut into chunks. windowed: every tile is masked, which takes registers."""
    width = padded_head_dim(head_dim)
    has_wgmma = arch >= (9, 0)
    rows, block_n, num_stages = 128, 64, 3
    if element_bytes == 4:
        rows, block_n, num_stages = 32, 16, 2
    elif element_bytes == 1:
        rows, block_n = (128 if width <= 128 and has_wgmma else 64), (32 if width <= 128 or has_wgmma else 16)
    elif width > 128:
        rows, block_n = (128 if has_wgmma else 64), 32
    if windowed and not has_wgmma:
        rows = min(rows, 64)
    # 8 warps of an sm_80 have 128 registers a thread left by the compiler, and spill where keys are widened to float32.
    num_warps = 4 if element_bytes == 4 and width <= 64 and not has_wgmma else 8
    config = AttentionConfig(f"prefill_{rows}x{block_n}_d{width}", rows, block_n, num_warps, num_stages)
    return _fitted(config, width, element_bytes, arch)


def _fitted(config: AttentionConfig, width: int, element_bytes: int, arch: Arch) -> AttentionConfig:
    """Return the configuration with as many stages as shared memory holds, at least 1."""
    budget = SHARED_BYTES.get(arch, _DEFAULT_SHARED_BYTES)
    tile = 2 * config.block_n * width * element_bytes  # keys and values of one stage
    fixed = config.block_m * (width + config.block_n) * min(element_bytes, 2) + 1024
    stages = config.num_stages
    while stages > 1 and fixed + stages * tile > budget:
        stages -= 1
    return replace(config, num_stages=stages)

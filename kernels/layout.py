"""Where the queries and the KV of one step's sequences lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """Where the queries and the KV of each sequence of a step lie; all arrays int32 on the host.

    qo_indptr: (num_seqs + 1,), sequence b owns queries qo_indptr[b]:qo_indptr[b+1], at the end of its tokens.
    kv_indptr: (num_seqs + 1,) into kv_indices, the page ids: page i of a sequence holds positions
    [i * page_size, (i + 1) * page_size). kv_lens: (num_seqs,) tokens of each sequence, the new ones included.
    is_decode: (num_seqs,) bool, which sequences take the decode path; they have one query each. All else is prefill:
    where the two paths sum in different orders, the caller says which one a token belongs to. all_decode: known to be
    True of all of them.
    """

    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    kv_lens: Int32Array
    is_decode: npt.NDArray[np.bool_]
    page_size: int
    all_decode: bool = False

    def positions(self) -> Int32Array:
        """Return (num_tokens,) the position of each query in its sequence."""
        if self.all_decode:
            return self.kv_lens - np.int32(1)
        num_new = np.diff(self.qo_indptr)
        owner = np.repeat(np.arange(len(num_new)), num_new)
        return ((self.kv_lens - self.qo_indptr[1:])[owner] + np.arange(len(owner))).astype(np.int32)

    def check(self) -> None:
        """Raise AssertionError unless a decode has one query and no sequence more queries than tokens."""
        if self.all_decode:
            return
        qo_lens = np.diff(self.qo_indptr)
        assert (qo_lens[self.is_decode] == 1).all(), "a decode sequence has one query"
        assert (qo_lens <= self.kv_lens).all(), "a sequence has more queries than tokens"

"""The wire: every message survives it, plain msgpack can read it, and nothing else gets through."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime import protocol
from bough.runtime.protocol import (
    Delta,
    Extend,
    Generate,
    Hello,
    Ok,
    ProtocolError,
    Reply,
    Request,
    RequestError,
    SamplingParams,
    Text,
    Tokens,
    decode_replies,
    decode_request,
    decode_tokens,
    delta_tokens,
    encode_replies,
    encode_request,
    encode_tokens,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Build any value of a message field's type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return messages(kind)
    if kind is float:
        return FINITE
    if kind is int:
        return st.integers(0, protocol.MAX_ID)
    if kind is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if kind is bytes:
        return st.binary(max_size=8)
    if kind is bool:
        return st.booleans()
    if kind is type(None):
        return st.none()
    origin, inner = getattr(kind, "__origin__", None), get_args(kind)
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(values(inner[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, inner))
    if origin is dict:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    if inner and not hasattr(inner[0], "__mro__") and all(isinstance(i, str) for i in inner):
        return st.sampled_from(inner)
    return st.one_of([values(i) for i in inner])


def messages(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Build any value of a message type."""
    return st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})


REQUESTS, REPLIES = get_args(Request), get_args(Reply)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_request_survives_the_wire_and_plain_msgpack_reads_it(kind: type, data: st.DataObject) -> None:
    request = data.draw(messages(kind))
    frames = encode_request(request, [b"\1\0\0\0"])
    decoded, buffers = decode_request(frames)
    assert decoded == request
    assert buffers == [b"\1\0\0\0"]
    fields = msgpack.unpackb(frames[1], strict_map_key=False)
    assert fields["t"] == kind.__struct_config__.tag  # type: ignore[attr-defined]
    assert all(fields[name] == getattr(request, name) for name in ("op", "branch", "target") if name in fields)


@pytest.mark.parametrize("kind", REPLIES, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_reply_survives_the_wire_and_plain_msgpack_reads_it(kind: type, data: st.DataObject) -> None:
    replies = [data.draw(messages(kind)), Ok(op=1)]
    frames = encode_replies(replies, [b""])
    assert decode_replies(frames) == (replies, [b""])
    first, second = msgpack.unpackb(frames[1], strict_map_key=False)
    assert first["t"] == kind.__struct_config__.tag  # type: ignore[attr-defined]
    assert second == {"t": "ok", "op": 1}


def test_the_sets_of_messages_are_closed_and_their_tags_distinct() -> None:
    for union in (REQUESTS, REPLIES):
        tags = [kind.__struct_config__.tag for kind in union]
        assert len(set(tags)) == len(tags)
        assert all(kind.__struct_config__.forbid_unknown_fields for kind in union)


@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_travel_as_little_endian_int32(ids: list[int]) -> None:
    raw = encode_tokens(ids)
    assert len(raw) == 4 * len(ids)
    assert decode_tokens([raw], 0) == ids
    assert all(int.from_bytes(raw[4 * i : 4 * i + 4], "little", signed=True) == ids[i] for i in range(len(ids)))


def header(**fields: object) -> list[bytes]:
    return [protocol.prefix(0), msgpack.packb(fields)]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least 2 frames"),
        ([b"B\2\0\0"], "at least 2 frames"),
        ([b"", b""], "not a bough prefix"),
        ([b"X\1\0\0", b"\x80"], "not a bough prefix"),
        ([b"B\2\0\0\0", b"\x80"], "not a bough prefix"),
        ([b"B\3\0\0", b"\x80"], "version 3 is not supported"),
        ([b"B\2\0\1", b"\x80"], "kind 1 is not expected"),
        ([b"B\2\0\0", b""], "not a request"),
        ([b"B\2\0\0", b"\xc1"], "not a request"),
        ([b"B\2\0\0", b"\x91" * 100_000], "not a request"),
        (header(op=3), "missing required field `t`"),
        (header(t="pickle", op=3), "Invalid value 'pickle'"),
        (header(t="open", op=3), "missing required field `branch`"),
        (header(t="open", op=3, branch="x"), "Expected `int`"),
        (header(t="open", op=3, branch=1, extra=1), "unknown field `extra`"),
        (header(t="extend", op=3, branch=1, parts=[{"t": "text", "text": b"\xff"}]), "not a request"),
        ([b"B\2\0\0", *[b""] * 2000], "at most 1026 frames"),
    ],
)
def test_a_frame_that_is_no_message_is_refused_and_says_why(frames: list[bytes], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_request(frames)


def test_the_answer_to_a_bad_message_can_name_its_operation() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_request(header(t="open", op=42))
    assert caught.value.op == 42


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=40), max_size=4), has_prefix=st.booleans())
def test_random_bytes_never_do_anything_but_raise_protocol_error(frames: list[bytes], has_prefix: bool) -> None:
    try:
        decode_request([protocol.prefix(0), *frames] if has_prefix else frames)
    except ProtocolError:
        return
    raise AssertionError("random bytes were taken for a message")


def test_mutated_messages_never_do_anything_but_raise_protocol_error() -> None:
    frames = encode_request(Extend(op=7, branch=1, parts=[Text("hello"), Tokens(0)]), [encode_tokens([1, 2, 3])])
    raw = bytes(frames[1])
    for position in range(len(raw)):
        for value in (0, 1, 0x7F, 0x80, 0xC1, 0xFF):
            mutated = raw[:position] + bytes([value]) + raw[position + 1 :]
            try:
                decode_request([frames[0], mutated, frames[2]])
            except ProtocolError:
                continue


def test_a_delta_carries_its_few_ids_itself() -> None:
    frames = encode_replies([Delta(op=7, text=" a b", token_ids=encode_tokens([1, 70_000]))])
    assert len(frames) == 2
    (delta,), _ = decode_replies(frames)
    assert isinstance(delta, Delta)
    assert delta_tokens(delta) == [1, 70_000]
    with pytest.raises(ProtocolError, match="multiple of 4 bytes"):
        delta_tokens(Delta(op=7, text="a", token_ids=b"abc"))


def test_a_missing_or_odd_buffer_is_refused() -> None:
    with pytest.raises(ProtocolError, match="buffer 2 is not in this message"):
        decode_tokens([b""], 2)
    with pytest.raises(ProtocolError, match="multiple of 4"):
        decode_tokens([b"abc"], 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("min_tokens", 999, r"min_tokens must be at most max_tokens \(128\), got 999"),
        ("temperature", -1.0, "temperature must be between 0 and 100, got -1.0"),
        ("temperature", math.nan, "temperature must be between 0 and 100, got nan"),
        ("temperature", math.inf, "temperature must be"),
        ("top_p", 0.0, "top_p must be greater than 0"),
        ("top_p", 1.5, "top_p must be between 0 and 1, got 1.5"),
        ("top_k", 0, r"top_k must be -1 \(off\) or at least 1, got 0"),
        ("min_p", -0.1, "min_p must be"),
        ("frequency_penalty", 3.0, "frequency_penalty must be between -2 and 2"),
        ("presence_penalty", -3.0, "presence_penalty must be"),
        ("repetition_penalty", 0.0, "repetition_penalty must be greater than 0"),
        ("logit_bias", {5: math.nan}, r"logit_bias\[5\] must be"),
        ("seed", -1, "seed must be at least 0"),
        ("stop", ("",), "non-empty"),
        ("stop", ("a",) * 100, "stop must be at most 64 entries, got 100"),
        ("logprobs", 1000, "logprobs must be at most 64"),
    ],
)
def test_a_sampling_parameter_out_of_range_names_field_limit_and_value(field: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**{field: value}).check()  # type: ignore[arg-type]
    assert caught.value.kind == "invalid_request"


def test_a_message_with_only_defaults_is_small() -> None:
    assert len(encode_request(Hello(op=1))[1]) < 16
    assert len(encode_request(Generate(op=1, branch=1, params=SamplingParams()))[1]) < 48

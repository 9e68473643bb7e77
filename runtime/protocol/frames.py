"""Messages as the frames of a ZeroMQ multipart message, and back; whatever is not one is refused."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Final, TypeAlias, cast

import msgspec

from bough.runtime.protocol.errors import ProtocolError
from bough.runtime.protocol.limits import MAX_FRAMES, MAX_ID
from bough.runtime.protocol.replies import Delta, Reply
from bough.runtime.protocol.requests import Request

MAJOR: Final = 2
MINOR: Final = 0

REQUEST: Final = 0
REPLIES: Final = 1

_ENCODER: Final = msgspec.msgpack.Encoder()
_REQUEST_DECODER: Final = msgspec.msgpack.Decoder(Request)
_REPLY_DECODER: Final = msgspec.msgpack.Decoder(list[Reply])
_LITTLE: Final = sys.byteorder == "little"

Buffer: TypeAlias = bytes | memoryview


def prefix(kind: int) -> bytes:
    """Return the four bytes that open a message of this kind."""
    return bytes((0x42, MAJOR, MINOR, kind))


def encode_request(request: Request, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the frames of one request."""
    return [prefix(REQUEST), _ENCODER.encode(request), *buffers]


def encode_replies(replies: Sequence[Reply], buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the frames of a list of replies; their buffer indices refer to `buffers`."""
    return [prefix(REPLIES), _ENCODER.encode(replies), *buffers]


def decode_request(frames: Sequence[Buffer]) -> tuple[Request, list[Buffer]]:
    """Return the request and its buffers. Raises ProtocolError, with the operation's id where it can be told."""
    _check_prefix(frames, REQUEST)
    try:
        request = _REQUEST_DECODER.decode(frames[1])
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a request of this protocol: {error}", _op_of(frames[1])) from None
    return request, list(frames[2:])


def decode_replies(frames: Sequence[Buffer]) -> tuple[list[Reply], list[Buffer]]:
    """Return the replies and their buffers. Raises ProtocolError."""
    _check_prefix(frames, REPLIES)
    try:
        return _REPLY_DECODER.decode(frames[1]), list(frames[2:])
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not replies of this protocol: {error}") from None


def _check_prefix(frames: Sequence[Buffer], kind: int) -> None:
    if len(frames) < 2:
        raise ProtocolError(f"a message has at least 2 frames, got {len(frames)}")
    if len(frames) > MAX_FRAMES:
        raise ProtocolError(f"a message has at most {MAX_FRAMES} frames, got {len(frames)}")
    head = bytes(frames[0][:5])
    if len(head) != 4 or head[0] != 0x42:
        raise ProtocolError("the first frame is not a bough prefix")
    if head[1] != MAJOR:
        raise ProtocolError(f"protocol version {head[1]} is not supported, this side speaks {MAJOR}")
    if head[3] != kind:
        raise ProtocolError(f"message kind {head[3]} is not expected here, expected {kind}")


def _op_of(header: Buffer) -> int | None:
    """Read the operation id of a header that failed validation, so that the answer can name it."""
    try:
        fields = msgspec.msgpack.decode(header)
    except Exception:  # whatever is wrong with it, the answer goes out without an id
        return None
    op = fields.get("op") if isinstance(fields, dict) else None
    return op if isinstance(op, int) and not isinstance(op, bool) and 0 <= op <= MAX_ID else None


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Return token ids as raw little-endian int32."""
    ids = array("i", token_ids)
    if not _LITTLE:
        ids.byteswap()
    return ids.tobytes()


def decode_tokens(buffers: Sequence[Buffer], index: int) -> list[int]:
    """Return the token ids of buffer `index`. Raises ProtocolError on a missing or odd-sized buffer."""
    if not 0 <= index < len(buffers):
        raise ProtocolError(f"buffer {index} is not in this message, which has {len(buffers)}")
    raw = buffers[index]
    if len(raw) % 4:
        raise ProtocolError(f"buffer {index} must be a multiple of 4 bytes, got {len(raw)}")
    return _tokens(raw)


def delta_tokens(delta: Delta) -> list[int]:
    """Return the token ids of a delta. Raises ProtocolError if there is a part of one."""
    if len(delta.token_ids) % 4:
        raise ProtocolError(f"token_ids must be a multiple of 4 bytes, got {len(delta.token_ids)}")
    return _tokens(delta.token_ids)


def _tokens(raw: Buffer) -> list[int]:
    ids = array("i")
    ids.frombytes(cast(bytes, raw))
    if not _LITTLE:
        ids.byteswap()
    return ids.tolist()

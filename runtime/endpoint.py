"""Where clients connect: an ipc socket in a private directory, or tcp with CURVE keys and an allow-list.

Who may connect decides the namespace of the cache: every user of the private directory is the same user; over tcp it is
the authenticated public key. A namespace is never taken from a message.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from bough.runtime.protocol import MAX_FRAME_BYTES, RequestError

_MAX_IPC_PATH = 107  # sockaddr_un.sun_path, less its final zero


class Endpoint:
    """A bound ROUTER socket. Use as a context manager: leaving closes the socket and what guards it."""

    def __init__(self, address: str, *, curve_secret: Path | None = None, curve_clients: Path | None = None) -> None:
        """Bind `address`.

        curve_secret: the server's secret certificate; curve_clients: a directory of the public certificates that may
        connect, both as written by `zmq.auth.create_certificates`.
        Raises RequestError("invalid_request") for an address that would be open to others, or where another runtime
        listens already.
        """
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)  # a reply that cannot be delivered is an error, not silence
        self.socket.set(zmq.LINGER, 1000)
        self.socket.set(zmq.SNDHWM, 1000)
        self.socket.set(zmq.RCVHWM, 1000)
        self.socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._is_curve = False
        self._path: str | None = None  # of a bound ipc socket
        try:
            scheme = urlsplit(address).scheme
            if scheme == "ipc":
                _refuse_keys(curve_secret, curve_clients)
                _check_private(address.removeprefix("ipc://"))
                _check_free(address.removeprefix("ipc://"))
            elif scheme == "tcp":
                self._guard(address, curve_secret, curve_clients)
            else:
                raise RequestError("invalid_request", f"listen must be ipc://PATH or tcp://HOST:PORT, got {address!r}")
            self._bind(address)
            if scheme == "ipc":
                self._path = os.path.abspath(address.removeprefix("ipc://"))
        except BaseException:
            self.close()
            raise
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def _bind(self, address: str) -> None:
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            raise RequestError("invalid_request", f"cannot listen on {address}: {error}") from None

    def _guard(self, address: str, secret: Path | None, clients: Path | None) -> None:
        if secret is None or clients is None:
            raise RequestError(
                "invalid_request",
                f"listen {address} would be open to everybody who can reach it: tcp needs CURVE keys "
                "(--curve-secret FILE) and an allow-list of clients (--curve-clients DIRECTORY)",
            )
        if not clients.is_dir():
            raise RequestError("invalid_request", f"curve_clients must be a directory, got {clients}")
        try:
            public_key, secret_key = zmq.auth.load_certificate(secret)
        except (OSError, ValueError) as error:
            raise RequestError("invalid_request", f"curve_secret {secret} cannot be read: {error}") from None
        if secret_key is None:
            raise RequestError("invalid_request", f"curve_secret {secret} holds no secret key")
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(clients))
        self.socket.curve_publickey = public_key
        self.socket.curve_secretkey = secret_key
        self.socket.curve_server = True
        self._is_curve = True

    def receive(self) -> tuple[bytes, str, list[bytes]]:
        """Return identity, namespace and frames of a waiting message. Raises zmq.Again if there is none."""
        if not self._is_curve:
            identity, *frames = self.socket.recv_multipart(zmq.DONTWAIT)
            return identity, "local", frames
        first, *rest = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
        key = rest[0].get("User-Id") if rest else ""
        return first.bytes, f"curve:{key}", [frame.bytes for frame in rest]

    def close(self) -> None:
        """Close the socket; messages already sent are still delivered, for at most a second. An ipc path is removed."""
        path, self._path = self._path, None
        if path is not None:  # libzmq leaves it; while we listen it is ours alone
            with suppress(OSError):
                os.unlink(path)
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_private(path: str) -> None:
    """Raise unless `path` lies in a directory of ours that nobody else may enter; make the directory if need be."""
    if not path or len(os.fsencode(path)) > _MAX_IPC_PATH:
        raise RequestError("invalid_request", f"an ipc path has 1 to {_MAX_IPC_PATH} bytes, got {path!r}")
    directory = Path(path).absolute().parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise RequestError(
            "invalid_request",
            f"{directory} must belong to you and be closed to others (mode 0700, it has "
            f"{stat.S_IMODE(status.st_mode):04o}): whoever reaches the socket can use the runtime",
        )


def _check_free(path: str) -> None:
    """Raise if somebody listens at `path`: libzmq would put its own socket in the place of theirs without a word.

    A socket that nobody listens at was left behind by a runtime that was killed; it is replaced.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener whose queue is full is one all the same
        try:
            probe.connect(os.path.abspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise RequestError("invalid_request", f"cannot listen on ipc://{path}: {error}") from None
    raise RequestError(
        "invalid_request", f"another runtime listens on ipc://{path} already: use it, or choose another address"
    )


def _refuse_keys(secret: Path | None, clients: Path | None) -> None:
    """Raise for keys that would guard nothing."""
    for name, value in (("--curve-secret", secret), ("--curve-clients", clients)):
        if value is not None:
            raise RequestError(
                "invalid_request", f"{name} is for tcp://: who may use an ipc socket follows from its directory"
            )

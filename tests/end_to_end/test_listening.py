"""Who may connect: the user's own processes over ipc, over tcp those whose key is on the list, and nobody else."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth
from processes import START_S, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.process import module_command
from bough.runtime.endpoint import Endpoint
from bough.runtime.protocol import RequestError


def refusal(*options: str) -> str:
    """Start a runtime that must refuse to; return what it said."""
    command = [*module_command(), str(tiny_checkpoint()), *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_tcp_without_keys_is_refused() -> None:
    said = refusal("--listen", "tcp://127.0.0.1:0")
    assert "tcp needs CURVE keys (--curve-secret FILE) and an allow-list of clients (--curve-clients DIRECTORY)" in said


def test_tcp_without_an_allow_list_is_refused(tmp_path: Path) -> None:
    _, secret = zmq.auth.create_certificates(tmp_path, "server")
    assert "an allow-list" in refusal("--listen", "tcp://127.0.0.1:0", "--curve-secret", secret)


def test_ipc_in_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    said = refusal("--listen", f"ipc://{tmp_path}/s")
    assert f"{tmp_path} must belong to you and be closed to others (mode 0700, it has 0755)" in said


def test_an_address_of_another_kind_is_refused() -> None:
    assert "listen must be ipc://PATH or tcp://HOST:PORT" in refusal("--listen", "inproc://x")


def test_keys_for_an_ipc_socket_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert "--curve-secret is for tcp://" in refusal("--listen", f"ipc://{tmp_path}/s", "--curve-secret", "x")


def test_a_page_of_no_tokens_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert "page_size must be at least 1, got 0" in refusal("--listen", f"ipc://{tmp_path}/s", "--page-size", "0")


def test_an_ipc_socket_at_which_somebody_listens_is_not_taken_away(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    address = f"ipc://{tmp_path}/s"
    with Endpoint(address):
        with pytest.raises(RequestError, match="another runtime listens on ipc"):
            Endpoint(address)
        assert (tmp_path / "s").is_socket()
    assert not (tmp_path / "s").exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:  # what a killed runtime leaves behind
        killed.bind(str(tmp_path / "s"))
        killed.listen()
    assert (tmp_path / "s").is_socket()
    with Endpoint(address) as endpoint:
        assert endpoint.address == address


class Keys:
    """Key pairs as zmq.auth writes them: a server's, and three clients' of which the first two are on the list."""

    def __init__(self, folder: Path) -> None:
        (folder / "clients").mkdir()
        (folder / "strangers").mkdir()
        self.clients = folder / "clients"
        self.server_public_file, self.server_secret_file = zmq.auth.create_certificates(folder, "server")
        self._secrets = {
            name: zmq.auth.create_certificates(where, name)[1]
            for name, where in (
                ("friend", self.clients),
                ("colleague", self.clients),
                ("stranger", folder / "strangers"),
            )
        }

    def options(self, who: str) -> dict[str, Any]:
        server, _ = zmq.auth.load_certificate(self.server_public_file)
        public, secret = zmq.auth.load_certificate(self._secrets[who])
        assert secret is not None
        return {"server_public_key": server.decode(), "public_key": public.decode(), "secret_key": secret.decode()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def address(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a runtime listens on tcp, on a port that the system chose."""
    log = tmp_path_factory.mktemp("tcp") / "log"
    command = [*module_command(), str(tiny_checkpoint()), "--listen", "tcp://127.0.0.1:0", "--log-level", "info"]
    command += ["--curve-secret", keys.server_secret_file, "--curve-clients", str(keys.clients)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stream)
    try:
        wait_until(
            lambda: " on tcp://" in log.read_text() or process.poll() is not None, START_S, "the runtime listens"
        )
        found = re.search(r" on (tcp://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None, log.read_text()
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def test_a_client_whose_key_is_on_the_list_is_served(address: str, keys: Keys) -> None:
    with bo.RuntimeClient(address, **keys.options("friend")) as client:
        state = bo.State(client)
        state += "The tree"
        state += bo.gen("new", max_tokens=4, temperature=0)
        assert within(20, state.error) is None
        assert client.server_info()["address"] == address


def test_tenants_with_keys_of_their_own_share_nothing_in_the_cache(address: str, keys: Keys) -> None:
    def cached_tokens(who: str) -> int:
        with bo.RuntimeClient(address, **keys.options(who)) as client:
            state = bo.State(client)
            state += "A secret prompt that the other tenant guesses word by word"
            state += bo.gen("new", max_tokens=2, temperature=0)
            return int(within(20, lambda: state.get_meta_info("new"))["cached_tokens"])

    first = cached_tokens("friend")  # a few tokens perhaps, of this friend's own in another test
    assert cached_tokens("colleague") == 0
    assert cached_tokens("friend") > first


@pytest.mark.parametrize("who", ["stranger", "nobody"])
def test_a_client_whose_key_is_not_on_the_list_is_told_so(address: str, keys: Keys, who: str) -> None:
    options = keys.options(who) if who != "nobody" else {}
    with pytest.raises(bo.RuntimeLost, match="keys"):
        within(8, lambda: bo.RuntimeClient(address, timeout=3, **options))


def test_a_client_that_expects_another_server_does_not_talk_to_this_one(address: str, keys: Keys) -> None:
    options = keys.options("friend") | {"server_public_key": keys.options("stranger")["public_key"]}
    with pytest.raises(bo.RuntimeLost):
        within(8, lambda: bo.RuntimeClient(address, timeout=3, **options))


def test_keys_come_all_three_or_none(address: str, keys: Keys) -> None:
    with pytest.raises(bo.InvalidRequest, match="all three"):
        bo.RuntimeClient(address, public_key=keys.options("friend")["public_key"])


def test_where_nobody_listens_a_client_says_so_in_time(tmp_path: Path) -> None:
    with pytest.raises(bo.RuntimeLost, match=r"no runtime answered at ipc://.* within 0\.3 s"):
        within(5, lambda: bo.RuntimeClient(f"ipc://{tmp_path}/nobody", timeout=0.3))

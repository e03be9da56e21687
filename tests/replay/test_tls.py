"""Servers behind TLS and proxies: the whole command against a scripted one with a certificate of its own making."""

import asyncio
import base64
import json
import shutil
import ssl
import subprocess
import threading
from collections import Counter

import pytest

from replay.rundir import Run

USAGE = {"prompt_tokens": 5, "completion_tokens": 1}
EVENT = json.dumps({"choices": [{"text": " a", "finish_reason": "length"}], "usage": USAGE}).encode()
STREAM = b"data: %b\n\ndata: [DONE]\n\n" % EVENT


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that nobody has signed but itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("ca")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


class Servers:
    """A completions server behind TLS, of which each third request fails, and a proxy that wants a password."""

    def __init__(self, certificate):
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(*certificate)
        self.tunnels, self._started, self._requests = [], threading.Event(), 0

    async def _answer(self, reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
            )
            await reader.readexactly(length)
            status, body = b"200 OK", STREAM
            if head.startswith(b"GET /v1/models "):
                body = json.dumps({"data": [{"id": "m", "max_model_len": 100}]}).encode()
            elif head.startswith(b"GET "):
                status, body = b"404 Not Found", b""
            else:
                self._requests += 1
                if self._requests % 3 == 0:
                    status, body = b"429 Too Many", b'{"error": "slow down"}'
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
            await writer.drain()

    async def _tunnel(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        words = dict(line.lower().split(": ", 1) for line in lines if line)
        self.tunnels.append((first, words.get("proxy-authorization")))
        if "proxy-authorization" not in words:
            writer.write(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
            return
        host, port = first.split()[1].split(":")
        there, here = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Go on\r\n\r\n")
        await asyncio.gather(self._copy(reader, here), self._copy(there, writer))

    @staticmethod
    async def _copy(source, target):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    async def _main(self):
        async def guarded(serve, reader, writer):
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
                pass  # the client is done
            finally:
                writer.close()

        def guard(serve):
            return lambda reader, writer: guarded(serve, reader, writer)

        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(guard(self._answer), "127.0.0.1", 0, ssl=self._tls)
        proxy = await asyncio.start_server(guard(self._tunnel), "127.0.0.1", 0)
        self.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.proxy = f"http://me:word@127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        self._started.set()
        async with server, proxy:
            await self._stop.wait()

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture
def attach(command, make_trace, tmp_path, certificate):
    """Replay twelve requests against `servers`; the exit status and what was said on stderr."""

    def attach(servers, **env):
        trace = make_trace(tmp_path / "trace.parquet", [(20 * i, 5, 1) for i in range(12)])
        names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        clean = {spelling: "" for name in names for spelling in (name, name.upper())}
        run = command("run", trace, "--engine", servers.url, "-o", tmp_path / "run", env=clean | env)
        _, err = run.communicate(timeout=60)
        return run.returncode, err

    return attach


@pytest.mark.parametrize("through_proxy", [False, True])
def test_a_server_behind_tls_answers_and_its_errors_are_on_record(attach, certificate, tmp_path, through_proxy):
    with Servers(certificate) as servers:
        env = {"https_proxy": servers.proxy} if through_proxy else {}
        status, err = attach(servers, SSL_CERT_FILE=str(certificate[0]), **env)
    assert status == 0, err
    requests = Run.open(tmp_path / "run").scan("requests").collect()
    assert Counter(requests["status"]) == {"ok": 8, "http_error": 4}
    failed = requests.filter(requests["status"] == "http_error")
    assert set(failed["http_status"]) == {429}
    assert set(failed["error"]) == {'{"error": "slow down"}'}
    asked = f"CONNECT {servers.url.removeprefix('https://')} HTTP/1.1"
    word = f"basic {base64.b64encode(b'me:word').decode().lower()}"
    assert set(servers.tunnels) == ({(asked, word)} if through_proxy else set())


def test_a_certificate_that_is_not_trusted_is_told_with_what_to_do(attach, certificate, tmp_path):
    with Servers(certificate) as servers:
        status, err = attach(servers)
    assert status == 2
    assert len(err.splitlines()) == 2, "the engine, and what is wrong"
    assert f"{servers.url}: its certificate is not trusted (self-signed certificate)" in err
    assert "SSL_CERT_FILE" in err
    assert not (tmp_path / "run").exists()


def test_a_proxy_that_refuses_is_told(attach, certificate):
    with Servers(certificate) as servers:
        status, err = attach(
            servers, SSL_CERT_FILE=str(certificate[0]), https_proxy=servers.proxy.replace("me:word@", "")
        )
    assert status == 2
    assert "407" in err

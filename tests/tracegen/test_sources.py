import gzip
import hashlib
import http.server
import lzma
import threading

import pytest

from tracegen import sources
from tracegen.errors import TraceError
from tracegen.importers.formats import find_format
from tracegen.schema import read_metadata
from tracegen.sources import Source

LINES = b"".join(b"line %d\n" % k for k in range(50_000))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` by path: bytes, a place to go to, or a status; with `server.cut` it hangs up early."""

    def do_GET(self):
        found = self.server.files.get(self.path.partition("?")[0], 404)
        if isinstance(found, str):
            self.send_response(302)
            self.send_header("Location", found)
            self.end_headers()
        elif isinstance(found, int):
            self.send_error(found)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cut = {}, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read_all(location):
    with Source(location) as source:
        return b"".join(source.blocks()), source.sha256()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_a_url_is_read_like_a_path(server, tmp_path, pack):
    content = pack(LINES)
    server.files["/a%20b.csv"] = content
    (tmp_path / "file").write_bytes(content)
    expected = (LINES, hashlib.sha256(content).hexdigest())
    assert read_all(tmp_path / "file") == expected
    assert read_all(str(tmp_path / "file")) == expected
    assert read_all(f"{server.url}/a%20b.csv") == expected
    with Source(f"{server.url}/a%20b.csv") as source:
        assert (source.name, source.size_bytes) == ("a b.csv", len(content))


@pytest.mark.parametrize("size", [1, 5, 11, 64, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"no end"])
def test_blocks_are_whole_lines(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(sources, "BLOCK_BYTES", size)
    monkeypatch.setattr(sources, "_START_BYTES", size)
    content = LINES[:500] + end
    (tmp_path / "file").write_bytes(content)
    with Source(tmp_path / "file") as source:
        blocks = list(source.blocks())
    assert b"".join(blocks) == content
    assert all(block.endswith(b"\n") for block in blocks[:-1])


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    (tmp_path / "zeros").write_bytes(bytes(100_000))
    with Source(tmp_path / "zeros") as source, pytest.raises(TraceError, match="zeros: a line is longer than"):
        list(source.blocks())


def test_the_hash_is_of_the_whole_file_wherever_reading_stops(tmp_path):
    content = LINES * 50
    (tmp_path / "file").write_bytes(content)
    with Source(tmp_path / "file") as source:
        next(source.blocks())
        assert source.sha256() == hashlib.sha256(content).hexdigest()


def test_a_url_is_not_loaded_to_its_end_for_the_hash(server):
    server.files["/f"] = LINES * 50
    with Source(f"{server.url}/f") as source:
        next(source.blocks())
        assert source.sha256() is None
        assert source.bytes_read < len(LINES) * 50


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_a_connection_that_ends_early_is_told_from_the_end(server, pack):
    content = pack(LINES)
    server.files["/f"], server.cut = content, len(content) - 100
    with pytest.raises(TraceError, match=f"the connection ended after {server.cut:,} of {len(content):,} bytes"):
        read_all(f"{server.url}/f")


def test_what_a_server_says_is_quoted_without_keys(server):
    with pytest.raises(TraceError) as error:
        Source(f"{server.url}/none?token=secret")
    assert str(error.value).startswith(f"{server.url}/none: cannot be read (HTTP 404 ")
    assert "secret" not in str(error.value)
    server.files["/f"] = LINES
    with Source(f"{server.url}/f?token=secret") as source:
        assert source.said == f"{server.url}/f"


def test_an_import_prints_and_keeps_no_key(server, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.files["/a.csv"] = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,1,2\n"
    code, out, err = run_cli("import", "auto", f"{server.url}/a.csv?token=secret")
    assert (code, out.splitlines()[0]) == (0, f"{server.url}/a.csv: {find_format('azure').title}")
    assert "secret" not in out + err + str(read_metadata("a.parquet"))


def test_a_server_that_is_not_there(server):
    with pytest.raises(TraceError, match=r"http://127.0.0.1:1/f: cannot be read \(.*refused"):
        Source("http://127.0.0.1:1/f")


@pytest.mark.parametrize("url", ["http://example.org/f", "ftp://example.org/f", "file:///etc/passwd"])
def test_only_https_leaves_this_machine(server, url):
    with pytest.raises(TraceError, match="is not an https URL"):
        Source(url)
    server.files["/away"] = url
    with pytest.raises(TraceError, match=r"is not an https URL|cannot be read"):
        Source(f"{server.url}/away")


@pytest.mark.parametrize("url", ["https://[bad/f", "https://host:port/f", "https://host:99999/f"])
def test_what_is_no_url_is_said_in_one_line(server, url):
    with pytest.raises(TraceError, match="is no URL"):
        Source(f"{url}?token=secret")
    server.files["/away"] = url
    with pytest.raises(TraceError, match=r"is no URL|cannot be read"):
        Source(f"{server.url}/away")


def test_a_redirect_is_followed(server):
    server.files |= {"/f": LINES, "/moved": "/f"}
    assert read_all(f"{server.url}/moved")[0] == LINES


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        Source(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        Source(tmp_path)


def test_an_unpacked_local_copy_for_formats_that_need_one(tmp_path):
    (tmp_path / "plain").write_bytes(LINES)
    (tmp_path / "packed").write_bytes(gzip.compress(LINES))
    with Source(tmp_path / "plain") as source, source.as_file() as path:
        assert path == tmp_path / "plain"
    with Source(tmp_path / "packed") as source:
        with source.as_file() as path:
            assert path.read_bytes() == LINES
        assert not path.exists()

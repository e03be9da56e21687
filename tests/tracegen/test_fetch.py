import errno
import hashlib
import http.server
import io
import random
import threading
import types

import pytest
from typer.testing import CliRunner

from tracegen import fetch as fetching
from tracegen.cli import app
from tracegen.datasets import Dataset, all_datasets, find_dataset
from tracegen.errors import TraceError
from tracegen.fetch import fetch_dataset, fetch_url
from tracegen.importers.formats import FORMATS

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """A server whose answers a test scripts: `script` has one behaviour a request, the last for all further ones."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.content, self.etag = [{}], [], CONTENT, '"1"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/folder/trace.csv"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers ranges as RFC 9110 says, unless the script says otherwise.

    `status`: that, without a body. `stop`: hang up after so many bytes. `whole`: ignore ranges. `shift`: begin the part
    so many bytes too late, and say so. `chunked`: without a length.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        server.asked.append(self.headers.get("Range"))
        self.close_connection = True
        start = self.wanted(how)
        size = len(server.content)
        if "status" in how or start > size or (start == size and size):
            self.send_response(how.get("status", 416))
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if how.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) + (b"" if "stop" in how else b"0\r\n\r\n"))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: how.get("stop", len(body))])

    def wanted(self, how):
        """Where the answer begins."""
        asked = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-")
        same = self.headers.get("If-Range") in {None, self.server.etag}
        return int(asked) + how.get("shift", 0) if same and not how.get("whole") else 0

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetched(server, tmp_path):
    """Fetch from the server, without waiting between tries."""

    def run(**options):
        found = fetch_url(server.url, tmp_path / "trace.csv", wait_s=0, **options)
        assert (tmp_path / "trace.csv").read_bytes() == server.content
        assert found.sha256 == hashlib.sha256(server.content).hexdigest()
        assert [file.name for file in tmp_path.iterdir()] == ["trace.csv"]
        return found

    return run


def begun(tmp_path, content, etag=None):
    """What a call before this one left."""
    (tmp_path / ".trace.csv.partial").write_bytes(content)
    if etag:
        (tmp_path / ".trace.csv.etag").write_text(etag)


def test_a_file_comes_whole_with_its_progress(fetched, server):
    seen = []
    found = fetched(sha256=SHA256, on_progress=lambda have, size: seen.append((have, size)))
    assert (found.bytes, found.checked, found.was_there) == (len(CONTENT), True, False)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert server.asked == [None]


def test_a_file_without_a_length_and_an_empty_one_come_whole(fetched, server):
    server.script = [{"chunked": True}]
    assert fetched().checked is None
    server.script, server.content = [{}], b""
    assert fetched().bytes == 0


def test_a_connection_that_breaks_is_taken_up_where_it_broke(fetched, server):
    server.script = [{"stop": 1000}, {"stop": 5000}, {}]
    fetched()
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]


def test_a_broken_chunk_is_no_end(fetched, server):
    server.script = [{"chunked": True, "stop": 0}, {}]
    fetched()


def test_a_later_call_goes_on_where_the_version_is_the_same(fetched, server, tmp_path):
    begun(tmp_path, CONTENT[:70_000], '"1"')
    fetched()
    assert server.asked == ["bytes=70000-"]


def test_another_version_is_fetched_from_its_start(fetched, server, tmp_path):
    begun(tmp_path, b"older" * 100, '"0"')
    fetched()
    assert server.asked == ["bytes=500-"]


def test_without_a_mark_a_hash_must_tell_or_it_starts_anew(fetched, server, tmp_path):
    begun(tmp_path, CONTENT[:500])
    fetched()
    begun(tmp_path, CONTENT[:500])
    fetched(sha256=SHA256)
    assert server.asked == [None, "bytes=500-"]


def test_a_weak_mark_promises_nothing(fetched, server):
    server.etag = 'W/"1"'
    server.script = [{"stop": 1000}, {}]
    fetched()
    assert server.asked == [None, None]


def test_a_server_that_knows_no_ranges_sends_all_again(fetched, server):
    server.script = [{"stop": 1000}, {"whole": True}]
    fetched()


def test_another_part_than_was_asked_for_is_not_taken(fetched, server):
    server.script = [{"stop": 1000}, {"shift": 7}, {}]
    fetched()
    assert server.asked == [None, "bytes=1000-", None]


def test_a_whole_file_that_was_not_yet_in_place_is_put_there(fetched, server, tmp_path):
    begun(tmp_path, CONTENT, '"1"')
    fetched()
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_more_than_the_file_has_is_fetched_anew(fetched, server, tmp_path):
    begun(tmp_path, CONTENT + b"more", '"1"')
    fetched()


def test_errors_that_may_pass_are_tried_again_and_others_are_not(fetched, server, tmp_path):
    server.script = [{"status": 503}, {"status": 500}, {}]
    fetched()
    assert len(server.asked) == 3
    (tmp_path / "trace.csv").unlink()
    server.script = [{"status": 404}]
    with pytest.raises(TraceError, match=r"trace\.csv: HTTP 404 Not Found; check the address"):
        fetched()
    assert len(server.asked) == 4


def test_after_some_tries_the_last_error_is_told_and_what_came_is_kept(fetched, server, tmp_path):
    server.script = [{"stop": 1000}, {"status": 500}]
    with pytest.raises(TraceError, match="HTTP 500 Internal Server Error; 1,000 bytes are kept, try again later"):
        fetched()
    assert len(server.asked) == 1 + fetching.TRIES
    server.script = [{}]
    fetched()
    assert server.asked[-1] == "bytes=1000-"


def test_a_server_that_always_breaks_off_at_the_same_place_is_given_up(fetched, server):
    server.script = [{"whole": True, "stop": 1000}]
    with pytest.raises(TraceError, match="the connection ended after 1,000 of 300,000 bytes; 1,000 bytes are kept"):
        fetched()


def test_nobody_there_is_told(tmp_path):
    with pytest.raises(TraceError, match="Connection refused; try again later"):
        fetch_url("http://127.0.0.1:9/trace.csv", tmp_path / "trace.csv", wait_s=0)
    with pytest.raises(TraceError, match="is not an https URL"):
        fetch_url("http://example.org/trace.csv", tmp_path / "trace.csv", wait_s=0)


def test_another_hash_than_the_published_leaves_nothing(server, tmp_path):
    with pytest.raises(TraceError, match=f"SHA-256 {SHA256} of 300,000 bytes is not the published 00"):
        fetch_url(server.url, tmp_path / "trace.csv", sha256="0" * 64, wait_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(TraceError, match="300,000 bytes are to come, and the disk has 10 left; free some space"):
        fetch_url(server.url, tmp_path / "trace.csv", wait_s=0)
    assert len(server.asked) == 1


def test_a_disk_that_fills_up_keeps_what_came(fetched, server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 1000:
                if self.tell() < 1000:
                    return super().write(data[: 1000 - self.tell()])  # as much as there is room for
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    real = fetching.Path.open
    monkeypatch.setattr(
        fetching.Path,
        "open",
        lambda path, mode="r", **rest: Full(path, "a") if mode == "ab" else real(path, mode, **rest),
    )
    with pytest.raises(TraceError, match="No space left on device"):
        fetched()
    monkeypatch.undo()
    fetched()
    assert server.asked == [None, "bytes=1000-"]


def test_a_folder_that_cannot_be_made_is_told(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot be written"):
        fetch_url(server.url, tmp_path / "file" / "trace.csv")


@pytest.fixture
def catalogue(server, tmp_path, monkeypatch):
    """One dataset, on the server; the cache is in the test's folder."""
    known = Dataset("lab", "Lab", "CC-BY-4.0", "Lab 2026", server.url, "azure", server.url, sha256=SHA256)
    monkeypatch.setattr("tracegen.datasets.all_datasets", lambda: [known])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wattrace" / "datasets" / "lab" / "trace.csv"


def test_a_dataset_goes_to_the_cache_once(catalogue, server):
    first = CliRunner().invoke(app, ["fetch", "lab"])
    assert first.exit_code == 0, first.output
    assert f"fetched: {catalogue}, 300,000 bytes" in first.output
    assert f"SHA-256 {SHA256}, as in the catalogue" in first.output
    assert f"next: tracegen import azure {catalogue}" in first.output
    second = CliRunner().invoke(app, ["fetch", "lab"])
    assert f"is there already: {catalogue}" in second.output
    assert len(server.asked) == 1


def test_what_is_there_and_is_something_else_is_not_taken_for_it(catalogue, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(TraceError, match=r"mine: is there, but is not lab .*; overwrite it with --force"):
        fetch_dataset("lab", tmp_path / "mine")
    assert fetch_dataset("lab", tmp_path / "mine", checksum=False).was_there
    assert fetch_dataset("lab", tmp_path / "mine", force=True).checked


def test_a_dataset_that_is_not_known_or_no_file_is_told():
    with pytest.raises(TraceError, match="there is no dataset 'azur'; the datasets are azure-2023-conv"):
        fetch_dataset("azur")
    with pytest.raises(TraceError, match=r"servegen is not one file; see https://github\.com/alibaba/ServeGen"):
        fetch_dataset("servegen")


def test_the_catalogue_holds_what_it_says():
    for dataset in all_datasets():
        assert dataset.format in {*FORMATS, "servegen"}
        assert dataset.page.startswith("https://")
        assert dataset.url is None or dataset.url.startswith("https://")
        assert dataset.license
        assert dataset.citation
        assert (dataset.sha256 is None) == (dataset.sha256_by is None)
        assert dataset.sha256 is None or (len(dataset.sha256) == 64 and int(dataset.sha256, 16))
        assert dataset.sha256_by in {None, "here", "others"}
    assert find_dataset("azure-2024-conv").rows == 27_303_999


def test_datasets_are_listed_with_their_sources():
    listed = CliRunner().invoke(app, ["datasets"])
    assert listed.exit_code == 0, listed.output
    assert "azure-2023-conv, azure-2023-code: Patel et al., Splitwise" in listed.output
    one = CliRunner().invoke(app, ["datasets", "mooncake-conversation"])
    assert "measured here, at that commit" in one.output
    assert '"sha256_by": "here"' in CliRunner().invoke(app, ["datasets", "--json"]).output

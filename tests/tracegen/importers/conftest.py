import pytest

from tracegen.importers.base import Options
from tracegen.importers.run import import_trace
from tracegen.schema import read_metadata, read_trace


@pytest.fixture
def import_file(tmp_path):
    """Import the file `name` with the given bytes or text: the trace, checked, and the report.

    The report's metadata are those in the file.
    """

    def run(content, name="trace.csv", format="auto", **options):  # noqa: A002 - as import_trace
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        report = import_trace(path, tmp_path / "out.parquet", format=format, options=Options(**options))
        frame = read_trace(tmp_path / "out.parquet")
        assert read_metadata(tmp_path / "out.parquet") == {"schema_version": "1.0", **report.metadata}
        assert report.rows == frame.height == report.rows_read - report.rows_dropped
        assert sum(report.dropped.values()) == report.rows_dropped
        (tmp_path / "out.parquet").unlink()
        return frame, report

    return run

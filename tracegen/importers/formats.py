"""The formats that can be imported, by name, and which of them a file is."""

from tracegen.errors import TraceError
from tracegen.importers import azure, bailian, burstgpt, mooncake, otel, sharegpt, table, vllmbench
from tracegen.importers.base import PARQUET, Format
from tracegen.sources import Source

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (azure, burstgpt, mooncake, bailian, sharegpt, vllmbench, otel, table)
}


def find_format(name: str) -> Format:
    """The format called `name`; raises `TraceError` naming all where there is none."""
    if name not in FORMATS:
        raise TraceError(f"there is no format '{name}'; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def recognised(source: Source) -> Format:
    """The format that `source` has by its content; raises `TraceError` where that is none, or more than one."""
    found = [known for known in FORMATS.values() if known.recognises(source.start)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(FORMATS)
    if found:
        names = " or ".join(known.name for known in found)
        raise TraceError(f"{source.location}: could be {names}; say which with 'tracegen import FORMAT' ({known})")
    if source.start[257:262] == b"ustar":  # POSIX.1-1988, the header's magic
        raise TraceError(f"{source.location}: is a tar archive; a ServeGen pool is read by 'tracegen import servegen'")
    if source.start.startswith(PARQUET):
        what = "is Parquet; if it is a trace already, nothing is to be done"
    else:
        what = "is of no known format"
    raise TraceError(
        f"{source.location}: {what}; the formats are {known}; any table is read by "
        "'tracegen import table FILE --map arrival=COLUMN,input=COLUMN,output=COLUMN'"
    )

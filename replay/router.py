"""Which instance each request of a trace goes to."""

import numpy as np
import numpy.typing as npt
import polars as pl

ROUTERS = ("session", "round-robin", "least-loaded")
LEAST_LOADED = -1  # in place of an instance: whichever has the least to do when the request comes


class Router:
    """Says to which instance each request of a trace goes, batch after batch."""

    def __init__(self, rule: str, instances: int) -> None:
        """`rule`: one of `ROUTERS`.

        `session`: in turn, but all requests of a session to where its first one went. `round-robin`: in turn.
        `least-loaded`: `LEAST_LOADED` for all.
        """
        self._rule, self._instances = rule, instances
        self._rows = 0
        self._sessions: dict[int, int] = {}

    def assign(self, trace: pl.DataFrame) -> npt.NDArray[np.int64]:
        """The instance of each request of `trace`, which comes after those assigned before."""
        turn = np.arange(self._rows, self._rows + trace.height) % self._instances
        self._rows += trace.height
        if self._rule == "least-loaded":
            return np.full(trace.height, LEAST_LOADED)
        if self._rule == "round-robin" or self._instances == 1 or "session_id" not in trace.columns:
            return turn
        turns = pl.DataFrame({"session": trace["session_id"], "turn": turn})
        for session, first in turns.drop_nulls().unique("session", keep="first", maintain_order=True).iter_rows():
            self._sessions.setdefault(session, first)
        here = {session: self._sessions[session] for session in turns["session"].drop_nulls().unique()}
        theirs = pl.col("session").replace_strict(here, default=None, return_dtype=pl.Int64)
        return turns.select(pl.coalesce(theirs, "turn")).to_series().to_numpy()

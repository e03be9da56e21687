"""Errors that a user can mend, for all three packages.

```
Exception
└── WattraceError          one line: what is wrong, where (file, row, column), what to do
    ├── TraceError         a trace file, a mix or a synthesis option        (tracegen)
    ├── RunError           a run directory or its tables                    (replay.rundir)
    ├── ReplayError        an option, a server, a port, a model             (replay)
    │   └── GpuError       no GPU, no permission, an unsupported clock      (replay.gpu)
    └── AnalysisError      a query, a method, an empty selection            (analysis)
```

The commands print the message behind `error:` and exit with 2. Anything else that is raised is a bug and shows its
traceback.
"""


class WattraceError(Exception):
    """A condition that the user can mend; the message is one line that says what, where and what to do."""


class TraceError(WattraceError):
    """A trace file, a mix or a synthesis option is wrong."""


class RunError(WattraceError):
    """A run directory or one of its tables is wrong."""


class ReplayError(WattraceError):
    """A replay option, server, port or model is wrong."""


class GpuError(ReplayError):
    """The GPU is missing, refuses, or cannot do what was asked."""


class AnalysisError(WattraceError):
    """A query, a method or a selection is wrong."""

"""The report of an internal error: one sentence, and a file to attach to a bug report."""

import platform
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

CODE = 3  # exit code of a process that ends with an internal error


def tell(error: BaseException) -> str:
    """Write the traceback into a file (in DVC's directory of temporary files, if it exists), and
    return the sentence that names it.
    """
    kind = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    text = "".join(
        [f"{sys.orig_argv}\nPython {platform.python_version()}\n", *traceback.format_exception(error)]
    )
    for place in (Path(".dvc/tmp"), Path(tempfile.gettempdir())):
        with suppress(OSError):
            if place.is_dir():
                path = (
                    place
                    / f"sparseline-bug-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.txt"
                )
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
                return (
                    f"This is an error in Sparseline, not in your input ({kind}). Attach {path} to a bug"
                    " report."
                )
    print(text, file=sys.stderr)
    return (
        f"This is an error in Sparseline, not in your input ({kind}). Attach the lines above to a bug report."
    )

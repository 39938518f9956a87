"""What people see: text as it is, never as markup or as commands to the terminal; and Ctrl-C that ends soon.

Prompts, paths and messages of other libraries go to the terminal only through here.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

#: Seconds after Ctrl-C in which the command may say what is finished; then the process ends without it.
GRACE = 3.0
INTERRUPTED = 130

# Progress goes to stderr, so that stdout is the answer alone: a table for people, JSON for machines. rich would read
# "[/x]" of a prompt as a tag, and ":star:" as a picture.
console = Console(markup=False, emoji=False, highlight=False)
progress_console = Console(stderr=True, markup=False, emoji=False, highlight=False)


def visible(text: object) -> str:
    """Text with what would move the cursor, colour or reorder it written out, as `\\x1b`; line ends become spaces."""
    return "".join(map(_visible, " ".join(str(text).splitlines())))


def _visible(character: str) -> str:
    # Control characters, bidirectional marks and other invisible ones, and bytes of file names that are no text.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def say(text: object, style: str | None = None, to: Console | None = None) -> None:
    """One line, however long."""
    (to or console).print(Text(visible(text), style=style or ""), soft_wrap=True)


def complain(kind: str, text: object, style: str) -> None:
    """`error: …` or `warning: …`, one line on stderr."""
    line = Text.assemble((f"{kind}:", style), " ", visible(text))
    Console(stderr=True, markup=False, emoji=False, highlight=False).print(line, soft_wrap=True)


def tolerate_narrow_encodings() -> None:
    """A terminal that knows no "–" gets `\\u2013` in its place, not a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by something that is no text file, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextmanager
def interrupts_end_soon(grace: float = GRACE) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as always; if nobody sees it for `grace` seconds, or at a second one, the
    process ends with 130.

    Python sees a signal between two bytecodes, and one attention over a large image is a single call of minutes.
    Nothing is lost: files are written beside their place and moved there when they are whole.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, grace), name="interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # the watcher reads the end, and ends
        watcher.join()
        reader.close()


def _watch(reader: socket.socket, grace: float) -> None:
    """Ends the process `grace` seconds after the first SIGINT, or at the second, unless the other end closes."""
    while received := reader.recv(1):  # the C handler writes the signal's number there at once
        if received[0] == signal.SIGINT:
            break
    else:
        return
    reader.settimeout(grace)
    with suppress(TimeoutError):
        while received := reader.recv(1):
            if received[0] == signal.SIGINT:
                break
        else:
            return
    _leave()


def _leave() -> Any:
    with suppress(Exception):  # whatever state the terminal is in, the process ends
        progress_console.show_cursor()
        say("interrupted: what is finished is kept", to=progress_console)
        sys.stdout.flush()
    os._exit(INTERRUPTED)

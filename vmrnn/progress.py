"""Signs of life: a bar in a terminal, and a line per minute where the output goes to a file or a pipe."""

import logging
import sys
import threading
import time
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger("vmrnn")

EVERY = 60  # seconds between two lines


class TerminalBar(tqdm):
    """tqdm's bar with a lock between threads.

    tqdm's own lock works between processes, and from Python 3.14 on it starts a further process. Only one process draws
    here, so a lock between threads is enough.
    """


TerminalBar.set_lock(threading.RLock())


def duration(seconds):
    """A time as a person writes it: "12 s", "5 min", "3 h 20 min", "4 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


class Bar:
    """How far a piece of work is. A context; call `update` after each part.

    title    what is done
    total    how much there is, in `unit`; None: not known
    unit     the name of one, such as "frame"
    first    how much was done before
    rest     function without arguments whose text ends a line, such as the time left of the whole run; None: no text
    silent   whether to show nothing, as in all processes but the first

    A terminal shows tqdm's bar. Anything else gets a line per minute with the share done, the speed and the time left.
    """

    def __init__(self, title="", total=None, unit="frame", first=0, rest=None, silent=False):
        self.title, self.total, self.unit, self.done, self.rest = title, total, unit, first, rest
        self.new, self.since, self.line = 0, time.monotonic(), time.monotonic()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.writes_lines = not (silent or terminal)
        self.bar = TerminalBar(
            desc=title, total=total, initial=first, unit=unit, unit_scale=True, leave=False, dynamic_ncols=True,
            disable=silent or not terminal,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.bar.close()

    def update(self, count=1):
        """`count` more are done."""
        self.bar.update(count)
        self.done, self.new = self.done + count, self.new + count
        now = time.monotonic()
        if self.writes_lines and now - self.line >= EVERY:
            self.line = now
            log.info("%s", self.text(now))

    def text(self, now):
        """The line of this minute."""
        rate = self.new / (now - self.since)
        parts = [f"{rate:.3g} {self.unit}s/s"]
        if self.total:
            parts = [
                f"{100 * self.done // self.total} %",
                *parts,
                f"about {duration((self.total - self.done) / rate)} left",
            ]
        if self.rest:
            parts.append(self.rest())
        return f"{self.title}  {', '.join(filter(None, parts))}"

    def reset(self, total, first):
        """Another total, and another amount that was done before."""
        self.total, self.done, self.new, self.since = total, first, 0, time.monotonic()
        self.bar.reset(total)
        self.bar.update(first)

    def describe(self, title):
        """Another title."""
        self.title = title
        self.bar.set_description(title, refresh=False)

    def note(self, **values):
        """Show these values behind the bar."""
        self.bar.set_postfix(values, refresh=False)


def counted(items, title, unit):
    """Iterate over a list with a Bar that counts its items."""
    with Bar(title, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def still_running(what, silent=False):
    """While the block runs, write a line per minute that says that `what` still runs.

    what     work that cannot be counted in parts
    silent   whether to write nothing
    """
    begun, ended = time.monotonic(), threading.Event()

    def speak():
        while not ended.wait(EVERY):
            log.info("%s  %s so far", what, duration(time.monotonic() - begun))

    thread = threading.Thread(target=speak, daemon=True)
    if not silent:
        thread.start()
    try:
        yield
    finally:
        ended.set()

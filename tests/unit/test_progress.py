"""The progress line moves by itself on a terminal, fits it, and is silent elsewhere."""

import fcntl
import io
import os
import struct
import termios
from collections.abc import Iterator

import pytest

from utils import progress
from utils.progress import Counter, ProgressLine, format_duration, progress_text

FIELDS = ["120/1860", "loss 4.29", "1,096 img/s", "data 4 %", "ETA 0:01:34"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, io.TextIOWrapper]]:
    """Open a terminal of 60 columns; give the end that a person sees, and that of the program."""
    monkeypatch.setenv("TERM", "xterm")
    seen, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(end, "w") as stream:
        yield seen, stream
    os.close(seen)


def test_the_line_is_drawn_again_by_itself_and_wiped(
    terminal: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    seen, stream = terminal
    widths: list[int] = []

    def describe(columns: int) -> str:
        widths.append(columns)
        return f"drawn {len(widths)}" + "x" * 100

    line = ProgressLine(describe, stream)
    line.start()
    text = ""
    while "drawn 3" not in text:
        text += os.read(seen, 1000).decode()
    line.close()
    assert set(widths) == {59}
    assert "\n" not in text
    drawn = [part.split("\x1b")[0] for part in text.split("\r")[1:]]
    assert max(map(len, drawn)) == 59
    while not text.endswith("\r\x1b[K"):
        text += os.read(seen, 1000).decode()


def test_a_line_that_cannot_be_described_stops_nothing(
    terminal: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    line = ProgressLine(lambda columns: [][1], terminal[1])
    line.start()
    line.close()


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    line = ProgressLine(lambda columns: "x", stream)
    line.start()
    assert line._thread is None
    line.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_the_text_fits_and_keeps_the_time_left_longest(columns: int) -> None:
    text = progress_text("epoch 3/30", 0.5, FIELDS, columns)
    assert len(text) <= columns
    assert ("ETA 0:01:34" in text) == (columns >= 40)
    assert ("1,096 img/s" in text) == (columns >= 80)
    assert ("[" in text) == (columns >= 40)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3_723, "1:02:03"),
        (183_845, "2d 03:04:05"),
        (float("nan"), "-:--:--"),
        (float("inf"), "-:--:--"),
        (-1, "-:--:--"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_loop_shows_its_pace_from_its_first_result_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 110.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    counter = Counter("features", 4000, stream=io.StringIO())
    counter.update(64)  # after 100 s in which workers started
    counter.update(1064)
    assert (
        counter.text(100)
        == "features [########......................] 1,064/4,000 images  100 images/s  0:00:29 left"
    )


def test_a_loop_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level("INFO", "synco")
    with Counter("packing", 1000, stream=io.StringIO()) as counter:
        for now in range(100):
            counter.update(now * 10 + 10)
    assert caplog.messages == [
        "packing: 310 of 1,000 images (31%), 10 images/s, 0:01:09 left",
        "packing: 610 of 1,000 images (61%), 10 images/s, 0:00:39 left",
        "packing: 910 of 1,000 images (91%), 10 images/s, 0:00:09 left",
    ]


def test_a_loop_on_a_terminal_logs_nothing(
    terminal: tuple[int, io.TextIOWrapper],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    caplog.set_level("INFO", "synco")
    with Counter("packing", 50, "files", terminal[1]) as counter:
        counter.update(20)
        text = ""
        while "packing [" not in text or "20/50 files" not in text:
            text += os.read(terminal[0], 1000).decode()
    assert not caplog.messages

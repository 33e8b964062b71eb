from __future__ import annotations

import pytest

from tunesmith.gateway.events import MAX_HELD_BYTES, EventStream, WrongModelError, names_model

NAME = "team/pirate@aaaaaaaaaaaa"
RIGHT = b'data: {"id":"x","object":"chunk","created":1,"model":"%s","choices":[]}\n\n' % NAME.encode()
WRONG = RIGHT.replace(NAME.encode(), b"serving/base")


def passed(*chunks: bytes) -> list[bytes]:
    stream = EventStream(NAME)
    return [*(stream.feed(chunk) for chunk in chunks), stream.end()]


def feed(stream: EventStream, text: bytes, size: int, out: list[bytes]) -> None:
    out.extend(stream.feed(text[start : start + size]) for start in range(0, len(text), size))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_comments_and_empty_events_pass_before_the_first_event(end: bytes) -> None:
    start = [b": keep-alive" + end, end, b"event: ping" + end, b"data:" + end]
    right = RIGHT[:-2] + end
    assert passed(*start, right) == [*start, right, b""]


@pytest.mark.parametrize("first", [WRONG, b": c\n\n" + WRONG, b'data: {"choices":[]}\n\n', b"data: hello\n\n"])
def test_an_event_of_another_model_never_passes(first: bytes) -> None:
    for size in (1, 7, len(first)):
        out: list[bytes] = []
        with pytest.raises(WrongModelError):
            feed(EventStream(NAME), first, size, out)
        assert b"".join(out) in {b"", b": c\n\n"}


def test_a_model_named_inside_another_member_is_not_the_answers_model() -> None:
    spoof = b'data: {"x":{"model":"%s"},"model":"serving/base"}\n\n' % NAME.encode()
    with pytest.raises(WrongModelError):
        passed(spoof)
    with pytest.raises(WrongModelError):
        passed(b'data: {"x":"\\"model\\":\\"%s\\"","model":"serving/base"}\n\n' % NAME.encode())


@pytest.mark.parametrize("first", [b'data: {"error":{"message":"no"}}\n\n', b"data: [DONE]\n\n"])
def test_errors_and_the_end_of_a_stream_need_no_model(first: bytes) -> None:
    assert b"".join(passed(first)) == first


def test_events_pass_whole_however_they_are_split() -> None:
    text = RIGHT * 3
    for size in (1, 5, 100):
        stream, out = EventStream(NAME), b""
        for start in range(0, len(text), size):
            ready = stream.feed(text[start : start + size])
            assert ready == b"" or ready.endswith(b"\n\n")
            assert stream.between_events
            out += ready
        assert out + stream.end() == text


def test_a_very_large_event_passes_in_pieces_once_it_names_the_model() -> None:
    start = RIGHT[:-4] + b'"' + b"x" * MAX_HELD_BYTES
    stream = EventStream(NAME)
    assert stream.feed(start) == start
    assert not stream.between_events
    rest = b"y" * (MAX_HELD_BYTES + 1)
    assert stream.feed(rest) == rest
    assert stream.feed(b'"]}\n\n') == b'"]}\n\n'
    assert stream.between_events


def test_a_large_first_event_that_names_no_model_never_passes() -> None:
    for start in (b"data: {" + b" " * MAX_HELD_BYTES, b": " + b"x" * MAX_HELD_BYTES):
        with pytest.raises(WrongModelError):
            EventStream(NAME).feed(start)


@pytest.mark.parametrize(
    ("start", "complete", "names"),
    [
        (b'{"id":"a","model":"%s","choices":[', False, True),
        (b'{"model":"other","choices":[', False, False),
        (b'{"id":"a","mo', False, None),
        (b'{"choices":[{"model":"%s"}],"model":"other"}', True, False),
        (b'{"choices":[],"model":"%s"}', True, True),
        (b"[]", True, False),
        (b"no", True, False),
    ],
)
def test_the_start_of_an_answer_shows_its_model(start: bytes, complete: bool, names: bool | None) -> None:  # noqa: FBT001
    assert names_model(start.replace(b"%s", NAME.encode()), NAME, complete=complete) is names

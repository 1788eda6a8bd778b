"""Reading ahead changes when things are read, never what comes out."""

import threading

import pytest

from actors.storage.prefetch import in_turn, prefetched
from actors.storage.write_behind import WriteBehind


def test_items_come_in_order():
    assert list(prefetched(range(5))) == [0, 1, 2, 3, 4]
    assert list(prefetched([])) == []


def test_the_next_item_is_made_while_one_is_used_and_no_more_than_that():
    made = []
    second = threading.Event()

    def items():
        for number in range(4):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    reader = prefetched(items())
    assert next(reader) == 0
    assert second.wait(timeout=10)  # without a second call
    assert next(reader) == 1
    reader.close()
    assert made[:2] == [0, 1]
    assert 3 not in made


def test_an_error_comes_where_the_item_would_have():
    def items():
        yield 1
        raise ValueError("torn")

    reader = prefetched(items())
    assert next(reader) == 1
    with pytest.raises(ValueError, match="torn"):
        next(reader)


@pytest.mark.parametrize("ahead", [1, 3])
def test_calls_answer_in_turn_and_no_more_than_asked_for_are_made_ahead(ahead):
    made = []

    def call(number):
        made.append(number)
        return number

    answers = in_turn((lambda n=n: call(n) for n in range(8)), ahead=ahead)
    assert next(answers) == 0
    assert len(made) <= 1 + ahead
    assert list(answers) == list(range(1, 8))
    assert list(in_turn([], ahead=ahead)) == []


def test_an_error_of_a_call_comes_in_its_turn():
    def torn():
        raise ValueError("torn")

    answers = in_turn([lambda: 1, torn, lambda: 3], ahead=2)
    assert next(answers) == 1
    with pytest.raises(ValueError, match="torn"):
        next(answers)


def test_a_write_does_not_wait_for_the_one_before_while_there_is_room():
    writes, may_end = WriteBehind(), threading.Event()
    writes.begin("slow", lambda: may_end.wait(10), held=3, most=5)
    writes.begin("quick", lambda: "written", held=2, most=5)
    assert writes.result("quick") == "written"
    may_end.set()
    assert writes.result("slow")


def test_a_write_waits_for_room_and_one_without_any_is_done_at_once():
    writes, order = WriteBehind(), []
    slow = threading.Event()

    def write(name):
        slow.wait(0.2)
        order.append(name)

    writes.begin("first", lambda: write("first"), held=3, most=5)
    writes.begin("second", lambda: write("second"), held=3, most=5)
    assert order == ["first"]
    writes.begin("third", lambda: write("third"), held=6, most=5)
    assert order == ["first", "second", "third"]


def test_an_error_of_a_write_is_raised_where_it_is_asked_for():
    def full():
        raise OSError("no space left")

    writes = WriteBehind()
    writes.begin("lost", full, held=1, most=0)
    writes.begin("kept", lambda: "written", held=1, most=4)
    assert writes.result("kept") == "written"
    with pytest.raises(OSError, match="no space"):
        writes.result("lost")

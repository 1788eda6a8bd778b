"""Reading ahead changes when things are read, never what comes out."""

import threading

import pytest

from actors.storage.prefetch import prefetched


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

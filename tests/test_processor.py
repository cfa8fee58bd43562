"""A failure is forgiven once, and only while the processor is seen to err."""

import processor
import pytest


def failing(times):
    """A function that fails so many times, and the list of its calls."""
    calls = []

    def function():
        calls.append(None)
        assert len(calls) > times
        return "right"

    return function, calls


def test_a_failure_stands_where_the_processor_divides_well():
    function, calls = failing(1)
    with pytest.raises(AssertionError):
        processor.once_more_if_it_erred(function)
    assert len(calls) == 1


@pytest.fixture
def erring(monkeypatch):
    """A processor that errs when it is first looked at, and then no more."""
    seen = iter([False, True])
    monkeypatch.setattr(processor, "divides", lambda: next(seen))


def test_a_failure_while_it_errs_is_looked_at_once_more(erring):
    function, calls = failing(1)
    with pytest.warns(UserWarning, match="divided wrongly"):
        assert processor.once_more_if_it_erred(function) == "right"
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:the processor divided wrongly")
def test_a_second_failure_stands(erring):
    function, calls = failing(2)
    with pytest.raises(AssertionError):
        processor.once_more_if_it_erred(function)
    assert len(calls) == 2

import io

from ecomjax.data import progress
from ecomjax.data.progress import counting


def test_progress_is_for_people(monkeypatch):
    """A log file gets no line for every batch."""
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with counting(1000, "scoring") as on_done:
        for _ in range(1000):
            on_done(1)
    assert stream.getvalue().count("scoring") <= 3

import pytest

from ecomjax.errors import UserError
from ecomjax.tasks.registry import TASKS, get_task


def test_tasks_by_name():
    for name in TASKS:
        assert get_task(name).name == name
    assert "product_description" in get_task("esci", description=True).shown


def test_unknown_names_list_the_known():
    with pytest.raises(UserError, match=r"unknown task 'esic'.*known: esci, queryner"):
        get_task("esic")
    with pytest.raises(UserError, match="unknown option 'x': task esci; known: description"):
        get_task("esci", x=1)
    with pytest.raises(UserError, match="unknown option 'x': task queryner; known: repair"):
        get_task("queryner", x=1)

"""The second half of the rows of docs/models.md gives the committed answers."""

import pytest
from model_rows import assert_rows_as_committed, groups


@pytest.mark.table
@pytest.mark.slow
@pytest.mark.parametrize("rows", groups(1), ids=" ".join)
def test_rows_give_the_committed_answers(environment, tmp_path, rows):
    assert_rows_as_committed(environment, tmp_path, rows)

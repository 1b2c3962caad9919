"""The shipped matrix: well formed, and every row whose data is here holds."""

import os
from pathlib import Path

import pytest

from mmedrag.experiments.repro import FAIL, NO_DATA, load_matrix, page, run_row

ROOT = Path(__file__).parents[2]
FILES = [f for f in (ROOT / "repro/matrix.toml", ROOT / "repro/ablation.toml") if f.exists()]
ROWS = load_matrix(FILES)


def test_the_matrix_has_at_least_thirty_rows_that_say_where_they_come_from():
    assert len(ROWS) >= 30
    assert all(row.origin and row.about and row.tolerance >= 0 for row in ROWS)
    released = [row for row in ROWS if row.source == "released"]
    assert all(row.path and row.commit for row in released)


def test_the_page_is_the_one_that_the_recorded_values_give():
    import json

    recorded = json.loads((ROOT / "repro/results/latest.json").read_text())
    assert (ROOT / "docs/reproduce.md").read_text() == page(ROWS, recorded)


@pytest.mark.parametrize("row", [r for r in ROWS if r.source == "own"], ids=lambda r: r.id)
def test_rows_that_need_no_data(row):
    assert run_row(row).status not in (FAIL, NO_DATA)


@pytest.mark.data
@pytest.mark.parametrize("row", [r for r in ROWS if r.source != "own"], ids=lambda r: r.id)
def test_rows_on_data(row):
    variable = {"released": "MMEDRAG_RELEASED", "demo": "MMEDRAG_DEMO"}[row.source]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder: the data of this row is not here")
    result = run_row(row)
    if result.status == NO_DATA:
        pytest.skip(result.why)
    assert result.status != FAIL, f"{result.measured} for {row.expected} ± {row.tolerance}"

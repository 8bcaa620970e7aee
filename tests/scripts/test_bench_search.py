"""The benchmark of the solvers on small tables: rows that agree with each other."""

import json

import bench_search
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("kind", "size"), [("layers", "12x6"), ("random", "12x6"), ("equal", "12x6"), ("sum", "5x3")]
)
def test_rows_agree_and_budgets_are_kept(kind, size, tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ["--sizes", size, "--tables", kind, "--samples", "0", "--json", str(path)]
    assert bench_search.main(options) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    for share in bench_search.SHARES:
        loss = {row["solver"]: row["loss"] for row in rows if row.get("share") == share}
        for solver in ("integer-program", "pareto"):
            assert loss[solver] == pytest.approx(loss["dynamic-program"])
        assert min(loss.values()) >= loss["dynamic-program"] - 1e-9
    assert len(printed.splitlines()) == 1 + len(rows)
    assert all(row["relative_gap"] >= 0 for row in rows if "relative_gap" in row)


def test_interactions_are_fitted_and_checked_on_fresh_samples(capsys):
    options = ["--sizes", "16x6", "--tables", "layers", "--solvers", "dynamic-program"]
    assert bench_search.main([*options, "--samples", "8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "local-search" in line]
    assert len(rows) == 3
    for row in rows:
        fitted, fresh = (float(row.split(name)[1].split(",")[0]) for name in ("fitted", "fresh"))
        assert fitted <= 1
        assert fresh > fitted  # eight samples are far too few for a fit


def test_layer_tables_have_the_stored_bits_of_their_grids():
    loss, cost = bench_search.table("layers", 4, 30, 0)
    assert cost[0, 0] == 576 * (576 * 2 + 16 * 9)  # 2 bits in groups of 64
    assert cost[3, 29] == 576 * (1536 * 8 + 16 * 6)  # 8 bits in groups of 288, the last short
    assert (np.diff(loss.reshape(4, 5, 6), axis=2) < 0).all()


def test_too_large_a_case_is_left_out_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(bench_search.LARGEST, "integer-program", 10)
    options = ["--sizes", "4x4", "--tables", "random", "--solvers", "integer-program"]
    assert bench_search.main([*options, "--samples", "0"]) == 0
    assert "left out: too large" in capsys.readouterr().out

"""Tuning where there is no GPU says so and writes nothing."""

import pytest
import tune_kernels
from quantforge_kernels.triton import backend


def test_no_gpu_is_said_and_nothing_is_written(tmp_path, capsys):
    reason = backend.unavailable()
    if not reason:
        pytest.skip("there is a GPU here")
    assert tune_kernels.main(["--folder", str(tmp_path)]) == 1
    assert f"nothing to tune here: {reason}; nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

"""What the doctor says of versions, of the cache and of known bad pairs."""

import pytest

from quantforge import doctor
from quantforge.doctor import examine, known_trouble


@pytest.mark.parametrize(
    ("versions", "symptoms"),
    [
        ({"compressed-tensors": "0.16.9"}, ["another layout"]),
        ({"compressed-tensors": "0.17"}, []),
        ({"compressed-tensors": "0.20.0"}, []),
        (
            {"compressed-tensors": "0.20.0", "transformers": "5.24.0"},
            ["zero-points", "dequantize=True"],
        ),
        ({"compressed-tensors": "0.17.0", "transformers": "5.20"}, []),
        ({"compressed-tensors": "missing", "transformers": "5.24.0"}, []),
        ({"sglang": "0.5.1"}, ["other than 4 and 8"]),
    ],
)
def test_known_bad_pairs_by_their_versions(versions, symptoms):
    found = known_trouble(versions)
    assert len(found) == len(symptoms)
    for line, symptom in zip(found, symptoms, strict=True):
        assert symptom in line


def test_this_machine_is_usable_and_the_cache_is_counted(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("QUANTFORGE_CACHE", str(cache))
    report = examine()
    assert report.usable, report.problems
    assert report.cache_bytes == 0
    assert not cache.exists()  # looking makes nothing
    assert report.versions["torch"] != "missing"
    assert set(report.kernels) >= {"compensate", "moment"}
    assert "built" not in report.kernels.values()  # an empty cache has no library
    (cache / "a").mkdir(parents=True)
    (cache / "a" / "b").write_bytes(bytes(1234))
    assert examine().cache_bytes == 1234


def test_what_is_missing_or_too_old_is_a_problem_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    required = ["torch>=99", "nowhere>=1.0", "safetensors>=0.1", "ruff>=0.1 ; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: required)
    report = examine()
    assert not report.usable
    assert len(report.problems) == 2
    assert "is older than 99: pip install 'torch>=99'" in report.problems[0]
    assert report.problems[1] == "nowhere is missing: pip install 'nowhere>=1.0'"
    assert report.versions["nowhere"] == "missing"


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "file" / "deep"))
    assert any("QUANTFORGE_CACHE" in line for line in examine().problems)

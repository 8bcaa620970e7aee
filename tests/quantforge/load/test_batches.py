import pytest
import torch

from quantforge.errors import InputError
from quantforge.load.batches import cut, make_set, split_rows
from quantforge.load.text import from_batches


def rows(count, length, start=0):
    return torch.arange(start, start + count * length).view(count, length)


def test_every_eighth_row_is_held_out():
    fitting, held_out = split_rows(rows(20, 3), 0.125)
    assert held_out[:, 0].tolist() == [7 * 3, 15 * 3]
    assert len(fitting) == 18
    assert set(fitting.flatten().tolist()) | set(held_out.flatten().tolist()) == set(range(60))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.125, 0.2, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("count", [2, 3, 8, 31, 128])
def test_split_is_a_partition_of_the_asked_share(count, share):
    fitting, held_out = split_rows(rows(count, 2), share)
    assert len(fitting) + len(held_out) == count
    assert len(held_out) == max(1, int(count * share + 1e-6))
    assert not set(fitting[:, 0].tolist()) & set(held_out[:, 0].tolist())


def test_split_needs_two_rows_and_a_share():
    with pytest.raises(InputError, match="at least 2"):
        split_rows(rows(1, 4), 0.125)
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="between 0 and 1"):
            split_rows(rows(4, 4), share)


def test_cut_takes_the_first_tokens():
    assert torch.equal(cut(torch.arange(25), 3, 8, what="rows", where="x"), rows(3, 8))
    with pytest.raises(InputError, match=r"x holds 25 tokens, 4 rows of 8 need 32.*at most 3 rows"):
        cut(torch.arange(25), 4, 8, what="rows", where="x")


def test_fingerprint_follows_tokens_and_split():
    one = make_set(rows(3, 4), rows(1, 4), "a")
    assert one.fingerprint == make_set(rows(3, 4), rows(1, 4), "b").fingerprint
    assert one.fingerprint != make_set(rows(3, 4), rows(1, 4, 1), "a").fingerprint
    assert one.fingerprint != make_set(rows(4, 3), rows(1, 4), "a").fingerprint


def test_equal_rows_stay_rows():
    batches = [{"input_ids": rows(4, 6)}, rows(4, 6, 24).to(torch.int32), rows(1, 6, 48)[0]]
    found = from_batches(batches)
    assert torch.equal(found.held_out, rows(1, 6, 42))
    assert torch.equal(found.fitting, torch.cat([rows(7, 6), rows(1, 6, 48)]))
    assert found.fitting.dtype == torch.int64
    assert "rows as given" in found.description


def test_padding_is_removed_and_the_rest_packed():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0]])
    found = from_batches([{"input_ids": ids, "attention_mask": mask}])
    assert found.fitting.tolist() == [[1, 2, 3, 4]]
    assert found.held_out.tolist() == [[5, 6, 7, 8]]
    assert "packed" in found.description
    found = from_batches([{"input_ids": ids, "attention_mask": mask}], sequence_length=3)
    assert found.fitting.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found.held_out.tolist() == [[7, 8, 9]]


def test_unequal_lengths_are_packed_and_a_full_mask_is_no_padding():
    found = from_batches([rows(1, 3), rows(1, 5, 3)], sequence_length=4)
    assert torch.cat([found.fitting, found.held_out]).tolist() == rows(2, 4).tolist()
    full = {"input_ids": rows(2, 4), "attention_mask": torch.ones(2, 4)}
    assert "rows as given" in from_batches([full]).description


def test_reading_stops_where_enough_rows_are_read():
    def endless():
        while True:
            yield rows(3, 4)

    found = from_batches(endless(), sequences=8)
    assert len(found.fitting) + len(found.held_out) == 8


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "empty"),
        (iter([]), "empty"),
        (5, "iterable"),
        ("text", "tokenise"),
        (["text"], "holds a str"),
        ([{"ids": rows(2, 4)}], "no input_ids; keys: ids"),
        ([torch.zeros(2, 4)], "dtype torch.float32"),
        ([torch.ones(2, 4, dtype=torch.bool)], "dtype torch.bool"),
        ([torch.zeros(2, 2, 4, dtype=torch.int64)], r"shape \(2, 2, 4\)"),
        ([torch.zeros(0, 4, dtype=torch.int64)], r"shape \(0, 4\)"),
        ([rows(2, 4) - 1], "batch 0 holds the token id -1"),
        ([rows(2, 4), rows(2, 50)], "batch 1 holds the token id 49, ids must be between 0 and 39"),
        ([{"input_ids": rows(2, 4), "attention_mask": torch.ones(2, 3)}], "attention_mask"),
        ([{"input_ids": rows(2, 4), "attention_mask": torch.zeros(2, 4)}], "empty"),
        ([rows(1, 4)], "at least 2"),
        ([rows(1, 3), rows(1, 4)], "at least 2"),
    ],
)
def test_refusals(batches, words):
    with pytest.raises(InputError, match=words):
        from_batches(batches, vocabulary=40)

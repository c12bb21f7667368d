from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data.partition_files import check, from_file, from_lists, load, save
from fedsim.data.splits import SPLITS, feature_noise, natural
from fedsim.errors import DataError
from fedsim.records import Partition

LABELS = torch.tensor([3, 1, 0, 2, 1, 1, 0, 3, 3, 2])


def of(*lists):
    return from_lists(lists)


def test_a_partition_survives_the_file(tmp_path):
    columns = {"writer": np.array([5, 2, 5, 0, 2, 5, 9, 0, 2, 2])}
    for partition in (feature_noise(LABELS, 3, 1), natural(3, 1, columns, column="writer")):
        save(partition, LABELS, tmp_path / "p.npz")
        again = from_file(LABELS, 3, path=str(tmp_path / "p.npz"))
        for name in ("offsets", "indices", "noise_std", "owner_ids"):
            one, other = getattr(partition, name), getattr(again, name)
            assert (one is None and other is None) or (one.dtype == other.dtype and np.array_equal(one, other))
        assert again.column == partition.column
    assert [file.name for file in tmp_path.iterdir()] == ["p.npz"]


def test_the_file_keeps_its_name_without_a_suffix_and_the_table_reads_it(tmp_path):
    save(of([0, 1], [2]), LABELS, tmp_path / "partition")
    assert SPLITS["file"](LABELS, None, path=str(tmp_path / "partition")).sizes().tolist() == [2, 1]


@pytest.mark.parametrize("other", [LABELS.flip(0), LABELS[:9], LABELS.reshape(5, 2), LABELS + 1])
def test_a_file_for_other_labels_is_refused(tmp_path, other):
    save(of([0, 1], [2]), LABELS, tmp_path / "p.npz")
    with pytest.raises(DataError, match=r"data\.split\.path: .*p\.npz was made for other training examples"):
        load(tmp_path / "p.npz", other)


def test_a_file_with_another_number_of_clients_or_too_small_clients_is_refused(tmp_path):
    save(of([0, 1], [2]), LABELS, tmp_path / "p.npz")
    with pytest.raises(DataError, match=r"data\.clients: the partition has 2 clients, expected 3"):
        from_file(LABELS, 3, path=str(tmp_path / "p.npz"))
    with pytest.raises(DataError, match=r"at least 2 examples, client 1 has 1"):
        from_file(LABELS, 2, path=str(tmp_path / "p.npz"), min_examples=2)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.split\.path: file .*none\.npz does not exist"):
        load(tmp_path / "none.npz", LABELS)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "p.npz"
    save(of([0, 1], [2]), LABELS, path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    np.save(tmp_path / "array.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", weights=np.arange(3))
    np.savez(tmp_path / "object.npz", offsets=np.array([None]))
    others = [(tmp_path / name).read_bytes() for name in ("array.npy", "other.npz", "object.npz")]
    for content in (b"", b"offsets: [0]", whole[:-30], whole[:100], bytes(flipped), *others):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"p\.npz is not a readable partition file"):
            load(path, LABELS)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="is not a readable partition file"):
        load(path, LABELS)


def test_a_file_whose_arrays_are_no_partition_is_refused(tmp_path):
    save(of([0, 1], [1]), LABELS, tmp_path / "p.npz")
    with pytest.raises(DataError, match="example 1 is held 2 times"):
        load(tmp_path / "p.npz", LABELS)


GOOD = of([4, 0], [2, 3, 1])
INT = np.int64


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (replace(GOOD, indices=GOOD.indices.astype(np.int32)), r"indices must be int64 \(n,\), got int32"),
        (replace(GOOD, offsets=GOOD.offsets.astype(float)), r"offsets must be int64 \(n,\), got float64"),
        (replace(GOOD, indices=GOOD.indices[:, None]), r"indices must be int64 \(n,\), got int64 \(5, 1\)"),
        (replace(GOOD, offsets=np.array([1, 2, 5])), r"offsets must ascend from 0 to 5, got \[1 2 5\]"),
        (replace(GOOD, offsets=np.array([0, 2, 4])), "offsets must ascend from 0 to 5"),
        (replace(GOOD, offsets=np.array([0, 3, 2, 5])), "offsets must ascend from 0 to 5"),
        (replace(GOOD, offsets=np.array([], dtype=INT)), "offsets must ascend from 0 to 5"),
        (replace(GOOD, noise_std=np.array([0.1, np.nan])), "noise_std must be one finite number >= 0 per client"),
        (replace(GOOD, noise_std=np.array([0.1, -0.2])), "noise_std must be one finite number"),
        (replace(GOOD, noise_std=np.array([0.1])), "noise_std must be one finite number"),
        (replace(GOOD, owner_ids=np.array([3])), r"owner_ids must be one id per client, got shape \(1,\)"),
        (of([4, 0], [6]), r"indices must lie in \[0, 6\), got 6"),
        (of([4, 0], [-1]), r"indices must lie in \[0, 6\), got -1"),
        (of([4, 0], [4]), "no example may be held twice, example 4 is held 2 times"),
        (of([4, 0], []), r"data\.split\.min_examples: each client needs at least 1 examples, client 1 has 0"),
        (of([4, 0]), r"data\.clients: the partition has 1 clients, expected 2"),
        (Partition(np.array([0]), np.array([], dtype=INT)), r"data\.clients: the partition has 0 clients"),
    ],
)
def test_what_is_no_partition_is_refused_with_rule_and_value(partition, message):
    with pytest.raises(DataError, match=message):
        check(partition, 6, 2, 1)


def test_a_good_partition_passes_and_may_leave_examples_out():
    check(GOOD, 6, 2, 2)
    check(of([], [5]), 6, None, 0)
    with pytest.raises(DataError, match="has 0 clients, expected at least 1"):
        check(from_lists([]), 6, None, 0)


def test_lists_arrays_and_tensors_become_a_partition():
    partition = from_lists([[4, 0], np.array([2], dtype=np.uint8), torch.tensor([1, 3]), []])
    assert partition.offsets.tolist() == [0, 2, 3, 5, 5]
    assert partition.indices.tolist() == [4, 0, 2, 1, 3]
    assert partition.indices.dtype == partition.offsets.dtype == np.int64


@pytest.mark.parametrize("bad", [[0.0, 1.0], [True, False], [[1, 2]], 3, ["a"]])
def test_lists_of_anything_but_whole_numbers_are_refused(bad):
    with pytest.raises(DataError, match="the indices of client 1 must be whole numbers"):
        from_lists([[0], bad])

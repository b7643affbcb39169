"""Files: what was written comes back, and what was damaged is refused by name."""

import json
import os
from dataclasses import replace

import pytest
import torch

from permafrost import artifacts
from permafrost.artifacts import (
    file_digest,
    load_json,
    load_record,
    require,
    save_json,
    save_record,
    write_atomically,
)
from permafrost.errors import DamagedError, InputError
from permafrost.tensors import load_state, load_tasks, load_tensors, save_tasks, save_tensors

TENSORS = {
    "weights": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "counter": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "view": torch.arange(6.0).reshape(2, 3).T,
}
VALUE = {"b": [1, 2.5, None, True], "a": {"ä": "ö"}, "tiny": 1e-300, "third": 1 / 3}


def refusal(action, path):
    """Return the message of an InputError that names the file in one line."""
    with pytest.raises(InputError) as caught:
        action(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def test_json_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "value.json"
    save_json(path, VALUE)
    assert load_json(path) == VALUE
    assert path.read_bytes().endswith(b"\n")


def test_json_of_the_same_value_is_the_same_bytes(tmp_path):
    save_json(tmp_path / "one.json", {"a": 1, "b": {"c": 2, "d": 3}})
    save_json(tmp_path / "two.json", {"b": {"d": 3, "c": 2}, "a": 1})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_holds_numbers_only(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        save_json(tmp_path / "value.json", {"value": value})
    assert not list(tmp_path.iterdir())


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "new" / "tensors.safetensors"
    save_tensors(path, TENSORS, VALUE)
    tensors, about = load_tensors(path)
    assert about == VALUE
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_tensors_without_a_word_about_them(tmp_path):
    save_tensors(tmp_path / "t", {"a": torch.nn.Parameter(torch.ones(2))})
    tensors, about = load_tensors(tmp_path / "t")
    assert about is None
    assert not tensors["a"].requires_grad


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    save_tensors(tmp_path / "one", TENSORS, {"a": 1, "b": 2})
    turned = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    save_tensors(tmp_path / "two", turned, {"b": 2, "a": 1})
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    save_tensors(tmp_path / "three", TENSORS | {"counter": torch.tensor(8)}, {"a": 1, "b": 2})
    assert file_digest(tmp_path / "one") != file_digest(tmp_path / "three")


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_tasks_round_trip(tmp_path, make_sequence):
    sequence = make_sequence(tasks=3)
    save_tasks(tmp_path / "tasks", sequence)
    loaded = load_tasks(tmp_path / "tasks")
    assert loaded.normalization == sequence.normalization
    assert [task.classes for task in loaded.tasks] == [task.classes for task in sequence.tasks]
    for ours, theirs in zip(loaded.tasks, sequence.tasks, strict=True):
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(ours, part).images, getattr(theirs, part).images)
            assert torch.equal(getattr(ours, part).labels, getattr(theirs, part).labels)
    save_tasks(tmp_path / "again", loaded)
    assert file_digest(tmp_path / "tasks") == file_digest(tmp_path / "again")


def test_missing_files(tmp_path):
    for load in (load_json, load_tensors, load_tasks):
        assert "not found; run the stage" in refusal(load, tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 4, 8, 20, 0.5, -1])
def test_truncated_files(tmp_path, make_sequence, keep):
    path = tmp_path / "tasks.safetensors"
    save_tasks(path, make_sequence())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    for load in (load_tensors, load_tasks):
        assert "damaged: delete it" in refusal(load, path)


def test_rows_that_were_dropped_or_moved_are_missed(tmp_path):
    path = tmp_path / "rows.json"
    save_record(path, [{"a": 1}, {"a": 2}, {"a": 3}])
    rows = json.loads(path.read_bytes())
    assert [row["a"] for row in load_record(path)] == [1, 2, 3]
    for kept in (rows[:2], rows[1:], rows[::-1], [], rows[:1], rows + rows):
        save_json(path, kept)
        assert "damaged" in refusal(load_record, path)
    path.write_text('{"a": NaN}')
    assert "no valid JSON" in refusal(load_record, path)


def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch):
    """Too many open files, say: what is stored is whole, and must not be made again."""
    path = tmp_path / "tensors.safetensors"
    save_tensors(path, TENSORS)

    def fail(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(artifacts.Path, "open", fail)
    with pytest.raises(OSError, match="Too many"):
        load_tensors(path)


def test_truncated_json(tmp_path):
    path = tmp_path / "value.json"
    for content in (b"", b'{"a": ', b'{"a": 1}{', b"\xff\xfe\x00"):
        path.write_bytes(content)
        assert "no valid JSON" in refusal(load_json, path)


def test_bits_flipped_in_the_header(tmp_path, make_sequence):
    """No damage comes through as another error than InputError, and most is found."""
    path = tmp_path / "tasks.safetensors"
    save_tasks(path, make_sequence())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = 0
    positions = [*range(12), *range(12, 8 + length, 13)]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        try:
            load_tasks(path)
        except InputError:
            found += 1
        else:
            assert position > 12
    assert found > len(positions) / 2


def test_wrong_content(tmp_path):
    path = tmp_path / "file"
    path.write_text(json.dumps(VALUE))
    refusal(load_tensors, path)
    refusal(load_tasks, path)
    save_tensors(path, TENSORS)
    refusal(load_json, path)
    for about in (
        None,
        {"classes": [["a", "b"]], "mean": [0.5], "std": [0.5]},
        [1],
        {"classes": 3},
    ):
        save_tensors(path, TENSORS, about)
        assert "holds no tasks" in refusal(load_tasks, path)


def test_tasks_that_make_no_sense(tmp_path, make_sequence):
    path = tmp_path / "tasks"
    sequence = make_sequence()
    first = sequence.tasks[0]
    images, labels = first.train.images, first.train.labels
    for wrong in (
        replace(first.train, labels=labels + 1),
        replace(first.train, labels=labels - 1),
        replace(first.train, images=images.float()),
        replace(first.train, images=images[:, 0]),
        replace(first.train, images=images[1:]),
    ):
        save_tasks(path, replace(sequence, tasks=(replace(first, train=wrong), sequence.tasks[1])))
        assert "holds no tasks" in refusal(load_tasks, path)


def test_load_state(tmp_path, make_network, same_bits):
    path = tmp_path / "network"
    network = make_network(seed=1)
    save_tensors(path, network.state_dict())
    other = make_network(seed=2)
    load_state(path, other)
    assert same_bits(network.state_dict(), other.state_dict())
    for wrong in (make_network(width=0.1), make_network("vgg13"), make_network(tasks=3)):
        assert "another network" in refusal(lambda path, net=wrong: load_state(path, net), path)


@pytest.mark.parametrize("broken", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_content(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(artifacts.os, broken, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_was_written(tmp_path):
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_require(tmp_path):
    require(True, tmp_path, "is wrong")
    assert "is wrong; it is damaged" in refusal(
        lambda path: require(False, path, "is wrong"), tmp_path
    )


def test_a_number_beyond_all_floats_is_damage(tmp_path):
    """JSON's reader takes it for infinity, which its writer refuses."""
    path = tmp_path / "rows.json"
    save_record(path, [{"acc": 0.25}])
    path.write_text(path.read_text().replace("0.25", "1e999"))
    with pytest.raises(DamagedError, match="is not what was written"):
        load_record(path)

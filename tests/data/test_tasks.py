"""The split into tasks: disjoint, stratified, and the same images held out for every seed."""

from dataclasses import replace

import pytest
import torch

from permafrost.data import (
    ImageDataset,
    LabeledImages,
    TaskFrom,
    TaskSequence,
    split_tasks,
    tasks_of,
)
from permafrost.data.tasks import statistics
from permafrost.errors import InputError
from permafrost.tensors import load_tasks, save_tasks


def part(counts: list[int], first_id: int = 0) -> LabeledImages:
    """Make images that carry a number of their own, classes interleaved."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    ids = torch.arange(first_id, first_id + len(labels))
    images = torch.stack([ids % 16, ids // 16, 10 * labels], dim=1)[..., None, None]
    return LabeledImages(images.to(torch.uint8).expand(-1, 3, 2, 2).contiguous(), labels)


def dataset(
    train: tuple[int, ...] = (20,) * 6, test: tuple[int, ...] | None = (5,) * 6
) -> ImageDataset:
    names = tuple("abcdefghij"[: len(train)])
    return ImageDataset(names, part(list(train)), part(list(test), 1000) if test else None)


def split(data: ImageDataset, **changed) -> TaskSequence:
    arguments = {
        "classes_per_task": 3,
        "tasks": 2,
        "selection": "first",
        "validation": 0.1,
        "test_share": 0.2,
        "seed": 0,
    }
    return split_tasks(data, **(arguments | changed))


def ids(data: LabeledImages) -> list[int]:
    return (data.images[:, 0, 0, 0].int() + 16 * data.images[:, 1, 0, 0].int()).tolist()


def all_ids(sequence: TaskSequence, name: str) -> list[int]:
    return sorted(number for task in sequence.tasks for number in ids(getattr(task, name)))


def test_first_takes_the_classes_in_label_order_and_remaps():
    sequence = split(dataset())
    assert [task.classes for task in sequence.tasks] == [("a", "b", "c"), ("d", "e", "f")]
    for number, task in enumerate(sequence.tasks):
        for data, count in ((task.train, 18), (task.validation, 2), (task.test, 5)):
            assert data.labels.dtype == torch.int64
            assert data.images.dtype == torch.uint8
            assert data.labels.bincount().tolist() == [count] * 3
            assert torch.equal(data.images[:, 2, 0, 0], 10 * (data.labels + 3 * number))


@pytest.mark.parametrize("test", [None, (5,) * 6])
def test_parts_are_disjoint_and_complete(test):
    data = dataset(test=test)
    sequence = split(data)
    everything = [n for name in ("train", "validation", "test") for n in all_ids(sequence, name)]
    assert sorted(everything) == sorted(ids(data.train) + (ids(data.test) if data.test else []))


def test_own_test_part_is_kept_whole():
    data = dataset()
    sequence = split(data, test_share=0.5)
    assert data.test is not None
    assert all_ids(sequence, "test") == sorted(ids(data.test))


def test_missing_test_part_is_drawn_stratified():
    data = dataset(train=(10, 20, 30, 40, 50, 60), test=None)
    first, second = split(data, test_share=0.2, validation=0.25).tasks
    assert first.test.labels.bincount().tolist() == [2, 4, 6]
    assert first.validation.labels.bincount().tolist() == [2, 4, 6]
    assert second.train.labels.bincount().tolist() == [24, 30, 36]


def test_validation_does_not_change_the_test_images():
    data = dataset(test=None)
    assert all_ids(split(data, validation=0.0), "test") == all_ids(split(data), "test")


def test_no_validation():
    sequence = split(dataset(), validation=0)
    assert [len(task.validation) for task in sequence.tasks] == [0, 0]
    assert sequence.tasks[0].validation.images.shape == (0, 3, 2, 2)
    assert [len(task.train) for task in sequence.tasks] == [60, 60]


@pytest.mark.parametrize("test", [None, (5,) * 6])
@pytest.mark.parametrize("selection", ["first", "random"])
def test_no_seed_changes_what_is_held_out(selection, test):
    one, other = (split(dataset(test=test), selection=selection, seed=seed) for seed in (0, 1))
    for name in ("train", "validation", "test"):
        assert all_ids(one, name) == all_ids(other, name)


def test_held_out_images_differ_between_classes():
    data = dataset()
    places = [
        [i for i, number in enumerate(sorted(ids(data.train))) if number in held_out]
        for held_out in (ids(task.validation) for task in split(data).tasks)
    ]
    assert places[0] != places[1]


def test_random_selection_depends_on_the_seed_alone():
    chosen = [
        tuple(task.classes for task in split(dataset(), selection="random", seed=seed).tasks)
        for seed in (0, 0, 1, 2, 2**40)
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 2
    for tasks in chosen:
        assert sorted(name for task in tasks for name in task) == list("abcdef")


def test_random_selection_stays_what_it_was():
    # Recorded: published results name their classes by the seed.
    tasks = split(dataset(), selection="random", seed=3).tasks
    assert [task.classes for task in tasks] == [("b", "a", "c"), ("f", "d", "e")]


def test_random_selection_remaps_in_its_own_order():
    for task in split(dataset(), selection="random", seed=5).tasks:
        expected = torch.tensor(["abcdef".index(name) for name in task.classes])
        assert torch.equal(task.test.images[:, 2, 0, 0], 10 * expected[task.test.labels])


def test_same_arguments_same_tensors():
    one, other = (split(dataset(test=None), selection="random", seed=7) for _ in range(2))
    for left, right in zip(one.tasks, other.tasks, strict=True):
        assert left.classes == right.classes
        assert torch.equal(left.train.images, right.train.images)
    assert one.normalization == other.normalization


def test_more_or_fewer_tasks_than_two():
    assert len(split(dataset(), classes_per_task=2, tasks=3).tasks) == 3
    (task,) = split(dataset(), classes_per_task=4, tasks=1).tasks
    assert task.classes == ("a", "b", "c", "d")


def test_classes_by_name_make_tasks_of_any_size_and_order():
    wanted = [["f", "b", "a"], ["d", "c"]]
    sequence = split(dataset(), classes=wanted, classes_per_task=99, selection="random")
    assert [task.classes for task in sequence.tasks] == [("f", "b", "a"), ("d", "c")]
    for names, task in zip(wanted, sequence.tasks, strict=True):
        expected = torch.tensor(["abcdef".index(name) for name in names])
        for data in (task.train, task.validation, task.test):
            assert torch.equal(data.images[:, 2, 0, 0], 10 * expected[data.labels])


def test_how_classes_are_chosen_changes_no_image():
    by_name = split(dataset(test=None), classes=[["a", "b", "c"], ["d", "e", "f"]])
    for one, other in zip(by_name.tasks, split(dataset(test=None)).tasks, strict=True):
        assert torch.equal(one.train.images, other.train.images)
        assert torch.equal(one.test.images, other.test.images)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([["a", "x"], ["b", "c"]], ["split.classes", "no class 'x'", "6"]),
        ([["a", "A"], ["b", "c"]], ["split.classes", "no class 'A'"]),
        ([["a", "b"], ["b", "c"]], ["split.classes", "'b' stands twice"]),
        ([["a", "b"], ["c", "c"]], ["split.classes", "'c' stands twice"]),
    ],
)
def test_bad_names_of_classes(classes, words):
    with pytest.raises(InputError) as caught:
        split(dataset(), classes=classes)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_statistics_are_those_of_the_first_tasks_training_part():
    sequence = split(dataset())
    images = sequence.tasks[0].train.images.double() / 255
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    assert sequence.normalization.mean == pytest.approx(mean.tolist(), rel=1e-12)
    assert sequence.normalization.std == pytest.approx(std.tolist(), rel=1e-12)


def test_constant_channel_has_deviation_one():
    data = dataset()
    data.train.images[:, 1] = 77
    normalization = split(data).normalization
    assert normalization.mean[1] == 77 / 255
    assert normalization.std[1] == 1.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"classes_per_task": 4}, ["split.classes_per_task", "split.tasks", "8", "6"]),
        ({"classes_per_task": 0}, ["split.classes_per_task", "at least 1"]),
        ({"tasks": 0}, ["split.tasks", "at least 1"]),
        ({"selection": "last"}, ["split.selection", "first, random"]),
        ({"validation": 1.0}, ["split.validation", "< 1"]),
        ({"validation": -0.1}, ["split.validation", "0 <="]),
        ({"validation": float("nan")}, ["split.validation", "nan"]),
        ({"test_share": 0.0}, ["split.test_share", "0 <"]),
        ({"test_share": 1}, ["split.test_share", "< 1"]),
        ({"validation": 0.02}, ["class 'a'", "20 for training", "0 for split.validation"]),
        ({"validation": 0.96}, ["class 'a'", "1 for training", "19 for split.validation"]),
    ],
)
def test_bad_parameters(changed, words):
    with pytest.raises(InputError) as caught:
        split(dataset(), **changed)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((20, 20, 1, 20, 20, 20), (5,) * 6, ["'c'", "1 for training", "5 for testing"]),
        ((20,) * 6, (5, 0, 5, 5, 5, 5), ["'b'", "20 for training", "0 for testing"]),
        ((20, 20, 20, 2, 20, 20), None, ["'d'", "2 for training", "0 for testing"]),
    ],
)
def test_classes_with_too_few_images(train, test, words):
    with pytest.raises(InputError) as caught:
        split(dataset(train=train, test=test), validation=0)
    assert all(word in str(caught.value) for word in words)


def test_small_classes_that_are_not_chosen_do_no_harm():
    split(dataset(train=(20, 20, 20, 20, 1, 0)), classes_per_task=2)


def two_sets():
    """Return two data sets of three classes, the second without a test part."""
    photos = dataset_of("photo", per_class=10, brightness=200, test=True)
    drawings = dataset_of("drawing", per_class=10, brightness=20, test=False)
    return photos, drawings


def dataset_of(name, *, per_class, brightness, test):
    labels = torch.arange(3).repeat_interleave(per_class)
    images = torch.full((len(labels), 3, 8, 8), brightness, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels), dtype=torch.uint8)  # each is another
    data = LabeledImages(images, labels)
    return ImageDataset(tuple(f"{name} {i}" for i in range(3)), data, data if test else None)


def test_tasks_of_several_data_sets():
    photos, drawings = two_sets()
    parts = [
        TaskFrom(photos, ["photo 2", "photo 0"]),
        TaskFrom(drawings, ["drawing 1"], flip=False, padding=0, epochs=7),
    ]
    sequence = tasks_of(parts, validation=0.2, test_share=0.3)
    first, second = sequence.tasks
    assert first.classes == ("photo 2", "photo 0")
    assert second.classes == ("drawing 1",)
    assert (len(first.train), len(first.validation), len(first.test)) == (16, 4, 20)
    assert (len(second.train), len(second.validation), len(second.test)) == (6, 1, 3)
    assert first.train.images[first.train.labels == 0][:, 0, 0, 0].min() >= 20  # of photo 2
    assert first.training == {}
    assert second.training == {"flip": False, "padding": 0, "epochs": 7}
    # The first task's statistics, for both.
    assert sequence.normalization == statistics(first.train.images)
    with pytest.raises(InputError, match=r"^split\.classes: the data set has no class 'drawing 1'"):
        tasks_of([TaskFrom(photos, ["drawing 1"])], validation=0, test_share=0.3)


def test_how_a_task_is_trained_is_stored(tmp_path):
    photos, drawings = two_sets()
    plain = [TaskFrom(photos, ["photo 0"]), TaskFrom(drawings, ["drawing 0"])]
    for parts in (plain, [plain[0], replace(plain[1], flip=True, epochs=3)]):
        sequence = tasks_of(parts, validation=0.2, test_share=0.3)
        save_tasks(tmp_path / "tasks", sequence)
        read = load_tasks(tmp_path / "tasks")
        assert [t.training for t in read.tasks] == [t.training for t in sequence.tasks]

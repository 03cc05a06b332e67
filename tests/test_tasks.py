from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from toy_task import Toy

from qsweep.check import check
from qsweep.errors import DataError, NotFinite, TaskFailure
from qsweep.evaluate import accuracy, accuracy_of_part, judged, predict
from qsweep.splits import doubts
from qsweep.tasks import AnyTask, Samples, SplitName, Task, TaskMetric
from qsweep.tasks._imports import imported
from qsweep.tasks._seen import alike, seen
from qsweep.tasks._user import UserTask
from qsweep.tasks.image_classification import ImageClassification
from qsweep.tasks.images._task import augment, normalise
from qsweep.tasks.python import Python

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, images: list[Any] | None = None, labels: list[Any] | None = None, **columns: list[Any]) -> Path:
    """A Parquet file in row groups of 20: by default the 50 images `PIXELS` and labels 0 1 2 0 1 2 ..."""
    images = [{"bytes": encoded(pixels), "path": None} for pixels in PIXELS] if images is None else images
    labels = [row % 3 for row in range(len(images))] if labels is None else labels
    pq.write_table(pa.table(columns or {"image": images, "label": labels}), path, row_group_size=20)
    return path


def images_of(**data: Any) -> ImageClassification:
    content = {"method": "parquet", "train": "train.parquet", "test": "test.parquet", "classes": 3} | data
    return ImageClassification.model_validate({"model": {"arch": "resnet20"}, "data": content})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet")
    return tmp_path


def opened(root: Path, **data: Any) -> Task:
    return images_of(**data).open(root)


def pixels(rows: Any) -> Tensor:
    return torch.from_numpy(PIXELS[rows]).permute(0, 3, 1, 2)


def test_digits_are_split_into_disjoint_parts_with_every_class_alike(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    config = ImageClassification.model_validate({"model": {"arch": "digits_cnn"}, "data": {"method": "digits"}})
    parts = [config.open(tmp_path).samples(split) for split in SPLITS]
    assert [len(part.inputs) for part in parts] == [1077, 360, 360]
    assert all(part.inputs.dtype == torch.uint8 and part.inputs.shape[1:] == (1, 8, 8) for part in parts)
    assert all(0.09 < share < 0.11 for part in parts for share in (part.labels.bincount() / len(part.labels)).tolist())
    rows = [tuple(row) for part in parts for row in part.inputs.flatten(1).tolist()]
    assert sorted(rows) == sorted(tuple(map(int, row)) for row in load_digits().data)


def test_modules_beside_a_class_that_it_imports_count_like_its_file(tmp_path: Path) -> None:
    files = {
        "task.py": "import helper\nfrom parts import net, missing\nfrom other.deep import x\nclass Mine: ...\n",
        "helper.py": "import task, json, second\n",
        "second.py": "def broken(:\n",
        "parts/__init__.py": "from . import blocks\nfrom .sub.more import y\n",
        "parts/net.py": "from .. import nothing\n",
        "parts/blocks.py": "",
        "parts/sub/more.py": "",
        "other/deep.py": "",
        "unread.py": "",
        "json.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    names = [path.relative_to(tmp_path).as_posix() for path in imported(tmp_path / "task.py")]
    assert names == sorted(set(files) - {"task.py", "unread.py", "json.txt"})
    config = Python(file="task.py:Mine")
    before = config.fingerprint(tmp_path)
    (tmp_path / "unread.py").write_text("x = 1\n")
    assert config.fingerprint(tmp_path) == before
    (tmp_path / "parts" / "blocks.py").write_text("x = 1\n")
    assert config.fingerprint(tmp_path) != before


def test_another_seed_splits_the_digits_otherwise(tmp_path: Path) -> None:
    configs = [
        ImageClassification.model_validate(
            {"model": {"arch": "digits_cnn"}, "data": {"method": "digits", "seed": seed}}
        )
        for seed in (0, 1)
    ]
    one, other = (config.open(tmp_path).samples("test").inputs for config in configs)
    assert not torch.equal(one, other)
    assert configs[0].fingerprint(tmp_path) != configs[1].fingerprint(tmp_path)


def test_only_the_first_process_imports_scikit_learn(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qsweep.tasks.images.digits import Digits;"
        "Digits().open(Path(sys.argv[1])).load('train'); print('sklearn' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["True", "False"]


def test_parquet_images_and_labels_are_those_of_the_file(root: Path) -> None:
    images, labels = opened(root).samples("test")
    assert torch.equal(images, pixels(slice(None)))
    assert labels.tolist() == [row % 3 for row in range(50)]


@pytest.mark.parametrize(("first", "last"), [(0, 50), (0, 1), (15, 41), (20, 40)])
def test_rows_of_a_file_are_taken_across_its_groups(root: Path, first: int, last: int) -> None:
    task = opened(root, test={"file": "test.parquet", "rows": [first, last]})
    assert torch.equal(task.samples("test").inputs, pixels(slice(first, last)))


def test_without_a_validation_file_a_tenth_of_train_is_held_out(root: Path) -> None:
    task = opened(root)
    train, validation = task.samples("train").inputs, task.samples("validation").inputs
    assert len(validation) == 5
    together = torch.cat([train, validation]).flatten(1).tolist()
    assert sorted(together) == sorted(pixels(slice(None)).flatten(1).tolist())


def test_grey_images_have_one_channel(root: Path) -> None:
    task = opened(root, mean=[0.5], std=[0.5])
    assert task.samples("test").inputs.shape == (50, 1, 6, 5)
    assert task.model()(task.transform(task.samples("test").inputs[:2])).shape == (2, 3)


def test_columns_may_have_other_names(root: Path) -> None:
    write(root / "test.parquet", img=[{"bytes": encoded(PIXELS[0])}], fine=[2])
    task = opened(root, train="train.parquet", image_column="img", label_column="fine")
    assert task.samples("test").labels.tolist() == [2]


def test_images_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(root).samples("test").inputs
    monkeypatch.delattr("hashlib.file_digest")  # the file is not opened, to be hashed
    monkeypatch.delattr("pyarrow.parquet.ParquetFile")  # or to be read
    assert torch.equal(opened(root).samples("test").inputs, before)


def test_a_file_that_was_repaired_is_read_again(root: Path) -> None:
    path = root / "test.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"`test.parquet`: must be a whole Parquet file"):
        opened(root).samples("test")
    path.write_bytes(whole)
    assert len(opened(root).samples("test").inputs) == 50


def test_the_fingerprint_is_of_the_content_not_of_its_place(root: Path) -> None:
    before = images_of().fingerprint(root)
    (root / "test.parquet").rename(root / "moved.parquet")
    assert images_of(test="moved.parquet").fingerprint(root) == before
    write(root / "moved.parquet", labels=[0] * 50)
    assert images_of(test="moved.parquet").fingerprint(root) != before


@pytest.mark.parametrize(
    "change",
    [{"classes": 4}, {"mean": [0.1] * 3}, {"flip": False}, {"test": {"file": "test.parquet", "rows": [0, 9]}}],
)
def test_the_fingerprint_holds_what_the_samples_depend_on(root: Path, change: dict[str, Any]) -> None:
    assert images_of(**change).fingerprint(root) != images_of().fingerprint(root)


IMAGE = {"bytes": encoded(PIXELS[0])}


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"label": [0]}, "must have a column `image` .it has label."),
        ({"image": [IMAGE]}, "must have a column `label`"),
        ({"image": [b"png"], "label": [0]}, "`image`: must be a struct with `bytes` .got binary."),
        ({"image": [IMAGE], "label": ["cat"]}, "`label`: must be integers .got string."),
        ({"image": [IMAGE] * 2, "label": [0, 3]}, "row 1: `label` must be from 0 to 2 .got 3."),
        ({"image": [IMAGE] * 2, "label": [-1, 0]}, "row 0: `label` must be from 0 to 2 .got -1."),
        ({"image": [IMAGE] * 2, "label": [0, None]}, "row 1: `label` must be from 0 to 2 .got None."),
        ({"image": [IMAGE, {"bytes": b"not an image"}], "label": [0, 0]}, "row 1: the image must be readable"),
        ({"image": [IMAGE, {"bytes": IMAGE["bytes"][:60]}], "label": [0, 0]}, "row 1: the image must be readable"),
        ({"image": [IMAGE, {"bytes": None}], "label": [0, 0]}, "row 1: the image must be readable"),
        (
            {"image": [IMAGE] * 130 + [{"bytes": encoded(PIXELS[0][:4])}], "label": [0] * 131},
            "row 130: the image must be 6 x 5 pixels like the first .got 4 x 5.",
        ),
        ({"image": pa.array([], pa.struct([("bytes", pa.binary())])), "label": pa.array([], pa.int64())}, "has 0 rows"),
    ],
)
def test_a_parquet_file_that_does_not_fit_is_refused(root: Path, columns: dict[str, Any], complaint: str) -> None:
    write(root / "bad.parquet", **columns)
    with pytest.raises(DataError, match=complaint) as raised:
        opened(root, test="bad.parquet").samples("test")
    assert "`bad.parquet`" in str(raised.value)


def test_rows_beyond_the_end_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"`test.parquet`: must have rows 40 to 59 \(it has 50 rows\)"):
        opened(root, test={"file": "test.parquet", "rows": [40, 60]}).samples("test")


def test_one_file_under_two_names_is_refused_when_it_is_opened(root: Path) -> None:
    with pytest.raises(DataError, match="must share no rows"):
        opened(root, test="./train.parquet")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"validation": "test.parquet"}, "share no rows"),
        ({"test": "train.parquet"}, "share no rows"),
        (
            {"validation": {"file": "a", "rows": [0, 20]}, "test": {"file": "a", "rows": [19, 40]}},
            "share no rows",
        ),
        ({"test": {"file": "test.parquet", "rows": [3, 3]}}, "the first one lower"),
        ({"mean": [0.5]}, "1 value each or 3"),
        ({"std": [0.2, 0.0, 0.2]}, "greater than 0"),
        ({"classes": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_data_is_refused_when_the_spec_is_read(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        images_of(**change)


def test_a_missing_file_is_refused_when_the_task_is_opened(root: Path) -> None:
    with pytest.raises(DataError, match=r"`none.parquet`: there is no file `.*none.parquet`"):
        opened(root, test="none.parquet")


def test_paths_may_hold_variables_which_must_be_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSWEEP_TEST_FOLDER", str(root))
    assert (
        len(
            opened(
                root / "elsewhere", train="$QSWEEP_TEST_FOLDER/train.parquet", test="${QSWEEP_TEST_FOLDER}/test.parquet"
            )
            .samples("test")
            .labels
        )
        == 50
    )
    monkeypatch.delenv("QSWEEP_TEST_FOLDER")
    with pytest.raises(DataError, match="the environment variable `QSWEEP_TEST_FOLDER` must be set"):
        opened(root, test="${QSWEEP_TEST_FOLDER}/test.parquet")


def test_a_variable_with_a_relative_path_starts_at_the_working_directory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSWEEP_TEST_FOLDER", ".")
    monkeypatch.chdir(root)
    train, test = "$QSWEEP_TEST_FOLDER/train.parquet", "$QSWEEP_TEST_FOLDER/test.parquet"
    assert opened(root / "specs", train=train, test=test).samples("test").labels.tolist()[:3] == [0, 1, 2]


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_model(root: Path) -> None:
    (root / "weights.safetensors").write_bytes(b"no weights")
    content = images_of().model_dump() | {"model": {"arch": "resnet20", "checkpoint": "weights.safetensors"}}
    config = ImageClassification.model_validate(content)
    assert config.pretrained
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        config.open(root).model()


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    images = pixels(slice(8))
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    expected = (images.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.equal(normalise(images, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), expected)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (2, True)])
def test_an_augmented_image_is_a_crop_of_the_padded_one_mirrored_or_not(padding: int, flip: bool) -> None:
    images = pixels(slice(40))
    augmented = augment(images, padding, flip, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, augmented, strict=True):
        padded = torch.nn.functional.pad(before, (padding,) * 4)
        shifts = range(2 * padding + 1)
        for top, left, mirrored in itertools.product(shifts, shifts, (False, True)[: flip + 1]):
            crop = padded[:, top : top + 6, left : left + 5]
            if torch.equal(crop.flip(2) if mirrored else crop, after):
                seen.add((top, left, mirrored))
                break
        else:
            pytest.fail("no crop of the image")
    assert len(seen) > 0.5 * (2 * padding + 1) ** 2 * (1 + flip)


def test_augmentation_follows_its_generator(root: Path) -> None:
    task = opened(root)
    images = task.samples("train").inputs
    one, again, other = (task.transform(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, task.transform(images))


def test_the_score_is_one_where_the_largest_output_is_the_label(root: Path) -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert opened(root).score(outputs, torch.tensor([1, 2, 2])).tolist() == [1.0, 0.0, 1.0]


def test_the_cifar_checkpoint_has_its_accuracy_on_real_images(data: Path, tmp_path: Path) -> None:
    split = {"file": str(data / "cifar10" / "test_dev.parquet")}
    config = images_of(
        train={**split, "rows": [1000, 1010]},
        validation={**split, "rows": [0, 1000]},
        test={**split, "rows": [1010, 1020]},
        classes=10,
    ).model_dump()
    config["model"]["checkpoint"] = str(data / "checkpoints" / "resnet20_cifar10_jpeg.safetensors")
    task = ImageClassification.model_validate(config).open(tmp_path)
    inputs, labels = task.samples("validation")
    assert accuracy(task, predict(task.model(), task, inputs), labels) == pytest.approx(0.878, abs=0.015)


USER_TASK = """
import torch
from torch import nn

class Mine:
    def __init__(self, size=3):
        self.size = size

    def model(self):
        return nn.Linear(self.size, 2)

    def samples(self, split):
        return torch.ones(6, self.size), torch.zeros(6, dtype=torch.long)

    def loss(self, outputs, labels):
        return nn.functional.cross_entropy(outputs, labels)

    def score(self, outputs, labels):
        return (outputs.argmax(1) == labels).float()
"""


def user(root: Path, old: str = "", new: str = "", **fields: Any) -> Task:
    (root / "mine.py").write_text(USER_TASK.replace(old, new))
    return Python(file="mine.py:Mine", **fields).open(root)


@pytest.mark.parametrize("base", ["", "(Task)"])
def test_a_task_of_ones_own_needs_four_methods(base: str, tmp_path: Path) -> None:
    task = user(tmp_path, "class Mine:", f"from qsweep.tasks import Task\n\nclass Mine{base}:", arguments={"size": 5})
    check(task, task.model())
    assert task.transform(torch.zeros(2, 5, dtype=torch.uint8)).dtype == torch.float32


def test_the_worked_example_is_a_sound_task() -> None:
    root = Path(__file__).parents[1] / "experiments" / "python_task"
    task = Python(file="task.py:BreastCancer", arguments={"hidden": 8}).open(root)
    check(task, task.model())


def test_a_task_may_import_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_task.py").write_text("SIZE = 4")
    task = user(tmp_path, "import torch\n", "import torch\nfrom beside_the_task import SIZE\n")
    assert task.samples("train").inputs.shape == (6, 3)


class Counted(Toy):
    """Some labels are others."""

    def __init__(self, **others: int) -> None:
        super().__init__()
        self.others = others

    def samples(self, split: SplitName) -> Samples:
        inputs, labels = super().samples(split)
        labels[-self.count // 5 :] = self.others.get(split, 0)
        return Samples(inputs, labels)


@pytest.mark.parametrize("label", [2, -1])
def test_labels_that_number_no_class_are_told(label: int) -> None:
    task = Counted(validation=label)
    (said,) = check(task, task.model())
    assert said == (
        f"`validation` has labels that neither the model nor `train` knows: {label} (20.0% of them; classes are 0 to 1)"
    )
    left_out = Counted(train=-100, validation=-100, test=-100)  # as cross entropy leaves it out
    assert check(left_out, left_out.model()) == []


def use(task: Task) -> None:
    check(task, task.model())


FLOATS = "return torch.ones(6, self.size), torch.zeros(6, 2)"
"""Labels of a regression."""


def regression(root: Path, samples: str = FLOATS, loss: str = "mse_loss(outputs, labels)") -> Task:
    (root / "mine.py").write_text(
        USER_TASK.replace("return torch.ones(6, self.size), torch.zeros(6, dtype=torch.long)", samples)
        .replace("cross_entropy(outputs, labels)", loss)
        .replace("(outputs.argmax(1) == labels).float()", "-((outputs - labels) ** 2).nanmean(1)")
    )
    return Python(file="mine.py:Mine", metric={"name": "negative MSE", "unit": None}).open(root)


def test_labels_that_are_not_finite_are_named_where_the_loss_cannot_take_them(tmp_path: Path) -> None:
    samples = "labels = torch.zeros(6, 2)\n        labels[5, 1] = torch.nan\n        return torch.ones(6, 3), labels"
    with pytest.raises(TaskFailure, match=r"must be finite .* labels of sample 5 of `train` are NaN or infinity"):
        use(regression(tmp_path, samples))
    use(regression(tmp_path, samples, "mse_loss(outputs[labels.isfinite()], labels[labels.isfinite()])"))


def test_splits_of_several_shapes_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    samples = "return torch.ones(6, 4, 3 if split == 'train' else 2), torch.zeros(6, 4, 2)"
    with pytest.raises(TaskFailure, match=r"samples of `validation` must be \(4, 3\), .* \(got \(4, 2\)\)"):
        use(regression(tmp_path, samples))


def test_what_a_loss_warns_of_is_told_once(tmp_path: Path) -> None:
    task = regression(tmp_path, "return torch.ones(6, self.size), torch.zeros(6, 1)")
    with pytest.warns(UserWarning, match="Using a target size"):
        (said,) = check(task, task.model())
    assert said.startswith("the task's `loss` warns: Using a target size")
    assert check(regression(tmp_path), task.model()) == []


@pytest.mark.parametrize(
    "samples",
    [
        "return torch.rand(6, self.size), torch.zeros(6, 2)",
        "return torch.ones(6, self.size), torch.rand(6, 2)",
        "order = torch.randperm(6)\n        return torch.arange(18.0).view(6, 3)[order], torch.zeros(6, 2)",
        "many = int(torch.randint(6, 2000, ()))\n        return torch.ones(many, self.size), torch.zeros(many, 2)",
    ],
    ids=["inputs", "labels", "order", "number"],
)
def test_samples_that_are_others_in_the_next_process_are_refused(samples: str, tmp_path: Path) -> None:
    first, same, other = (regression(tmp_path, samples) for _ in range(3))
    assert isinstance(first, UserTask)
    for task, seed in ((first, 0), (same, 0), (other, 1)):
        torch.manual_seed(seed)
        assert isinstance(task, UserTask)
        task.tell({}, first.seen)
        if task is not other:
            task.samples("validation")
            continue
        with pytest.raises(TaskFailure, match=r"`Mine.samples\('validation'\)` must give the same samples each time"):
            task.samples("validation")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_samples_are_known_again_in_whatever_last_bits_they_come(values: list[float]) -> None:
    inputs, labels = torch.tensor(values, dtype=torch.float64)[:, None], torch.tensor(values).isnan()
    before = seen(Samples(inputs, labels))
    assert alike(json.loads(json.dumps(before)), seen(Samples(inputs * (1 + 1e-6), labels)))
    assert not alike(before, seen(Samples(torch.cat([inputs, inputs[:1]]), torch.cat([labels, labels[:1]]))))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("import torch\n", "import no_such_module\n", "line 2: `import` raised ModuleNotFoundError"),
        ("class Mine:", "class Mine", "line 5: `import` raised SyntaxError"),
        ("class Mine:", "class Other:", "must have a class `Mine` .it has Other."),
        ("def score(", "def scores(", "must have the methods .* .missing: score."),
        ("self.size = size", "raise ValueError('five')", "line 7: `Mine.* raised ValueError: five"),
        ("return nn.Linear(self.size, 2)", "raise KeyError('x')", "line 10: `Mine.model` raised KeyError"),
        ("return nn.Linear(self.size, 2)", "return 1", "`Mine.model` must return a torch.nn.Module .got int."),
        ("return torch.ones(6, self.size), ", "return ", r"`Mine.samples\('train'\)` must return two tensors"),
        (
            "return torch.ones(6, self.size)",
            "return list(torch.ones(6, self.size))",
            r"must return two tensors, .* \(got a list of 6\)",
        ),
        ("torch.ones(6,", "torch.ones(5,", "must return as many inputs as labels"),
        ("torch.ones(6, self.size), torch.zeros(6", "torch.ones(0, 3), torch.zeros(0", "at least one"),
        ("cross_entropy(outputs, labels)", "cross_entropy(outputs, 1)", "line 16: `Mine.loss` raised TypeError"),
        (
            "cross_entropy(outputs, labels)",
            "cross_entropy(outputs, labels) / 0",
            "`Mine.loss` must be finite .* .got inf",
        ),
        (
            "cross_entropy(outputs, labels)",
            "cross_entropy(outputs, labels, reduction='none')",
            "return a scalar tensor",
        ),
        (
            "== labels).float()",
            "== labels).float() * 0 + 2",
            r"`Mine.score` must return values from 0 to 1, or have a unit in the spec, as in "
            r"`task: {metric: {name: PSNR, unit: dB}}` \(got 2.0 to 2.0\)",
        ),
        (
            "== labels).float()",
            "== labels).float() * torch.nan",
            r"must return values from 0 to 1, .* \(got nan, (\d+) of \1\)",
        ),
        ("== labels).float()", "== labels).float().mean()", r"must return a tensor of shape \(4,\)"),
        (
            "    def model(",
            "    def transform(self, x, generator=None):\n        return x[:1]\n\n    def model(",
            "`Mine.transform` must return a tensor of 6 samples",
        ),
    ],
)
def test_a_users_mistake_is_told_with_file_line_and_method(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    torch.manual_seed(1)
    with pytest.raises(TaskFailure, match=complaint) as raised:
        use(user(tmp_path, old, new))
    assert str(tmp_path / "mine.py") in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import torch\n", "import no_such_module\n"),
        ("class Mine:", "class Mine"),
        ("class Mine:", "class Other:"),
        ("def score(", "def scores("),
    ],
)
def test_a_class_is_checked_without_an_object_of_it_and_in_the_words_of_a_run(
    tmp_path: Path, old: str, new: str
) -> None:
    with pytest.raises(TaskFailure) as opened:
        user(tmp_path, old, new)
    with pytest.raises(TaskFailure) as checked:
        Python(file="mine.py:Mine").check(tmp_path)
    assert str(checked.value) == str(opened.value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({}, "missing a required argument: 'size'"), ({"size": 3, "depth": 2}, "unexpected keyword argument 'depth'")],
)
def test_arguments_are_checked_without_an_object_of_the_class(
    tmp_path: Path, arguments: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "mine.py").write_text(USER_TASK.replace("size=3", "size").replace("self.size = size", "1 / 0"))
    Python(file="mine.py:Mine", arguments={"size": 3}).check(tmp_path)
    with pytest.raises(TaskFailure, match=rf"`Mine\(...\)` raised TypeError: .*{complaint}"):
        Python(file="mine.py:Mine", arguments=arguments).check(tmp_path)


def test_a_class_that_tells_no_arguments_is_checked_without_them(tmp_path: Path) -> None:
    methods = "model = samples = loss = score = dict.get"
    (tmp_path / "mine.py").write_text(f"class Mine(dict):\n    {methods}\n")
    Python(file="mine.py:Mine", arguments={"size": 3}).check(tmp_path)


METRIC = """
    def score(self, outputs, labels):
        chosen, wanted = (nn.functional.one_hot(each, 2).bool() for each in (outputs.argmax(1), labels))
        return torch.cat([chosen & wanted, chosen | wanted], 1).float()

    def metric(self, scores):
        both, either = scores.sum(0).chunk(2)
        return (both / either).nanmean()
"""


def measured(root: Path, old: str = "", new: str = "") -> Task:
    return user(root, USER_TASK[USER_TASK.index("    def score") :], METRIC.replace(old, new))


def test_a_metric_of_all_samples_is_the_accuracy(tmp_path: Path) -> None:
    task = measured(tmp_path)
    check(task, task.model())
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(500, 2, generator=generator), torch.randint(0, 2, (500,), generator=generator)
    chosen = outputs.argmax(1)
    unions = [((chosen == c) & (labels == c)).sum() / ((chosen == c) | (labels == c)).sum() for c in (0, 1)]
    scores = judged(task, outputs, labels)
    assert scores.shape == (500,)
    assert scores.mean().item() == pytest.approx(float(sum(unions)) / 2, abs=1e-6)
    drawn = [torch.randint(0, 500, (500,), generator=generator) for _ in range(200)]
    again = torch.tensor([accuracy(task, outputs[rows], labels[rows]) for rows in drawn])
    assert torch.stack([scores[rows].mean() for rows in drawn]).std().item() == pytest.approx(
        again.std().item(), rel=0.05
    )
    none = torch.zeros(4, dtype=torch.long)
    assert judged(task, torch.tensor([[1.0, 0.0]]).expand(4, 2), none).tolist() == [1.0] * 4  # no sample of one class


AUC = """
    def score(self, outputs, labels):
        return torch.stack([outputs[:, 1] - outputs[:, 0], labels], 1)

    def metric(self, scores):
        from sklearn.metrics import roc_auc_score

        known = len(scores[:, 1].unique()) > 1
        return roc_auc_score(scores[:, 1], scores[:, 0]) if known else float("nan")
"""


def test_a_metric_of_ranks_is_one_too_and_groups_of_samples_are_left_out_in_turns(tmp_path: Path) -> None:
    task = user(tmp_path, USER_TASK[USER_TASK.index("    def score") :], AUC)
    check(task, task.model())  # whose samples are of one class: not known
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) // 1000
    outputs = torch.randn(2000, 2, generator=generator) + nn.functional.one_hot(labels, 2) / 2
    scores = judged(task, outputs, labels)
    above = (outputs[1000:].diff() > outputs[:1000].diff().T).float().mean().item()
    assert accuracy(task, outputs, labels) == pytest.approx(above, abs=1e-6)
    assert scores.mean().item() == pytest.approx(above, abs=1e-6)
    drawn = [torch.randint(0, 2000, (2000,), generator=generator) for _ in range(400)]
    again = torch.tensor([accuracy(task, outputs[rows], labels[rows]) for rows in drawn])
    spread = torch.stack([scores[rows].mean() for rows in drawn]).std().item()
    assert spread == pytest.approx(again.std().item(), rel=0.05)
    with pytest.raises(TaskFailure, match=r"`metric` must have a value for the 1000 samples of a split \(got NaN\)"):
        accuracy(task, outputs[:1000], labels[:1000])
    assert accuracy_of_part(task, outputs[:1000], labels[:1000]) is None
    assert judged(task, outputs[999:1003], labels[999:1003]).isfinite().all()  # one has its class for itself


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "cat([chosen & wanted, chosen | wanted], 1)",
            "ones(4)",
            r"`Mine.score` must return a tensor of shape \(4, K\)",
        ),
        (").float()\n\n", ").float() / 0\n\n", "`Mine.score` must return finite numbers"),
        (".nanmean()", "", "`Mine.metric` must return one number"),
        ("(both / either).nanmean()", "None", "`Mine.metric` must return one number"),
        (".nanmean()", ".nansum() + 2", "`Mine.metric` must return a value from 0 to 1, or have a unit in the spec"),
        ("both, either", "both, either, none", "`Mine.metric` raised ValueError"),
    ],
)
def test_what_a_metric_returns_wrongly_is_told(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(TaskFailure, match=complaint):
        use(measured(tmp_path, old, new))


def test_another_metric_may_have_any_finite_value(tmp_path: Path) -> None:
    task = user(tmp_path, "== labels).float()", "== labels).float() - 40", metric=TaskMetric(name="PSNR", unit="dB"))
    use(task)
    outputs, labels = torch.eye(2).repeat(3, 1), torch.tensor([0, 1, 0, 1, 0, 0])
    assert accuracy(task, outputs, labels) == pytest.approx(-40 + 5 / 6)
    with pytest.raises(TaskFailure, match=r"`Mine.score` must return values short of NaN and infinity \(got nan"):
        user(tmp_path, "== labels).float()", "== labels) * torch.nan", metric=TaskMetric(unit=None)).score(
            outputs, labels
        )


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [("%", 0.97123, "97.12"), ("dB", 31.4159, "31.416"), (None, -12345.6, "-12,345.600"), ("m", -1e-17, "0.000"),
     ("dB", -0.25, "-0.250")],
)  # fmt: skip
def test_values_of_a_metric_and_their_differences_have_as_many_decimals(
    unit: str | None, value: float, text: str
) -> None:
    assert TaskMetric(unit=unit).text(value) == text
    assert TaskMetric(unit=unit, decimals=9).text(value).startswith(text[:4])


@pytest.mark.parametrize("metric", [{"name": ""}, {"name": "<b>"}, {"unit": " m"}, {"name": "a|b"}, {"lower": True}])
def test_names_and_units_that_no_table_could_show_are_refused(metric: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Python.model_validate({"file": "a.py:B", "metric": metric})


def test_a_loss_of_outputs_that_are_not_finite_is_no_mistake_of_the_task(tmp_path: Path) -> None:
    loss = user(tmp_path).loss(torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.long))
    assert not torch.isfinite(loss)


class Splits:
    """Samples 0 to 999: of `train`, of `validation`, of `test`."""

    def __init__(self, **rows: range) -> None:
        self.rows = rows

    def samples(self, split: SplitName) -> Samples:
        rows = torch.tensor(self.rows[split])
        return Samples(torch.stack([rows, rows + 1], 1).float(), rows)


def test_small_splits_and_samples_in_two_of_them_are_told() -> None:
    apart = Splits(train=range(500), validation=range(500, 800), test=range(800, 1000))
    assert list(doubts(apart)) == []  # type: ignore[arg-type]
    close = Splits(train=range(500), validation=range(497, 897), test=range(700, 740))
    assert list(doubts(close)) == [  # type: ignore[arg-type]
        "`test` has 40 samples: each is 2.5 percentage points of the accuracy",
        "40 of the 40 samples of `test` are in `validation`, too",
    ]
    decibels = TaskMetric(name="PSNR", unit="dB")
    assert next(doubts(close, decibels)) == "`test` has 40 samples"  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["none.py:Mine", "folder/mine.py:Mine"])
def test_a_missing_task_file_is_refused(tmp_path: Path, file: str) -> None:
    with pytest.raises(DataError, match="there is no file"):
        Python(file=file).open(tmp_path)


@pytest.mark.parametrize("file", ["mine.py", "mine:Mine", "mine.py:1", ":Mine"])
def test_a_task_file_without_a_class_is_refused_when_the_spec_is_read(file: str) -> None:
    with pytest.raises(ValidationError, match="file"):
        Python(file=file)


def test_a_file_put_in_the_place_of_another_is_another_though_size_and_time_are_the_same(tmp_path: Path) -> None:
    data, config = tmp_path / "data.bin", Python(file="task.py:T", depends_on=("data.bin",))
    (tmp_path / "task.py").write_text("class T: ...")
    prints = []
    for content in (b"AAAA", b"BBBB"):
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", data)
        os.utime(data, ns=(10**9, 10**9))  # as archives and `touch` do
        prints.append(config.fingerprint(tmp_path))
    data.write_bytes(b"CCCC")
    os.utime(data, ns=(10**9, 10**9))
    assert len({*prints, config.fingerprint(tmp_path)}) == 3


def test_the_fingerprint_of_a_users_task_holds_code_arguments_and_named_files(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1")
    user(tmp_path)
    config = Python(file="mine.py:Mine", depends_on=("data.csv",))
    prints = [config.fingerprint(tmp_path), config.model_copy(update={"arguments": {"size": 4}}).fingerprint(tmp_path)]
    (tmp_path / "data.csv").write_text("2")
    prints.append(config.fingerprint(tmp_path))
    user(tmp_path, "class Mine", "# changed\nclass Mine")
    prints.append(config.fingerprint(tmp_path))
    assert len(set(prints)) == 4


def test_the_method_of_a_task_chooses_its_config() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTask)
    assert type(adapter.validate_python({"method": "python", "file": "a.py:B"})) is Python
    digits = {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": {"method": "digits"}}
    assert type(adapter.validate_python(digits)) is ImageClassification


def test_what_a_task_says_of_its_preprocessing_is_what_it_does(tmp_path: Path) -> None:
    config = ImageClassification.model_validate({"model": {"arch": "digits_cnn"}, "data": {"method": "digits"}})
    said = config.about(tmp_path)["preprocessing"]
    task = config.open(tmp_path)
    pixels = task.samples("test").inputs[:3]
    (mean,), (std,) = said["mean"], said["std"]
    torch.testing.assert_close(task.transform(pixels), (pixels.float() - mean) / std)


def test_numbers_of_tokens_are_refused_before_anything_is_spent() -> None:
    from networks import Noise

    class Tokens(Noise):
        def transform(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return inputs.long()

    with pytest.raises(TaskFailure, match=r"`transform`, .*, must give floating point: .* \(got torch\.int64\)"):
        check(Tokens(), Tokens().model())


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "nn.Linear(self.size, 2)",
            "nn.Linear(self.size, 2).double()",
            r"the model's parameters must be float32 \(`weight` is torch.float64\)",
        ),
        (
            "    def model(",
            "    def transform(self, x, generator=None):\n        return x.double()\n\n    def model(",
            r"`transform` must give float32 \(got torch.float64\)",
        ),
        (
            "    def model(",
            "    def transform(self, x, generator=None):\n        return x.mul_(2)\n\n    def model(",
            "must leave the samples as they are",
        ),
        ("nn.Linear(self.size, 2)", "nn.Sequential(nn.Threshold(2, 3, inplace=True), nn.Linear(3, 2))", "must leave"),
        (
            "nn.Linear(self.size, 2)",
            "nn.LSTM(self.size, 2)",
            r"the model's output `1.0` must be floating point, of shape \(4, ...\) for 4 samples "
            r"\(got torch.float32, \(1, 2\)\)",
        ),
    ],
    ids=["model", "transform", "written", "written by the model", "outputs"],
)
def test_a_model_and_its_samples_are_float32_and_stay_as_they_are(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    with pytest.raises(TaskFailure, match=complaint):
        use(user(tmp_path, old, new))


def test_a_sample_that_is_not_finite_is_told_by_its_place(tmp_path: Path) -> None:
    torch_ones = "torch.ones(6, self.size)"
    holes = f"torch.cat([torch.ones(700, 3), {torch_ones} / (0 if split == 'validation' else 1)])"
    task = user(tmp_path, f"{torch_ones}, torch.zeros(6,", f"{holes}, torch.zeros(706,")
    with pytest.raises(NotFinite, match=r"the inputs of `validation` must be finite \(sample 700 holds NaN"):
        use(task)


def test_samples_that_carry_a_gradient_are_taken_without(tmp_path: Path) -> None:
    task = user(tmp_path, "torch.ones(6, self.size)", "torch.ones(6, self.size, requires_grad=True)")
    use(task)
    assert not task.samples("train").inputs.requires_grad

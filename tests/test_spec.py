from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsweep.errors import SpecError
from qsweep.records import Metrics
from qsweep.spec import BOUNDED, Compression, Spec, TrialConfig, load_spec
from qsweep.yamlfile import read_mapping

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path for path in ROOT.glob("experiments/**/*.yaml") if not {"sweeps", "mlartifacts"} & set(path.parts)
)
SPEC: dict[str, Any] = {
    "name": "small",
    "task": {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": {"method": "digits"}},
    "compress": {"quantize": {"method": "ptq", "weight_bits": {"choice": [4, 8]}}},
    "target": {"engine": "onnxruntime"},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return re.sub(f"^`{path}`(, line [0-9]+)?: ", "", str(caught.value))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_experiment_validates(path: Path) -> None:
    load_spec(path)


def test_no_two_experiments_have_one_name() -> None:
    names = [load_spec(path).name for path in EXPERIMENTS]
    assert len(set(names)) == len(names)


def test_a_spec_survives_json(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, constraints={"accuracy_drop_pp": {"max": 1}}))
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("1.5d", 129600)]
)
def test_durations_are_seconds(tmp_path: Path, text: str, seconds: float) -> None:
    path = written(tmp_path, search={"timeout": yaml.safe_load(text)})
    assert load_spec(path).search.timeout == seconds


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_a_trial_has_a_name_that_decodes(method: str) -> None:
    compress = {
        "prune": {"method": "magnitude", "sparsity": 0.5},
        "distill": {"method": "logits", "temperature": 4.0},
        "quantize": {"method": method, "weight_bits": 4, "activation_bits": 8, "activation_scheme": "asymmetric"},
    }
    config = TrialConfig.model_validate({"compress": compress, "target": {"engine": "inductor"}})
    assert config.name == f"{method}-w4s-a8a-prune50-T4"
    assert TrialConfig.model_validate({"target": {"engine": "inductor"}}).name == "fp32"


def test_equal_trials_have_one_identity_and_others_have_others() -> None:
    def uid(**target: Any) -> str:
        return TrialConfig.model_validate({"target": {"engine": "inductor"} | target}).uid()

    assert uid() == uid(batch_size=1, threads=1)
    assert len({uid(), uid(batch_size=2), uid(threads=2), uid(engine="onnxruntime")}) == 4


def test_a_distillation_that_trains_nothing_counts_only_beside_a_training() -> None:
    def uid(method: str, temperature: float) -> str:
        distill = {"method": "logits", "epochs": 0, "temperature": temperature}
        return TrialConfig.model_validate(
            {"compress": {"distill": distill, "quantize": {"method": method}}, "target": {"engine": "inductor"}}
        ).uid()

    assert uid("ptq", 2) == uid("ptq", 8)
    assert uid("qat", 2) != uid("qat", 8)


def test_stages_come_in_their_order() -> None:
    compress = {"quantize": {"method": "qat"}, "distill": {"method": "logits"}, "prune": {"method": "magnitude"}}
    assert [stage.method for stage in Compression.model_validate(compress).stages()] == ["magnitude", "logits", "qat"]


KEYS = ", ".join(f"`{name}`" for name in Spec.model_fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": "x"}, f"`nmae`: did you mean `name`? There is no such key; there are {KEYS} (got 'x')"),
        ({"speed": "x"}, f"`speed`: there is no such key; there are {KEYS} (got 'x')"),
        ({"name": "a/b"}, "`name`: must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got 'a/b')"),
        ({"name": "store"}, "`name`: must not be `store`, the folder of results that sweeps share (got 'store')"),
        ({"name": 7}, "`name`: must be text (got 7)"),
        (
            {"task": {"method": "juggling"}},
            "`task.method`: must be one of 'image_classification', 'python' (got 'juggling')",
        ),
        (
            {"compress": {"quantise": None}},
            "`compress.quantise`: did you mean `quantize`? There is no such key; there are `prune`, `distill`, "
            "`quantize` (got None)",
        ),
        (
            {"compress": {"quantize": {"method": "ptq", "weight_bits": 9}}},
            "`compress.quantize.weight_bits`: must be 2 to 8, or 16 (got 9)",
        ),
        (
            {"compress": {"quantize": {"method": "ptq", "weight_bits": {"range": [1, 8]}}}},
            "`compress.quantize.weight_bits`: must be greater than or equal to 2 (got 1)",
        ),
        (
            {"compress": {"quantize": {"choice": []}}},
            "`compress.quantize.choice`: must be a list with at least one option (got [])",
        ),
        (
            {"compress": {"prune": {"method": "magnitude", "sparsity": 2}}},
            "`compress.prune.sparsity`: must be less than 1 (got 2)",
        ),
        (
            {"target": {"engine": "abacus"}},
            "`target.engine`: must be one of 'cuda', 'executorch', 'float', 'inductor', 'litert', 'onnxruntime', "
            "'openvino', 'reference' (got 'abacus')",
        ),
        (
            {"target": {"engine": "ONNX"}},
            "`target.engine`: did you mean `onnxruntime`? Must be one of 'cuda', 'executorch', 'float', 'inductor', "
            "'litert', 'onnxruntime', 'openvino', 'reference' (got 'ONNX')",
        ),
        (
            {"compress": {"quantize": {"method": "pqt"}}},
            "`compress.quantize.method`: did you mean `ptq`? Must be one of 'apot', 'cast', 'codebook', 'dorefa', "
            "'lsq', 'mixed', 'pact', 'ptq', 'qat' (got 'pqt')",
        ),
        ({"target": "float"}, "`target`: must be a mapping such as {engine: …} (got 'float')"),
        ({"task": "digits"}, "`task`: must be a mapping such as {method: …} (got 'digits')"),
        ({"target": {"batch_size": 1}}, "`target.engine`: is required and was not given"),
        (
            {"target": {"engine": "inductor", "threads": 0}},
            "`target.threads`: must be greater than or equal to 1 (got 0)",
        ),
        ({"objectives": []}, f"`objectives`: must be different metrics out of {sorted(Metrics.directions())} (got [])"),
        ({"objectives": "accuracy"}, "`objectives`: must be a list (got 'accuracy')"),
        (
            {"objectives": ["beauty"]},
            f"`objectives`: must be different metrics out of {sorted(Metrics.directions())} (got ['beauty'])",
        ),
        (
            {"objectives": ["accuracy", "latency"]},
            f"`objectives`: did you mean `latency_ms`? Must be different metrics out of {sorted(Metrics.directions())} "
            "(got ['accuracy', 'latency'])",
        ),
        ({"constraints": {"accuracy": {}}}, "`constraints.accuracy`: must have `max`, `min` or both (got {})"),
        (
            {"constraints": {"accuracy": {"max": 0.5, "min": 0.9}}},
            "`constraints.accuracy`: `min` must not be above `max` (got {'max': 0.5, 'min': 0.9})",
        ),
        (
            {"constraints": {"accuracy_drop_pp": 1}},
            "`constraints`: `accuracy_drop_pp` must have bounds, such as {max: 1} (got {'accuracy_drop_pp': 1})",
        ),
        (
            {"constraints": {"beauty": 1}},
            f"`constraints`: must name metrics out of {sorted(BOUNDED)} (got {{'beauty': 1}})",
        ),
        (
            {"compress": {"quantize": {"method": "ptq", "weight_bits": [4, 8]}}},
            "`compress.quantize.weight_bits`: must be an integer (got [4, 8]); several to choose from are written "
            "`{choice: [...]}`",
        ),
        (
            {"constraints": {"beauty": {"max": 1}}},
            f"`constraints`: must name metrics out of {sorted(BOUNDED)} (got {{'beauty': {{'max': 1}}}})",
        ),
        (
            {"constraints": {"size": {"max": 1}}},
            f"`constraints`: did you mean `size_bytes`? Must name metrics out of {sorted(BOUNDED)} "
            "(got {'size': {'max': 1}})",
        ),
        (
            {"constraints": {"accuracy": {"min": 90}}},
            "`constraints`: bounds of `accuracy`, a share, must be from 0 to 1 (0.9 is 90 %) "
            "(got {'accuracy': {'min': 90}})",
        ),
        ({"search": {"trials": 0}}, "`search.trials`: must be greater than or equal to 1 (got 0)"),
        (
            {"search": {"timeout": "soon"}},
            "`search.timeout`: must be seconds or a duration such as `30m` or `1h30m` (got 'soon')",
        ),
        ({"search": {"timeout": "0s"}}, "`search.timeout`: must be greater than 0 (got 0.0)"),
        (
            {"search": {"sampler": "tarot"}},
            "`search.sampler`: must be 'tpe', 'nsga2', 'gp', 'random' or 'grid' (got 'tarot')",
        ),
        ({"run": 3}, "`run`: must be a mapping (got 3)"),
        ({"search": {"seed": 2**32}}, "`search.seed`: must be less than 4294967296 (got 4294967296)"),
        (
            {"task": SPEC["task"] | {"data": {"method": "digits", "seed": 2**32}}},
            "`task.data.seed`: must be less than 4294967296 (got 4294967296)",
        ),
        ({"search": {"trials": "4"}}, "`search.trials`: must be an integer (got '4')"),
        ({"search": {"trials": True}}, "`search.trials`: must be an integer (got True)"),
        ({"search": {"trials": 4.0}}, "`search.trials`: must be an integer (got 4.0)"),
        ({"search": {"timeout": True}}, "`search.timeout`: must be a number (got True)"),
        (
            {"search": {"timeout": "90"}},
            "`search.timeout`: must be seconds or a duration such as `30m` or `1h30m` (got '90')",
        ),
        ({"measure": {"parity_top1": "0.9"}}, "`measure.parity_top1`: must be a number (got '0.9')"),
        (
            {"target": {"engine": "float", "compile": "yes"}},
            "`target.compile`: must be true or false (got 'yes')",
        ),
        ({"target": {"engine": "float", "compile": 1}}, "`target.compile`: must be true or false (got 1)"),
        ({"objectives": ["accuracy", 3]}, "`objectives.1`: must be text (got 3)"),
        ({"track": {"experiment": 7}}, "`track.experiment`: must be text (got 7)"),
        (
            {"constraints": {"accuracy": {"min": "0.9"}}},
            "`constraints.accuracy.min`: must be a number (got '0.9')",
        ),
        (
            {"baselines": [{"target": {"engine": "onnxruntime", "threads": "2"}}]},
            "`baselines.0.target.threads`: must be an integer (got '2')",
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_wrong_spec_is_refused_with_the_path_what_must_hold_and_what_came(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert refusal(written(tmp_path, **changes)) == message


def test_bounds_of_another_metric_are_in_its_unit(tmp_path: Path) -> None:
    metric = {"name": "PSNR", "unit": "dB"}
    content = SPEC | {"task": {"method": "python", "file": "task.py:Task", "metric": metric}}
    content |= {"constraints": {"accuracy": {"min": 30}, "accuracy_drop_pp": {"max": 0.2}}}
    assert Spec.model_validate(content).constraints["accuracy"].min == 30
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content | {"constraints": {"parity_top1": {"min": 30}}}), encoding="utf-8")
    assert "bounds of `parity_top1`, a share" in refusal(path)
    task = {"method": "python", "file": "task.py:Task", "metric": {"name": "PSNR"}}
    path.write_text(yaml.safe_dump(content | {"task": task}), encoding="utf-8")
    assert "(0.9 is 90 %; in a unit of its own with `task.metric.unit`)" in refusal(path)


@pytest.mark.parametrize("missing", ["name", "task", "compress", "target"])
def test_what_a_spec_cannot_do_without_is_asked_for(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in SPEC.items() if key != missing}), encoding="utf-8")
    assert refusal(path) == f"`{missing}`: is required and was not given"


CHOICES = """
    choice:
      - {method: ptq}
      - method: qat
        epochs: 4
        weight_bits:
          choice:
            - 4
            - {choice: [5, 6]}
            - BITS
        learning_rate: {range: [LOW, 1]}
        bits_schedule: [8, STEP]
      - {method: ptq, rounding: {choice: [nearest, {method: adaround, iterations: COUNT}]}}
      - {EMPTY}
"""


@pytest.mark.parametrize(
    ("wrong", "line", "place"),
    [
        ({"BITS": 99}, 13, "choice.1.weight_bits.choice.2"),
        ({"BITS": ".nan"}, 13, "choice.1.weight_bits.choice.2"),
        ({"BITS": []}, 13, "choice.1.weight_bits.choice.2"),
        ({"LOW": -1}, 14, "choice.1.learning_rate"),
        ({"LOW": 2}, 14, "choice.1.learning_rate.range"),
        ({"STEP": 1}, 15, "choice.1.bits_schedule.1"),
        ({"COUNT": 0}, 16, "choice.2.rounding.choice.1.iterations"),
        ({"method: qat": "mehtod: qat"}, 7, "choice.1.method"),
        ({"EMPTY": "method: mixed, epochs: 3"}, 17, "choice.3.epochs"),
        ({"EMPTY": "method: guess"}, 17, "choice.3.method"),
        ({"EMPTY": "method: mixed, average_bits: 1"}, 17, "choice.3.average_bits"),
    ],
)
def test_what_is_wrong_in_a_space_is_told_by_line_and_place(
    tmp_path: Path, wrong: dict[str, Any], line: int, place: str
) -> None:
    text, path = CHOICES, tmp_path / "spec.yaml"
    right = {"BITS": 8, "LOW": 0.1, "STEP": 6, "COUNT": 9, "EMPTY": "method: mixed"}
    for old, new in (right | wrong).items():
        text = text.replace(old, str(new))
    rest = yaml.safe_dump({key: value for key, value in SPEC.items() if key not in ("name", "compress")})
    path.write_text(f"name: lines\n\ncompress:\n  quantize:{text}{rest}")
    with pytest.raises(SpecError, match=re.escape(f"`{path}`, line {line}: `compress.quantize.{place}`: ")):
        load_spec(path)


@pytest.mark.parametrize("domain", ["choice: [5, 10]", "choice: 5", "range: [0, 1]"])
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("task.training.epochs", "task: {TASK, training: {epochs: {DOMAIN}}}"),
        ("task.model.arch", "task: {method: image_classification, model: {arch: {DOMAIN}}, data: {method: digits}}"),
        ("task", "task: {DOMAIN}"),
        ("search", "search: {DOMAIN}"),
        ("search.seed", "search: {seed: {DOMAIN}}"),
        ("baselines", "baselines: {DOMAIN}"),
        ("baselines.0.compress.quantize", "baselines: [{target: {engine: float}, compress: {quantize: {DOMAIN}}}]"),
    ],
)
def test_a_domain_outside_of_what_is_searched_is_refused_by_line_and_place(
    tmp_path: Path, place: str, text: str, domain: str
) -> None:
    task = "method: image_classification, model: {arch: digits_cnn}, data: {method: digits}"
    path, key = tmp_path / "spec.yaml", text.partition(":")[0]
    rest = yaml.safe_dump({name: value for name, value in SPEC.items() if name != key})
    path.write_text(f"{text}\n".replace("TASK", task).replace("DOMAIN", domain) + rest)
    with pytest.raises(SpecError, match=re.escape(f"`{path}`, line 1: `{place}`: must be one value; only those under")):
        load_spec(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a: 2020-01-01", "`task.arguments.a`: must be null, true, false, a number, text, a list or a mapping"),
        ("a: [1, {b: !!binary aGk=}]", "`task.arguments.a.1.b`: must be null, true, false, a number"),
        ("a: !!set {x, y}", "`task.arguments.a`: must be null, true, false, a number"),
        ("a: [.nan]", "`task.arguments.a.0`: must be a finite number (got nan)"),
        ("1: 2", "`task.arguments.1`: must be text (got 1)"),
        ("a: {choice: [2020-01-01]}", "`task.arguments.a.choice.0`: must be null, true, false, a number"),
        (r'a: "\ud800"', "must be YAML (half of a surrogate pair is no character)"),
        (r'{"\ud800": 1}', "must be YAML (half of a surrogate pair is no character)"),
    ],
)
def test_arguments_that_json_has_not_are_refused_by_line_and_place(tmp_path: Path, value: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    task = f"task:\n  method: python\n  file: task.py:Task\n  arguments:\n    {value}\n"
    path.write_text(task + yaml.safe_dump({key: rest for key, rest in SPEC.items() if key != "task"}))
    with pytest.raises(SpecError, match=re.escape(f"`{path}`, line 5: {said}")):
        load_spec(path)


def test_a_space_of_which_its_engine_can_run_nothing_is_refused_with_the_reasons(tmp_path: Path) -> None:
    said = refusal(written(tmp_path, target={"engine": "float"}))
    assert said.startswith("no config of `compress` can run on `target`: ")
    assert "integer kernels" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "must be YAML (while parsing a flow node"),
        ("name: a\nname: b\n", "must be YAML (the key `name` must stand once)"),
        ("- a\n", "must hold a mapping of keys to values (got list)"),
        ("", "must hold a mapping of keys to values (got NoneType)"),
        ("a: \x07\n", "must be YAML (unacceptable character"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(path) in str(caught.value)
    assert message.split("(")[0] in str(caught.value)
    assert message.split("(")[1].rstrip(")") in str(caught.value) or "while parsing" in message


@pytest.mark.parametrize("nested", ["{c: &b {<<: *a, w: 4}}", "[[[&b {<<: *a, w: 4}]]]"])
def test_what_merges_and_overrides_may_be_merged_again(tmp_path: Path, nested: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(f"a: &a {{m: ptq, w: 8}}\nb: {nested}\nd: {{<<: *b, w: 2}}\ne: [{{<<: *b}}]\n")
    found = read_mapping(path)
    assert (found["d"], found["e"]) == ({"m": "ptq", "w": 2}, [{"m": "ptq", "w": 4}])


def test_a_key_that_stands_twice_is_told_by_its_line_though_others_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: &a {m: ptq}\nb:\n  <<: *a\n  w: 1\n  w: 2\n")
    with pytest.raises(SpecError, match=r"line 5: must be YAML \(the key `w` must stand once\)"):
        read_mapping(path)


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path, said in (
        ("none.yaml", "there is no such file"),
        ("", "cannot be read as text"),
        ("bytes.yaml", "cannot be"),
    ):
        with pytest.raises(SpecError, match=said):
            load_spec(tmp_path / path)


def test_an_anchor_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | {"compress": 0}).replace("compress: 0", "compress: &all {quantize: *all}"))
    assert "must not contain itself" in refusal(path)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    rate = "{range: [1e-4, 1E-1], log: true}"
    compress = f"compress: {{quantize: {{method: qat, learning_rate: {rate}}}}}"
    path.write_text(yaml.safe_dump(SPEC | {"compress": 0}).replace("compress: 0", compress))
    (low, high) = (config.quantize.learning_rate for config in load_spec(path).compress.configs())  # type: ignore[union-attr]
    assert (low, high) == (1e-4, 1e-1)


def test_an_integer_is_a_number(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, measure={"parity_top1": 1}, constraints={"accuracy_drop_pp": {"max": 1}}))
    assert repr(spec.measure.parity_top1) == "1.0"
    assert repr(spec.constraints["accuracy_drop_pp"].max) == "1.0"


def test_to_simulate_counts_for_nothing_where_nothing_is_simulated() -> None:
    def uid(quantize: str | None, simulate: bool) -> str:
        compress = {"quantize": {"method": quantize}} if quantize else {}
        target = {"engine": "float", "simulate": simulate}
        return TrialConfig.model_validate({"compress": compress, "target": target}).uid()

    assert uid(None, True) == uid(None, False)
    assert uid("cast", True) == uid("cast", False)
    assert uid("ptq", True) != uid("ptq", False)

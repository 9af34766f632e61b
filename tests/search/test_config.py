"""A configuration comes from the command line or JSON, is checked at the door, and fills its presets."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from dssp.config import (
    PRESETS,
    SPACE_PRESETS,
    EvaluateConfig,
    ExportConfig,
    RetrainConfig,
    SearchConfig,
    parse_evaluate,
    parse_export,
    parse_retrain,
    parse_search,
)
from dssp.options import ConfigError
from dssp.search import retrain_config
from dssp.spaces import SPACES

SHARED = [
    "dataset",
    "data_path",
    "epochs",
    "batch_size",
    "channels",
    "cells",
    "seed",
    "device",
    "run_dir",
    "resume",
    "space",
    "benchmark",
]


def test_no_flags_is_a_complete_search_on_digits() -> None:
    config = parse_search([])
    assert config == SearchConfig()
    resolved = config.resolve()
    assert (resolved.dataset, resolved.method, resolved.space) == ("digits", "dssp", "darts")
    assert all(getattr(resolved, field) is not None for field in PRESETS["SearchConfig"])


@pytest.mark.parametrize("config", [SearchConfig, RetrainConfig])
def test_every_preset_belongs_to_a_field_that_may_be_left_out(config: type) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    presets = PRESETS[config.__name__], *SPACE_PRESETS[config.__name__].values()
    assert all(defaults[name] is None for names in presets for name in names)


def test_presets_depend_on_the_data_set_and_never_override_a_flag() -> None:
    assert parse_search(["--dataset", "cifar10"]).resolve().channels == PRESETS["SearchConfig"]["channels"][1]
    assert parse_search(["--dataset", "cifar10", "--channels", "5"]).resolve().channels == 5
    assert parse_search(["--retrain-epochs", "0"]).resolve().retrain_epochs == 0


def test_every_space_can_be_searched_and_has_the_nodes_of_its_preset() -> None:
    assert set(SPACE_PRESETS["SearchConfig"]) == set(SPACE_PRESETS["RetrainConfig"]) == set(SPACES)
    for name, space in SPACES.items():
        assert parse_search(["--space", name]).resolve().nodes == space.nodes


def test_presets_of_the_space_go_before_those_of_the_data_set() -> None:
    darts, nasbench = (SearchConfig(dataset="cifar10", space=name).resolve() for name in ("darts", "nasbench201"))
    assert (darts.cells, darts.retrain_cells, darts.max_edges_per_node) == (8, 20, 2)
    assert (nasbench.channels, nasbench.cells, nasbench.retrain_channels, nasbench.retrain_cells) == (16, 5, 16, 5)
    assert nasbench.max_edges_per_node == 3 and nasbench.alpha_lr == darts.alpha_lr
    assert SearchConfig(space="nasbench201", cells=1, channels=3).resolve().cells == 1
    retraining = RetrainConfig(genotype="g", dataset="cifar10", space="nasbench201").resolve()
    assert (retraining.channels, retraining.cells) == (16, 5)


@pytest.mark.parametrize(
    ("dataset", "space", "recipe"),
    [
        ("cifar10", "darts", (16, 0.4, 0.2)),
        ("cifar100", "darts", (16, 0.4, 0.2)),
        ("cifar10", "nasbench201", (0, 0.0, 0.0)),
        ("digits", "darts", (0, 0.0, 0.0)),
        ("imagefolder", "darts", (0, 0.0, 0.0)),
    ],
)
def test_recipe_of_darts_is_the_preset_of_its_space_on_cifar(dataset: str, space: str, recipe: object) -> None:
    resolved = RetrainConfig(genotype="g", dataset=dataset, space=space).resolve()  # type: ignore[arg-type]  # a word
    assert (resolved.cutout, resolved.auxiliary_weight, resolved.drop_path) == recipe
    assert (resolved.label_smoothing, resolved.ema_decay) == (0, 0)
    assert RetrainConfig(genotype="g", dataset="cifar10", space="darts", cutout=8, drop_path=0.0).resolve().cutout == 8
    after_search = retrain_config(SearchConfig(dataset=dataset, space=space).resolve(), "g")  # type: ignore[arg-type]  # a word
    assert (after_search.cutout, after_search.auxiliary_weight, after_search.drop_path) == recipe


def test_auxiliary_head_needs_a_space_that_has_one() -> None:
    with pytest.raises(ConfigError, match="auxiliary_weight: space nasbench201 has no auxiliary head, expected 0"):
        RetrainConfig(genotype="g", space="nasbench201", auxiliary_weight=0.4)


def test_resolving_twice_changes_nothing() -> None:
    resolved = SearchConfig(dataset="cifar100", epochs=7).resolve()
    assert resolved.resolve() == resolved


def test_warm_up_keeps_its_share_of_the_epochs() -> None:
    preset = {name: values[1] for name, values in PRESETS["SearchConfig"].items()}
    resolved = SearchConfig(dataset="cifar10", epochs=2 * preset["epochs"]).resolve()
    assert resolved.warmup_epochs == 2 * preset["warmup_epochs"]
    assert SearchConfig(epochs=1).resolve().warmup_epochs == 0
    half = SearchConfig(epochs=6).resolve()
    assert (half.warmup_epochs, half.path_epochs) == (
        1,
        4,
    )  # of 1 and 8 in 12: a started one counts
    assert SearchConfig(epochs=10, warmup_epochs=10).resolve().warmup_epochs == 10


def test_darts_prunes_nothing() -> None:
    assert parse_search(["--method", "darts"]).resolve().prune_strategy == "none"


def test_every_type_of_flag_arrives() -> None:
    argv = "--dataset imagefolder --data-path x --image-size 48 --lambda-prune 1e-4 --seed 3 --device cuda:1 --resume"
    config = parse_search(argv.split())
    assert (config.data_path, config.image_size, config.lambda_prune) == ("x", 48, 1e-4)
    assert (config.seed, config.device, config.resume) == (3, "cuda:1", True)


def test_retraining_takes_a_genotype() -> None:
    config = parse_retrain(["--genotype", "runs/x/genotype.json", "--lr", "0.1"])
    assert (config.genotype, config.lr) == ("runs/x/genotype.json", 0.1)
    assert config.resolve().cells == PRESETS["RetrainConfig"]["cells"][0]


@pytest.mark.parametrize("config", [SearchConfig(edge_budget=0.25), RetrainConfig(genotype="g", threads=2).resolve()])
def test_json_round_trip(config: SearchConfig | RetrainConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().seed = 1  # type: ignore[misc]  # on purpose


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--epochs 0", "--epochs"),
        ("--epochs ten", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--epochs 3 --warmup-epochs 4", "--warmup-epochs"),
        ("--warmup-epochs 40", "--warmup-epochs"),
        ("--seed -1", "--seed"),
        ("--lambda-prune nan", "--lambda-prune"),
        ("--weight-lr inf", "--weight-lr"),
        ("--alpha-lr -0.1", "--alpha-lr"),
        ("--edge-budget 1.5", "--edge-budget"),
        ("--dataset mnist", "--dataset"),
        ("--device tpu", "--device"),
        ("--prune-strategy sometimes", "--prune-strategy"),
        ("--offer-none --candidates-kept 1", "--candidates-kept"),
        ("--method darts --prune-strategy relative", "--prune-strategy"),
        ("--image-size 64", "--image-size"),
        ("--cells 2", "--cells"),
        ("--space nasbench201 --cells 0", "--cells"),
        ("--space nasbench201 --nodes 4", "--nodes"),
        ("--space nasbench", "--space"),
        ("--data-path", "--data-path"),
        ("--epoch 3", "--epoch"),
    ],
)
def test_bad_flag_ends_with_one_line_that_names_it(argv: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_search(argv.split())
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.count("\n") == 1 and flag in message


def test_missing_genotype_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_retrain([])
    assert re.search(r"required: --genotype", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, "epoch: unknown field"),
        ({"epochs": "3"}, "epochs: expected a whole number, got '3'"),
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"resume": 1}, "resume: expected true or false, got 1"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"prune_strategy": "x"}, "prune_strategy: expected one of measured"),
        ([], "configuration: expected an object, got list"),
    ],
)
def test_wrong_json_is_named(fields: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig.from_dict(fields)
    with pytest.raises(ValueError, match="genotype: missing"):
        RetrainConfig.from_dict({})


@pytest.mark.parametrize(
    ("parse", "config"),
    [
        (parse_search, SearchConfig),
        (parse_retrain, RetrainConfig),
        (parse_evaluate, EvaluateConfig),
        (parse_export, ExportConfig),
    ],
    ids=["search", "retrain", "evaluate", "export"],
)
def test_help_explains_every_flag_with_its_default(
    parse: object, config: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])  # type: ignore[operator]  # a function of the command line
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert exit_.value.code == 0
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')} " in text
        if isinstance(field.default, float):
            assert f"(default {field.default})" in text
        preset = PRESETS.get(config.__name__, {}).get(field.name)
        if preset and None not in preset:
            assert f"(digits {preset[0]}, others {preset[1]})" in text or f"(default {preset[0]})" in text
        for space, own in SPACE_PRESETS.get(config.__name__, {}).items():
            if None not in own.get(field.name, (None,)):
                digits, others = own[field.name]
                shown = f"digits {digits}, others {others}" if digits != others else f"default {digits}"
                assert f"({space}: {shown})" in text
    if config in (SearchConfig, RetrainConfig):
        assert set(SHARED) <= {field.name for field in dataclasses.fields(config)}


def test_whole_number_for_a_float_becomes_a_float() -> None:
    assert isinstance(SearchConfig(grad_clip=5).grad_clip, float)

"""What comes after a search, as a user runs it: the whole recipe, transfer, evaluation, export, and their misuse."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dssp import evaluate, export, retrain, search
from dssp.callbacks import MetricsLog
from dssp.chain_genotype import ChainGenotype
from dssp.derived.trained import load_trained
from dssp.engine import Engine
from dssp.genotype import save_genotype
from dssp.metrics import RunningMeans

SHAPE = ["--channels", "2", "--cells", "3", "--threads", "1"]
RECIPE = [
    *("--cutout", "8", "--auxiliary-weight", "0.4", "--drop-path", "0.3"),
    *("--label-smoothing", "0.1", "--ema-decay", "0.9"),
]
CELL = "[('sep_conv_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 0), ('dil_conv_3x3', 2)]"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """--threads holds for the whole process: put the number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genotype, and 24 training and 6 test images of 32x32 in two classes."""
    root = tmp_path_factory.mktemp("retraining")
    (root / "genotype.txt").write_text(
        f"Genotype(normal={CELL}, normal_concat=[2, 3], reduce={CELL}, reduce_concat=[2, 3])"
    )
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name, brightness in (("dark", 0), ("light", 100)):
            (root / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 150, (32, 32, 3)) + brightness
                Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / part / name / f"{i}.png")
    return root


def flags(folder: Path, run: Path) -> list[str]:
    data = ["--dataset", "imagefolder", "--data-path", str(folder / "images")]
    training = ["--genotype", str(folder / "genotype.txt"), "--epochs", "3", "--batch-size", "8"]
    return [*data, *training, *SHAPE, *RECIPE, "--run-dir", str(run)]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The run folder of an undisturbed retraining with everything switched on."""
    retrain.main(flags(folder, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a search on the digits that retrained."""
    run = tmp_path_factory.mktemp("search") / "run"
    sizes = ["--nodes", "2", "--batch-size", "256", "--epochs", "1", "--warmup-epochs", "0"]
    retraining = ["--retrain-channels", "2", "--retrain-epochs", "1"]
    search.main([*SHAPE, *sizes, *retraining, "--run-dir", str(run)])
    return run


def checkpoint(run: Path, epoch: int) -> Any:
    path = next((run / "checkpoints").glob(f"retrain-{epoch:05}-*.pt"))
    return torch.load(path, weights_only=True)["state"]["task"]


def summary(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


# ---- retraining ------------------------------------------------------------------------------------------------------


def test_interrupted_retraining_continues_bit_for_bit(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: MetricsLog, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if (epoch, step) == (1, 2):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
        patch.setattr(MetricsLog, "step_end", press_ctrl_c)
        retrain.main(flags(folder, tmp_path / "run"))
    assert not (tmp_path / "run" / "network.pt").exists()
    retrain.main([*flags(folder, tmp_path / "run"), "--resume"])
    for epoch in (2, 3):
        torch.testing.assert_close(checkpoint(tmp_path / "run", epoch), checkpoint(finished, epoch), rtol=0, atol=0)
    assert (tmp_path / "run" / "network.pt").read_bytes() == (finished / "network.pt").read_bytes()
    assert summary(tmp_path / "run")["test_accuracy"] == summary(finished)["test_accuracy"]


def test_what_is_kept_is_the_average_without_its_auxiliary_head(finished: Path) -> None:
    average, kept = checkpoint(finished, 3)["average"]["network"], load_trained(finished / "network.pt")
    names = {name for name in average if not name.startswith("auxiliary_head.")}
    assert len(names) < len(average)
    torch.testing.assert_close(kept.network.state_dict(), {name: average[name] for name in names}, rtol=0, atol=0)
    assert sum(parameter.numel() for parameter in kept.network.parameters()) == summary(finished)["parameters"]
    assert (kept.classes, kept.image_shape) == (("dark", "light"), (3, 32, 32))


def test_imagenet_stem_goes_from_training_to_test_and_export(folder: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "network.pt2"
    flags_ = [*flags(folder, run), "--stem", "imagenet", "--epochs", "1", "--auxiliary-weight", "0"]
    retrain.main(flags_)
    assert json.loads((run / "config.json").read_text())["config"]["stem"] == load_trained(run / "network.pt").stem
    evaluate.main(["--run-dir", str(run)])
    export.main(["--run-dir", str(run), "--format", "torch", "--out", str(out)])
    assert out.exists()


def test_chain_is_retrained_with_the_stages_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ChainGenotype((("mb_conv_3x3_e3", "none"), ("mb_conv_3x3_e3", "mb_conv_5x5_e3")))
    save_genotype(tmp_path / "chain.json", chain, space="chain", method="dssp", seed=0)
    flags_ = ["--genotype", str(tmp_path / "chain.json"), "--channels", "2", "--epochs", "0", "--threads", "1"]
    retrain.main([*flags_, "--run-dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["cells"] == 2
    with pytest.raises(SystemExit, match="--cells: the genotype has 2 stages, got 3"):
        retrain.main([*flags_, "--cells", "3", "--run-dir", str(tmp_path / "other")])


def test_genotype_of_one_data_set_retrains_on_another(searched: Path, tmp_path: Path) -> None:
    genotype = ["--genotype", str(searched / "genotype.json"), "--dataset", "fake", "--image-size", "8"]
    retrain.main([*genotype, *SHAPE, "--epochs", "1", "--batch-size", "256", "--run-dir", str(tmp_path / "run")])
    digits, fake = (load_trained(run / "network.pt") for run in (searched, tmp_path / "run"))
    assert digits.genotype == fake.genotype
    assert (digits.image_shape, fake.image_shape) == ((1, 8, 8), (3, 8, 8))
    assert summary(tmp_path / "run")["test_accuracy"] > 0


# ---- evaluation and export -------------------------------------------------------------------------------------------


def test_evaluation_says_what_the_retraining_said(
    finished: Path, searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, images, name in ((finished, 6, "imagefolder"), (searched, 360, "digits")):
        evaluate.main(["--run-dir", str(run), "--threads", "1"])
        accuracy = f"Test accuracy {summary(run)['test_accuracy']:.2%}, loss"
        output = capsys.readouterr().out
        assert output.startswith(accuracy) and output.endswith(f", on {images} images of {name}\n")


def test_another_data_set_is_normalised_as_the_network_learned(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, brightness in (("night", 0), ("sun", 255)):
        for i in range(5):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 40, 3), brightness, np.uint8)).save(path)
    evaluate.main(["--run-dir", str(finished), "--dataset", "imagefolder", "--data-path", str(tmp_path / "images")])
    output = capsys.readouterr().out
    kept = load_trained(finished / "network.pt")
    pixels = torch.tensor([0.0, 255.0])[:, None, None, None].expand(2, 3, 32, 32)
    logits = kept.network((pixels - kept.mean[:, None, None]) / kept.std[:, None, None])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert f"loss {loss:.4f}, on 2 images" in output
    assert "The classes have other names than those the network was trained on" in output


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_export_writes_a_checked_file(
    searched: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out = tmp_path / "network"
    export.main(["--run-dir", str(searched), "--format", format, "--out", str(out)])
    assert f"{out}: 0." in (said := capsys.readouterr().out) and "takes float32 [batch, 1, 8, 8]" in said
    assert "largest difference of a logit to the network " in said and out.stat().st_size > 0


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("retrain --genotype G --cutout 8", "--cutout: expected less than the 8 pixels of an image of digits, got 8"),
        ("retrain --genotype G --auxiliary-weight 0.4", "--auxiliary-weight: the auxiliary head needs 8x8 pixels"),
        ("retrain --genotype A --auxiliary-weight 0.4", "--auxiliary-weight: space nasbench201 has no auxiliary head"),
        ("retrain --genotype G --drop-path 1.5", "argument --drop-path: expected at most 1, got 1.5"),
        ("evaluate --run-dir nowhere", "nowhere/network.pt: no such file; a retraining writes it when it ends"),
        ("evaluate --run-dir R --dataset fake", "--dataset: the network takes images of 1x8x8"),
        ("evaluate --run-dir R --dataset imagefolder", "imagefolder: no folder given; pass --data-path"),
        ("evaluate --run-dir R --device cuda:99", "--device cuda:99: this machine has"),
        ("evaluate --run-dir R --device tpu", "argument --device: expected auto"),
        ("evaluate --run-dir bare", "bare/config.json: no configuration of a run"),
        ("evaluate --run-dir damaged", "damaged/network.pt: not the file of a trained network, or damaged"),
        ("export --run-dir damaged --format torch --out x", "damaged/network.pt: not the file of a trained network"),
        ("export --run-dir R --format torch --out no/x.pt2", "--out: no/x.pt2: No such file or directory"),
        ("export --run-dir R --format tflite --out x", "argument --format: invalid choice"),
        ("export --run-dir R --format torch", "required: --out"),
    ],
)
def test_misuse_is_one_line(
    arguments: str,
    said: str,
    folder: Path,
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch.txt").write_text("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")
    content = (searched / "network.pt").read_bytes()
    for name, damaged in (("damaged", content[:-9]), ("bare", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.pt").write_bytes(damaged)
    names = {"G": str(folder / "genotype.txt"), "A": "arch.txt", "R": str(searched)}
    command, *rest = [names.get(word, word) for word in arguments.split()]
    extra = ["--run-dir", "run"] if command == "retrain" else []
    with pytest.raises(SystemExit) as exit_:
        {"retrain": retrain, "evaluate": evaluate, "export": export}[command].main([*rest, *extra])
    line = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    assert said in line and line.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()

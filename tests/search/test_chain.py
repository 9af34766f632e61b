"""The chain space: layers add to a stream, leave one by one, and what is derived is what the supernet ran."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dssp.chain_genotype import OPERATIONS, ChainGenotype
from dssp.config import ConfigError, RetrainConfig, SearchConfig
from dssp.derived.derivation import derive
from dssp.genotype import genotype_from_dict, load_with_space, save_genotype, with_shortcuts
from dssp.methods import METHODS
from dssp.network import DerivedNetwork
from dssp.paths.space import PathSpace
from dssp.pruning.edges import GateTable, Pruner, PruningRules
from dssp.relaxation import Mixture, normalised_gates
from dssp.report import write_report
from dssp.spaces import CHAIN
from dssp.spaces.chain import InvertedBottleneck
from dssp.supernet import Supernet
from dssp_kernels.folding import Parts, parts_of
from tests.search.small import small_search
from tests.search.test_methods import run
from tests.search.test_skipped_steps import assert_unchanged

MASKED = replace(CHAIN, operations=OPERATIONS[1:])  # masks say what `none` says
SMALL = ChainGenotype((("mb_conv_3x3_e3", "none", "mb_conv_5x5_e6"), ("mb_conv_7x7_e3", "mb_conv_3x3_e6")))


def supernet(space: Any = MASKED, **options: Any) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(space, channels=2, cells=2, classes=3, **options)
    for parameter in net.architecture_parameters():
        nn.init.normal_(parameter)
    return net.double()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mixed(net: Supernet, x: Tensor, stage: int, layer: int, weights: Tensor) -> Tensor:
    """The mixture of a layer, candidate by candidate."""
    (edge,) = net.mixed_edges(f"stage{stage}:{layer - 1}->{layer}")
    outputs = [w * op(x) for w, op in zip(weights, edge._ops, strict=True)]
    return torch.stack(outputs).sum(0)


def test_first_layer_of_a_stage_replaces_the_stream_and_the_others_add_to_it() -> None:
    net = supernet()
    x = net.get_submodule("stem")(images())
    for stage in (1, 2):
        weights = net.mixture(f"stage{stage}").weights
        x = mixed(net, x, stage, 1, weights[0])
        for layer in (2, 3):
            x = x + mixed(net, x, stage, layer, weights[layer - 1])
    torch.testing.assert_close(net(images()), net.classify(x))


def test_widths_and_strides_are_those_of_mobilenet_v2() -> None:
    genotype = ChainGenotype((("mb_conv_3x3_e6",),) * 6)
    shapes: list[tuple[int, ...]] = []
    with torch.device("meta"):
        network = DerivedNetwork(CHAIN, genotype, channels=16, cells=6, classes=1000, stem="imagenet")
        for stage in network.cells:
            stage.register_forward_hook(lambda module, inputs, y: shapes.append((y.shape[1], *y.shape[2:])))
        network.eval()(torch.empty(1, 3, 224, 224))
    assert shapes == [(24, 56, 56), (32, 28, 28), (64, 14, 14), (96, 14, 14), (160, 7, 7), (320, 7, 7)]


def test_every_candidate_leaves_its_last_norm_to_the_mix() -> None:
    for edge in supernet().edges():
        for op in supernet().mixed_edges(edge)[0]._ops:
            assert isinstance(op, InvertedBottleneck) and isinstance(parts_of(op), Parts)


def test_removed_edge_removes_the_layer_and_runs_nothing() -> None:
    net = supernet()
    with torch.no_grad():
        net.mask["stage1"][1] = -torch.inf
        without = net(images())
        net.remove_edge("stage1:1->2")
        torch.testing.assert_close(net(images()), without)
    assert not list(net.mixed_edges("stage1:1->2")[0].parameters())


def test_common_scale_of_a_stages_gates_is_invisible_and_a_single_one_is_not() -> None:
    """Why gates are normalised over the stage (CellSpace.gate_groups); epsilon is what keeps it from being exact."""
    net = supernet()
    weights = net.mixture("stage1").weights
    others = {"stage2": net.mixture("stage2")}

    def logits(scale: Tensor) -> Tensor:
        return net(images(), {"stage1": Mixture(weights * scale.unsqueeze(1)), **others})

    ones, one = torch.ones(3), torch.tensor([1.0, 1.0, 0.5])
    torch.testing.assert_close(logits(0.5 * ones), logits(ones), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(logits(one), logits(ones), rtol=1e-2, atol=1e-2)


def test_gates_are_normalised_over_the_live_layers_of_their_stage() -> None:
    net = supernet()
    net.remove_edge("stage1:2->3")
    live = net.mask["stage1"].detach().sigmoid()[:2]
    expected = [*(live / live.mean()).tolist(), 0.0]
    assert GateTable.of(net).scores[:3] == pytest.approx(expected)
    groups = torch.tensor(MASKED.gate_groups)
    assert normalised_gates(net.mask["stage1"], net.active("stage1"), groups).tolist() == pytest.approx(expected)


def test_pruning_takes_all_layers_but_the_first_of_each_stage() -> None:
    net = supernet()
    rules = PruningRules("budget", 0.5, 1, edge_budget=0.0, warmup_epochs=0, last_epoch=0, every=1)
    left = Pruner(net, rules, lambda: torch.zeros(1)).end_epoch(0, 1)
    assert len(left) == 4 and net.live_edges() == ["stage1:0->1", "stage2:0->1"]
    assert net(images()).isfinite().all()
    assert [layers[1:] for layers in derive(net, max_edges_per_node=1).stages] == [("none", "none")] * 2


def test_none_is_offered_where_a_shortcut_is_and_nowhere_else() -> None:
    net = supernet(CHAIN, gated=False)
    assert net.offered("stage1")[:, 0].tolist() == [False, True, True]
    with torch.no_grad():
        net.alpha["stage1"][:, 0] = 50.0
    genotype = derive(net, max_edges_per_node=1)
    assert genotype.stages[0][0] != "none" and genotype.stages[0][1:] == ("none", "none")
    drawn = PathSpace(net, 1).genotype(PathSpace(net, 1).draw(torch.Generator()))
    assert isinstance(drawn, ChainGenotype)


def test_derived_network_computes_what_the_path_does_in_the_supernet() -> None:
    net = supernet(CHAIN, gated=False)
    paths = PathSpace(net, 1)
    path = (1, 0, 5, 3, 4, 0)
    network = DerivedNetwork(CHAIN, paths.genotype(path), channels=2, cells=2, classes=3).double()
    state = net.state_dict()
    for name in network.state_dict():  # norms of the supernet have no parameters; fresh affine ones do nothing
        stage, edge, rest = name.split(".")[1], name.split(".")[3:4], name.split(".")[4:]
        if name.startswith("cells."):
            live = [i for i in range(3) if path[3 * int(stage) + i]]
            position = live[int(edge[0])]
            source = f"cells.{stage}._ops.{position}._ops.{path[3 * int(stage) + position]}.{'.'.join(rest)}"
        else:
            source = name
        if source in state:
            network.state_dict()[name].copy_(state[source])
    torch.testing.assert_close(network(images()), net(images(), paths.mixtures(path)))


def test_drop_path_leaves_layers_out_and_never_the_first_of_a_stage() -> None:
    network = DerivedNetwork(CHAIN, SMALL, channels=2, cells=2, classes=3)
    only_first = ChainGenotype((SMALL.stages[0][:1] + ("none",) * 2, (*SMALL.stages[1][:1], "none")))
    shallow = DerivedNetwork(CHAIN, only_first, channels=2, cells=2, classes=3)
    shared = {name: value for name, value in network.state_dict().items() if name in shallow.state_dict()}
    shallow.load_state_dict(shared)
    network.drop_path.probability = 1 - 1e-9  # almost surely all that can go
    torch.testing.assert_close(network(images().float()), shallow(images().float()))


def test_genotype_survives_json_and_its_file(tmp_path: Path) -> None:
    assert genotype_from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    path = tmp_path / "genotype.json"
    save_genotype(path, SMALL, space="chain", method="dssp", seed=0)
    assert load_with_space(path) == ("chain", SMALL)
    assert "mb_conv_3x3_e3 + none" in json.loads(path.read_text())["text"]
    assert with_shortcuts(SMALL)["stage1"][0][1] == (("skip_connect", 1),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stages": []}, "stages: expected 1 to 6"),
        ({"stages": [["mb_conv_3x3_e3"]] * 7}, "stages: expected 1 to 6"),
        ({"stages": [[]]}, "stage 1: expected at least one layer"),
        ({"stages": [["none"]]}, "stage 1, layer 1: got 'none'"),
        ({"stages": [["mb_conv_3x3_e3", "sep_conv_3x3"]]}, "stage 1, layer 2: got 'sep_conv_3x3'"),
        ({"stages": [["mb_conv_3x3_e3", {}]]}, "stage 1, layer 2: got {}"),
        ({"stages": "mb_conv_3x3_e3"}, "stages: expected a list, got str"),
        ({"stages": [3]}, "stage 1: expected at least one layer, got 3"),
    ],
)
def test_wrong_genotype_is_refused_with_its_place(fields: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        genotype_from_dict(fields)


def test_network_of_another_number_of_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="space chain has cells stage1 and stage2 and stage3, got stage1 and stage2"):
        DerivedNetwork(CHAIN, SMALL, channels=2, cells=3, classes=3)
    with pytest.raises(ValueError, match="up to 6 stages, got 7"):
        Supernet(CHAIN, channels=2, cells=7, classes=3)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"cells": 7}, "cells"),
        ({"method": "pc-darts"}, "method"),
        ({"max_skips": 1, "method": "darts"}, "max_skips"),
        ({"cells": 3, "retrain_cells": 4}, "retrain_cells"),
    ],
)
def test_what_a_chain_cannot_be_is_refused_by_name(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SearchConfig(space="chain", **settings).resolve()
    assert caught.value.field == field


def test_retraining_takes_the_stages_of_the_search() -> None:
    assert SearchConfig(space="chain", cells=2).resolve().retrain_cells == 2
    with pytest.raises(ConfigError, match="no auxiliary head"):
        RetrainConfig(genotype="-", space="chain", auxiliary_weight=0.4)


SETTINGS: dict[str, Any] = {
    **{"space": "chain", "cells": 2, "nodes": 2, "epochs": 3, "held_out": 8, "compared_images": 8, "scored_paths": 4},
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pc-darts"])
def test_every_method_ends_in_a_chain_and_continues_to_the_same_bits(method: str) -> None:
    whole = small_search(method=method, **SETTINGS)
    rows = run(whole, 0, 3)
    first = small_search(method=method, **SETTINGS)
    run(first, 0, 2)
    resumed = small_search(method=method, **SETTINGS)
    resumed.load_state_dict(first.state_dict())
    assert run(resumed, 2, 3) == rows[2:]
    assert_unchanged(resumed.state_dict(), whole.state_dict())
    assert isinstance(whole.derived(), ChainGenotype) and resumed.derived() == whole.derived()


def test_report_draws_a_stage_as_a_chain(tmp_path: Path) -> None:
    edges = {"stage1": ["0->1", "1->2", "2->3"], "stage2": ["0->1", "1->2"]}
    config = {"config": {"method": "dssp", "space": "chain"}, "edges": edges, "operations": list(OPERATIONS[1:])}
    row = {"epoch": 0, "alpha": {type: [[0.2] * 5 + [0.0]] * len(names) for type, names in edges.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    save_genotype(tmp_path / "genotype.json", SMALL, space="chain", method="dssp", seed=0)
    page = write_report(tmp_path).read_text()
    assert "Derived stage1" in page and "Searched stage2 cell" in page
    assert page.count("skip_connect</text>") == 3  # a shortcut beside every layer but the first of each stage

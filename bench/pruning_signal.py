"""How much do gates know? A search without pruning; then every edge is masked in turn on images nobody trained on.

For each seed it prints the common shift of the gates (what the penalty and Adam do to all of them alike), their spread
inside a node, and Spearman's rank correlation with the true loss increase on the test images of
- the raw gate sigmoid(m), the normalised gate (dssp.pruning.edges), and
- the loss increase measured on the 256 held-out validation images that the strategy `measured` looks at.

    python bench/pruning_signal.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the packages, where they are not installed
from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import load_data
from dssp.engine import Engine
from dssp.pruning.edges import GateTable
from dssp.pruning.held_out import edge_effects, held_out_losses
from dssp.search import build_supernet


def signal(seed: int, **settings: Any) -> dict[str, Any]:
    """One search on the digits; shift, spread and correlations over its edges."""
    config = SearchConfig(seed=seed, method="dssp-paper", prune_strategy="none", **settings).resolve()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = torch.device("cpu")
    data = load_data("digits", data_path=None, image_size=None, seed=seed, device=device, workers=1)
    supernet = build_supernet(config, data, device)
    search = BilevelSearch(config, supernet, data)
    Engine(search, []).fit()

    table = GateTable.of(supernet)
    images, labels = next(data.test.batches(len(data.test), epoch=0, seed=seed, train=False))
    truth, held_out = (
        [
            float(e.mean())
            for e in edge_effects(supernet, table.names, partial(held_out_losses, supernet, supernet, *part))
        ]
        for part in ((images, labels), search.held_out)
    )
    gates = torch.tensor(table.gates)
    start = torch.sigmoid(torch.tensor(1.0))
    return {
        "seed": seed,
        "common_shift": float(gates.mean() - start),
        "spread": float(torch.tensor(table.scores).std()),
        "raw_gate": float(spearmanr(table.gates, truth).statistic),
        "normalised_gate": float(spearmanr(table.scores, truth).statistic),
        "measured": float(spearmanr(held_out, truth).statistic),
    }


def main() -> None:
    """Run the seeds and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lambda-prune", type=float, default=0.01)
    parser.add_argument("--mask-lr", type=float, default=None, help="default: the preset of digits")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        settings = {"epochs": arguments.epochs, "lambda_prune": arguments.lambda_prune, "mask_lr": arguments.mask_lr}
        rows.append(signal(seed, **settings))
        print("  ".join(f"{key} {value:+.2f}" if key != "seed" else f"seed {value}" for key, value in rows[-1].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Breaks one formula after the other in a copy of the project and sees that a test fails: python -m tests.mutations

A mutation that no test notices survives: then a test is missing. What caught each one is written to docs/mutations.md.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.source_trees import ROOT, build_extension, copy_of_project, pytest_in

PACKAGE = "dssp_kernels"
TABLE = ROOT / "docs" / "mutations.md"
HEADER = """# Mutations

Each row is a formula that was broken in a copy of the project, and the test that failed. `make mutations` repeats
all of it, `python -m tests.mutations --only NAME ...` some of it, and both write this table. A control run of the same
tests on the unbroken copy, compiled the same way, passes before anything is broken.

| mutation | in | instead of | stands | caught by |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Mutation:
    """`replacement` in place of `text`, which occurs once in `file`; one of `tests`, a file under tests/, must fail."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str

    @property
    def operators(self) -> tuple[str, ...]:
        """Whose C++ kernels are to be compiled anew: the tested operator's, and those its tests compare it with."""
        if not self.file.endswith((".cpp", ".h")):
            return ()
        rooms = [path.parent.name for path in (ROOT / PACKAGE).glob("*/cpu.cpp")]
        tested = [room for room in rooms if Path(self.tests).stem.startswith(f"test_{room}")]
        room = max(tested, key=len)
        return ("mixed_sum", room) if room == "batch_norm_mixed_sum" else (room,)

    def row(self, caught_by: str) -> str:
        code = [f"`{part}`".replace("|", "\\|") for part in (self.file, self.text, self.replacement)]
        return f"| {self.name} | {' | '.join(code)} | {caught_by} |"


def of_formulas(file: str, tests: str, *formulas: tuple[str, str, str]) -> list[Mutation]:
    """(name, text, replacement) each."""
    return [Mutation(name, file, text, replacement, tests) for name, text, replacement in formulas]


MUTATIONS = [
    # ---- kernels in C++
    *of_formulas(
        "dssp_kernels/cpu_mixture.h",
        "kernels/test_mixed_sum.py",
        ("mix-cpu-softmax", "(dots[i] - mean)", "dots[i]"),
        ("mix-cpu-mask", "gates[e] * (1.0 - gates[e]) * mean", "gates[e] * mean"),
    ),
    *of_formulas(
        "dssp_kernels/mixed_sum/cpu.cpp",
        "kernels/test_mixed_sum.py",
        (
            "mix-cpu-weight-step",
            "scale_loop(g + begin, entry.coefficient,",
            "scale_loop(g + begin, -entry.coefficient,",
        ),
        ("mix-cpu-dot", "sum_of_lanes((a + b) + (c + d))", "sum_of_lanes(a + b + c)"),
    ),
    *of_formulas(
        "dssp_kernels/batch_norm_mixed_sum/cpu.cpp",
        "kernels/test_batch_norm_mixed_sum.py",
        ("norm-cpu-slope", "slope[c] = -scale[c] *", "slope[c] = scale[c] *"),
        ("norm-cpu-mean", "constant[c] = -scale[c] * sums.grad[c] / count - slope", "constant[c] = -slope"),
        ("norm-cpu-bias", "of.weight[c] * product + of.bias[c] * sums.grad[c]", "of.weight[c] * product"),
        ("norm-cpu-large-mean", "sums.products[i][c] -= rounding_error", "sums.products[i][c] += rounding_error"),
        ("norm-cpu-first-range", "if (sum_grad) sums.grad = column(0);", "sums.grad = column(0);"),
    ),
    *of_formulas(
        "dssp_kernels/batch_norm_mixed_sum/cpu_loops.h",
        "kernels/test_batch_norm_mixed_sum.py",
        ("norm-cpu-rounds", "sums[u] += more[r][u];", "sums[u] += more[0][u];"),
        ("norm-cpu-next-entries", "if (kAdd) sums[u] += L::load(y + four.offset(u));", ""),
        ("norm-cpu-one-constant", "zeros = constant + walk.lanes;", "zeros = constant;"),
    ),
    *of_formulas(
        "dssp_kernels/depthwise_conv/cpu_rows.h",
        "kernels/test_depthwise_conv.py",
        ("depthwise-cpu-relu", "== 0 ? V{} : sums[j]", "== 0 ? sums[j] : sums[j]"),
        ("depthwise-cpu-input", "-step * axis.dilation / axis.stride}", "0}"),
        ("depthwise-cpu-weight", "sums[r][t] += g *", "sums[r][t] -= g *"),
    ),
    *of_formulas(
        "dssp_kernels/depthwise_conv/cpu_bands.h",
        "kernels/test_depthwise_conv.py",
        ("depthwise-cpu-copies", "copy < kWeightCopies", "copy < kWeightCopies - 1"),
        ("depthwise-cpu-last-row", "for (; next < out_end; ++next)", "for (; next < out_end - 1; ++next)"),
    ),
    *of_formulas(
        "dssp_kernels/cpu_products.h",
        "kernels/test_separable_conv.py",
        ("separable-cpu-pointwise", "sums[i][k] += value * x[k]", "sums[i][k] -= value * x[k]"),
    ),
    *of_formulas(
        "dssp_kernels/separable_conv/cpu_sweeps.h",
        "kernels/test_separable_conv.py",
        ("separable-cpu-recompute", "depthwise.compute(x, taps);", ""),
    ),
    *of_formulas(
        "dssp_kernels/separable_conv/cpu.cpp",
        "kernels/test_separable_conv_group.py",
        ("separable-cpu-group-adds", "d_x, !stage.empty(), false,", "d_x, false, false,"),
    ),
    *of_formulas(
        "dssp_kernels/separable_conv/cpu.cpp",
        "kernels/test_separable_conv_pairs.py",
        ("pair-cpu-constant", "constant[c] = static_cast<S>(sums.total(0, c) / count);", ""),
        ("pair-cpu-slope", "/ count * batch_norm.scale[c]);", "/ count);"),
    ),
    *of_formulas(
        "dssp_kernels/cpu_statistics.h",
        "kernels/test_separable_conv_pairs.py",
        ("statistics-between-parts", "(within * within - between * between)", "(within * within)"),
        ("statistics-unbiased", "variance * count / (count - 1)", "variance"),
        ("statistics-shift", "shift[lane] = std::isfinite(mean) ? mean : S(0);", "shift[lane] = S(0);"),
    ),
    *of_formulas(
        "dssp_kernels/depthwise_conv/cpu_transfers.h",
        "kernels/test_separable_conv_pairs.py",
        ("transfers-norm", "(value - mean) * scale;", "value * scale;"),
        ("transfers-gradient", "(grad - constant - (at(j) - mean) * slope) * scale", "(grad - constant) * scale"),
    ),
    *of_formulas(
        "dssp_kernels/pointwise_batch_norm/cpu.cpp",
        "kernels/test_pointwise_batch_norm.py",
        ("pointwise-cpu-mask", "== 0 ? typename Lanes<S>::Vector{} : value", "== 0 ? value : value"),
        ("pointwise-cpu-slope", "slopes[c] = static_cast<S>(sums.total(1, c) / count_of_all);", ""),
        ("pointwise-cpu-rest", "std::min(kPixels, last - pixel)", "std::min(kPixels, (last - pixel) / 8 * 8)"),
    ),
    *of_formulas(
        "dssp_kernels/cpu_norms.h",
        "kernels/test_pool_batch_norm.py",
        ("norm-row-slope", "at(vector, j), (grad - constant - y * slope)", "at(vector, j), (grad - constant)"),
    ),
    *of_formulas(
        "dssp_kernels/pool_batch_norm/cpu_windows.h",
        "kernels/test_pool_batch_norm.py",
        ("pool-cpu-first", "(value > best[i])", "(value >= best[i])"),
        ("pool-strip-first", "(is_above & (right.value == left.value))", "(right.value == left.value)"),
        ("pool-strip-sum", "(left + middle + right) * share", "(left + middle) * share"),
        ("pool-cpu-share", "counts_padding ? taps : row_count * columns_inside", "taps"),
    ),
    *of_formulas(
        "dssp_kernels/pool_batch_norm/cpu_windows.h",
        "kernels/test_parameter_free_sums.py",
        ("pool-cpu-nan", "(value > best[i]) | (value != value)", "(value > best[i])"),
        ("pool-strip-nan", "((right.value != right.value) &", "((right.value < right.value) &"),
        ("pool-strip-order", "~(is_above & (left.value != left.value))", "~(is_above & (left.value < left.value))"),
    ),
    *of_formulas(
        "dssp_kernels/pool_batch_norm/cpu_pools.h",
        "kernels/test_pool_batch_norm.py",
        ("pool-cpu-shift", "means[lane] = std::isfinite(mean) ? mean : S(0);", "means[lane] = S(0);"),
    ),
    *of_formulas(
        "dssp_kernels/parameter_free_sums/cpu.cpp",
        "kernels/test_parameter_free_sums.py",
        ("sums-cpu-constant", "constant += work.weight(j, k) * sums[j].sum(c);", ""),
        ("sums-cpu-slope", "slope += work.weight(j, k) * sums[j].product(k, c);", ""),
        ("sums-cpu-missing", "if (work.taken(j, k)) combination", "combination"),
        ("sums-cpu-at-once", "(value + value / kAtOnce + 1) * lanes", "(value + 1) * lanes"),
    ),
    # ---- kernels in Triton, interpreted
    *of_formulas(
        "dssp_kernels/mixed_sum/triton_kernels.py",
        "kernels/test_triton_mixed_sum.py",
        ("mix-triton-softmax", "w * (d - mean) if SOFTMAX", "w * d if SOFTMAX"),
        ("mix-triton-mask", "gate * (1.0 - gate) * mean", "gate * mean"),
        ("mix-triton-input", "(factors[i] * g)", "(-factors[i] * g)"),
    ),
    *of_formulas(
        "dssp_kernels/batch_norm_mixed_sum/triton_kernels.py",
        "kernels/test_triton_batch_norm_mixed_sum.py",
        ("norm-triton-slope", "slope = -scale * inverse", "slope = scale * inverse"),
        ("norm-triton-mean", "shift = -scale * total / count - slope", "shift = -slope"),
        (
            "norm-triton-bias",
            "weight * product + _per_channel(biases, BIASES, entry, channel, exists, 0.0) * total",
            "weight * product",
        ),
    ),
    *of_formulas(
        "dssp_kernels/depthwise_conv/triton_kernels.py",
        "kernels/test_triton_depthwise_conv.py",
        ("depthwise-triton-relu", "inputs[t].to(ACC) <= 0.0", "inputs[t].to(ACC) < 0.0"),
        ("depthwise-triton-input", "-DH,", "DH,"),
        ("depthwise-triton-weight", "sums[PLACE + i] + grads", "sums[PLACE + i] - grads"),
    ),
    # ---- the oracles, and second derivatives
    *of_formulas(
        "dssp_kernels/mixed_sum/reference.py",
        "kernels/test_mixed_sum.py",
        ("mix-reference-gate", "mask.to(coefficients.dtype).sigmoid()", "mask.to(coefficients.dtype)"),
    ),
    *of_formulas(
        "dssp_kernels/mixed_sum/op.py",
        "kernels/test_mixed_sum.py",
        (
            "mix-second-derivative",
            "mixed_sum_reference(inputs[3:], cast(Tensor, inputs[0]), inputs[1],",
            "mixed_sum_reference(inputs[3:], cast(Tensor, inputs[0]).detach().requires_grad_(), inputs[1],",
        ),
    ),
    *of_formulas(
        "dssp_kernels/batch_norm_mixed_sum/reference.py",
        "kernels/test_batch_norm_mixed_sum.py",
        ("norm-reference-variance", "correction=0", "correction=1"),
        ("norm-reference-running", "variance[entry] * (count / max(count - 1, 1))", "variance[entry]"),
    ),
    *of_formulas(
        "dssp_kernels/depthwise_conv/reference.py",
        "kernels/test_depthwise_conv.py",
        ("depthwise-reference-relu", "F.relu(x) if relu else x, w", "x, w"),
    ),
    *of_formulas(
        "dssp_kernels/separable_conv/reference.py",
        "kernels/test_separable_conv.py",
        ("separable-reference-relu", "dilation, relu), p", "dilation, False), p"),
    ),
    *of_formulas(
        "dssp_kernels/separable_conv/op.py",
        "kernels/test_separable_conv_group.py",
        ("separable-group-unused", "need and grad is not None for need", "need for need"),
    ),
    # ---- the search
    *of_formulas(
        "dssp/architect.py",
        "search/test_architect.py",
        ("architect-penalty", "loss + self.method.penalty()", "loss"),
    ),
    *of_formulas(
        "dssp/steps/hypergradient.py",
        "search/test_hypergradient.py",
        ("hypergradient-sign", "d - rate * product", "d + rate * product"),
        ("hypergradient-exact", "architecture, directions)", "architecture, [-d for d in directions])"),
        ("hypergradient-difference", "/ (2 * distance) for", "/ distance for"),
        ("hypergradient-momentum", 'velocities[i] + group["momentum"] * buffer', "velocities[i]"),
        ("hypergradient-decay", 'alpha=group["weight_decay"]', "alpha=0.0"),
    ),
    *of_formulas(
        "dssp/pruning/edges.py",
        "search/test_pruning.py",
        ("pruning-relative-gate", "gate * len(peers) / sum(peers)", "gate / sum(peers)"),
        ("pruning-threshold", "table.gates[i] < rules", "table.gates[i] > rules"),
    ),
    *of_formulas(
        "dssp/pruning/candidates.py",
        "search/test_candidate_pruning.py",
        ("candidates-worst-first", "key=lambda candidate: candidate[1]", "key=lambda candidate: -candidate[1]"),
        ("candidates-last-of-kind", "count(has_weights[operation]) > 1", "count(has_weights[operation]) > 0"),
    ),
    *of_formulas(
        "dssp/paths/effects.py",
        "search/test_path_effects.py",
        ("paths-halfway", "(losses + model[path]) / 2", "losses"),
        ("paths-model", "design @ _least_squares(design, measured)", "design @ _least_squares(design, 0 * measured)"),
    ),
    *of_formulas(
        "dssp/methods/dssp_paper.py",
        "search/test_architect.py",
        ("penalty-sign", "super().penalty() + self", "super().penalty() - self"),
    ),
    *of_formulas(
        "dssp/supernet.py",
        "search/test_architect.py",
        ("penalty-of-logits", "self.mask[type].sigmoid(), 0.0", "self.mask[type], 0.0"),
    ),
    *of_formulas(
        "dssp/relaxation.py",
        "search/test_relaxation.py",
        ("relaxation-removed", "alpha.masked_fill(~offered, -torch.inf).softmax", "alpha.softmax"),
        ("relaxation-gates", "gates * count /", "gates /"),
    ),
    *of_formulas(
        "dssp/relaxation.py",
        "search/test_pc_darts.py",
        ("relaxation-node", "nodes.unsqueeze(1)) & live", "nodes.unsqueeze(1))"),
    ),
    *of_formulas(
        "dssp/bilevel.py",
        "search/test_gumbel.py",
        ("bilevel-joint-penalty", "self.method.penalty if learns_both else None", "None"),
    ),
    *of_formulas(
        "dssp/bilevel.py",
        "search/test_bilevel.py",
        ("bilevel-frozen", "[] if config.unrolled else self.weights", "[]"),
    ),
    *of_formulas(
        "dssp/methods/gumbel.py",
        "search/test_gumbel.py",
        ("gumbel-sign", "= -exponential", "= exponential"),
        ("gumbel-temperature", " / temperature.to(alpha.device)", ""),
    ),
    *of_formulas(
        "dssp/methods/gdas.py",
        "search/test_gumbel.py",
        ("gdas-straight-through", "hard + (soft - soft.detach())", "hard"),
    ),
    *of_formulas(
        "dssp/methods/base.py",
        "search/test_countermeasures.py",
        ("beta-decay-schedule", " * self.epoch / self.config.epochs", ""),
        ("beta-decay-loss", "alpha.logsumexp(-1)", "alpha.amax(-1)"),
    ),
    *of_formulas(
        "dssp/methods/fair_darts.py",
        "search/test_fair_darts.py",
        ("fair-darts-sign", "return -torch", "return torch"),
    ),
]


def failed_test(tree: Path, tests: str) -> str | None:
    """The first test that fails in a tree, None if all pass. Raises RuntimeError if the tests did not run."""
    done = pytest_in(tree, "-x", f"tests/{tests}")
    found = re.search(r"^FAILED (?:tests/)?([^\s:]+::\w+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"{tests} (signal {-done.returncode})"
    if not found:
        raise RuntimeError(f"{tests}: expected passed or failed tests, got\n{done.stdout}{done.stderr}")
    return found[1]


def trial(mutation: Mutation, folder: Path, *, broken: bool) -> str | None:
    """The test that fails with the mutation, or without it if not ``broken``."""
    tree = copy_of_project(folder, with_extension=not mutation.operators)
    if broken:
        path = tree / mutation.file
        source = path.read_text()
        if source.count(mutation.text) != 1:
            raise RuntimeError(f"{mutation.name}: expected its text once in {mutation.file}")
        path.write_text(source.replace(mutation.text, mutation.replacement))
    if mutation.operators:
        build_extension(tree, "quick", mutation.operators)
    return failed_test(tree, mutation.tests)


def recorded() -> dict[str, str]:
    """The rows of the table by the names of their mutations."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return (
        {line.split("|")[1].strip(): line for line in lines[lines.index("|---|---|---|---|---|") + 1 :]}
        if lines
        else {}
    )


def main() -> int:
    """0 if every mutation was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[mutation.name for mutation in MUTATIONS])
    only = parser.parse_args().only
    controls, survivors = set(), []
    with tempfile.TemporaryDirectory() as folder:
        for mutation in MUTATIONS:
            if only and mutation.name not in only:
                continue
            control = (mutation.operators, mutation.tests)
            if control not in controls and (failed := trial(mutation, Path(folder), broken=False)):
                raise RuntimeError(f"{failed} fails without any mutation")
            controls.add(control)
            caught_by = trial(mutation, Path(folder), broken=True)
            print(f"{mutation.name}: {caught_by or 'SURVIVED'}", flush=True)
            if caught_by is None:
                survivors.append(mutation.name)
                continue
            rows = recorded() | {mutation.name: mutation.row(f"`{caught_by}`")}  # another process may have added some
            kept = [rows[mutation.name] for mutation in MUTATIONS if mutation.name in rows]
            TABLE.write_text(HEADER + "\n".join(kept) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

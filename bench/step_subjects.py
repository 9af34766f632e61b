"""What bench/search_step.py compares: a stock supernet and ours with its weights, on one batch, and their steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import stock_darts, stock_nasbench201
from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import DataSet, load_data
from dssp.spaces import DARTS, NASBENCH201, CellSpace
from dssp.supernet import Supernet
from dssp_kernels import fuse_mixed_ops

Batch = tuple[Tensor, Tensor]
Phases = Mapping[str, Callable[[], object]]  # what makes up a step, in order


@dataclass(frozen=True)
class Case:
    """One size of one subject; str() and parse() convert, as in darts-c16-l8-b32."""

    subject: str
    channels: int
    cells: int
    batch: int

    def __str__(self) -> str:
        return f"{self.subject}-c{self.channels}-l{self.cells}-b{self.batch}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ValueError for anything else than subject-cCHANNELS-lCELLS-bBATCH with a known subject.

        Fewer than 8 channels are refused: then stock DARTS in channels_last writes out of bounds (oneDNN issue 6035).
        So are fewer cells than have every type.
        """
        found = re.fullmatch(r"(\w+)-c(\d+)-l(\d+)-b(\d+)", text)
        if found and found[1] in SUBJECTS:
            channels, cells, batch = (int(size) for size in found.groups()[1:])
            if channels >= 8 and cells >= SUBJECTS[found[1]].least_cells and batch >= 1:
                return cls(found[1], channels, cells, batch)
        least = [f"{name} with at least {subject.least_cells} cells" for name, subject in SUBJECTS.items()]
        raise ValueError(
            f"case: got {text!r}, expected {' or '.join(least)}, at least 8 channels and a batch, such as {MAIN}"
        )


@dataclass(frozen=True)
class Subject:
    """A supernet as its authors wrote it and as we do; `renamed`: a key of stock's state_dict -> ours."""

    data: str
    stock: Callable[[Case, DataSet], nn.Module]
    ours: Callable[[Case, DataSet], Supernet]
    renamed: Callable[[str], str]
    least_cells: int = 1
    image_size: int | None = None  # None: as the data set has it

    def load(self, device: torch.device) -> DataSet:
        return load_data(self.data, image_size=self.image_size, device=device)


def stock_darts_supernet(case: Case, data: DataSet) -> nn.Module:
    return stock_darts.Network(case.channels, len(data.classes), case.cells, image_channels=data.image_shape[0])


def stock_nasbench201_supernet(case: Case, data: DataSet) -> nn.Module:
    return stock_nasbench201.TinyNetwork(case.channels, case.cells, len(data.classes), data.image_shape[0])


def our_supernet(space: CellSpace, case: Case, data: DataSet) -> Supernet:
    return Supernet(
        space,
        channels=case.channels,
        cells=case.cells,
        classes=len(data.classes),
        image_channels=data.image_shape[0],
        gated=False,  # the stock ones have no masks
    )


def renamed_darts(key: str) -> str:
    """model_search.py of DARTS -> dssp.supernet."""
    return {"alphas_normal": "alpha.normal", "alphas_reduce": "alpha.reduce"}.get(key, key)


def renamed_nasbench201(key: str) -> str:
    """search_model_darts.py of AutoDL-Projects -> dssp.supernet; a pool has no weights and so no key."""
    if key == "arch_parameters":
        return "alpha.normal"
    return re.sub(
        r"edges\.(\d)<-(\d)\.",
        lambda found: f"_ops.{NASBENCH201.edges.index((int(found[2]), int(found[1])))}._ops.",
        key,
    )


_DARTS = partial(Subject, stock=stock_darts_supernet, ours=partial(our_supernet, DARTS), renamed=renamed_darts)
SUBJECTS = {
    "darts": _DARTS("fake", image_size=32, least_cells=3),  # images of CIFAR's size
    "nasbench201": Subject(
        "fake", stock_nasbench201_supernet, partial(our_supernet, NASBENCH201), renamed_nasbench201, image_size=32
    ),
    "digits": _DARTS("digits", least_cells=3),  # 1x8x8
}
MAIN = Case("darts", channels=16, cells=8, batch=32)
NASBENCH = Case("nasbench201", channels=16, cells=5, batch=32)  # the network of the benchmark
DIGITS = Case("digits", channels=8, cells=3, batch=64)  # the preset of dssp.search


def load_batches(case: Case, data: DataSet) -> tuple[Batch, Batch]:
    """A training and a validation batch, images in channels_last. Raises ValueError if the data set is too small."""
    splits = (data.train, data.valid)
    train, valid = (next(split.batches(case.batch, epoch=0, seed=0, train=True)) for split in splits)
    if len(train[1]) != case.batch:
        raise ValueError(f"case {case}: {data.name} has {len(data.train)} training images, too few for a batch")
    return train, valid


def build_contenders(case: Case, subject: Subject, data: DataSet, device: torch.device) -> dict[str, nn.Module]:
    """Supernets with the same weights. Half pruned: every second edge is removed for good. Fused: stock's own modules
    after fuse_mixed_ops, where that finds mixed ops."""
    torch.manual_seed(0)
    stock, again, fused = (subject.stock(case, data) for _ in range(3))  # faster than to copy one
    ours, half = (subject.ours(case, data) for _ in range(2))
    for net in (again, fused):
        net.load_state_dict(stock.state_dict())
    for net in (ours, half):
        net.load_state_dict({subject.renamed(key): value for key, value in stock.state_dict().items()})
    prune_to(half, 0.5)
    nets = {"stock_channels_last": again, "ours": ours, "ours_half_pruned": half}
    if fuse_mixed_ops(fused):
        nets["stock_fused"] = fused
    return {
        "stock": stock.to(device),
        **{name: net.to(device).to(memory_format=torch.channels_last) for name, net in nets.items()},
    }


def kept_edges(space: CellSpace, share: float) -> set[int]:
    """Positions of about `share` of a cell's edges, evenly spread, at least one into every node."""
    kept = {i for i in range(len(space.edges)) if int((i + 1) * share) > int(i * share)}
    for node in space.concat:
        if kept.isdisjoint(space.edges_into(node)):
            kept.add(space.edges_into(node)[0])
    return kept


def prune_to(supernet: Supernet, share: float) -> None:
    """Remove edges of both cell types until about `share` of them is left."""
    kept = kept_edges(supernet.space, share)
    for cell_type in supernet.cell_types:
        for position, (source, node) in enumerate(supernet.space.edges):
            if position not in kept:
                supernet.remove_edge(f"{cell_type}:{source}->{node}")


class TrainingStep:
    """Forward, cross-entropy, backward: gradients for every parameter and alpha. `loss` is that of the last run."""

    loss: Tensor

    def __init__(self, model: nn.Module, batch: Batch, *, contiguous: bool = False) -> None:
        images, self.labels = batch
        self.model = model
        self.parameters = list(model.parameters())
        self.images = images.clone(memory_format=torch.contiguous_format) if contiguous else images

    def zero_grad(self) -> None:
        """As an optimizer does it: its list of parameters knows no modules."""
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self) -> None:
        self.zero_grad()
        self.loss = F.cross_entropy(self.model(self.images), self.labels)

    def backward(self) -> None:
        self.loss.backward()
        self.loss = self.loss.detach()

    def __call__(self) -> None:
        self.forward()
        self.backward()

    @property
    def phases(self) -> Phases:
        return {"forward": self.forward, "backward": self.backward}


class StockBilevelStep:
    """Architecture and weight step as train_search.py and architect.py of DARTS write them, first order."""

    def __init__(
        self, model: nn.Module, renamed: Callable[[str], str], config: SearchConfig, train: Batch, valid: Batch
    ) -> None:
        self.model, self.train, self.valid, self.grad_clip = model, train, valid, config.grad_clip
        parameters = {renamed(name): parameter for name, parameter in model.named_parameters()}
        alphas = [parameter for name, parameter in parameters.items() if name.startswith("alpha.")]
        self.weights = [parameter for name, parameter in parameters.items() if not name.startswith("alpha.")]
        self.optimizer = torch.optim.SGD(
            self.weights, config.weight_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.architect = torch.optim.Adam(
            alphas, lr=config.alpha_lr, betas=(0.5, 0.999), weight_decay=config.alpha_weight_decay
        )

    def __call__(self) -> None:
        images, labels = self.valid
        self.architect.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()  # fills the weights' gradients too
        self.architect.step()
        images, labels = self.train
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        nn.utils.clip_grad_norm_(self.weights, self.grad_clip)
        self.optimizer.step()


def bilevel_steps(
    case: Case, subject: Subject, data: DataSet, nets: Mapping[str, nn.Module], train: Batch, valid: Batch
) -> dict[str, Phases]:
    """The whole step of a search, with the same optimizers and settings: DARTS' own code, and dssp's."""
    config = SearchConfig(
        dataset=subject.data,  # type: ignore[arg-type]  # Literals there
        space=nets["ours"].space.name,  # type: ignore[arg-type, union-attr]
        method="darts",
        channels=case.channels,
        cells=case.cells,
        batch_size=case.batch,
    ).resolve()
    steps: dict[str, Phases] = {}
    for name, net in nets.items():
        if isinstance(net, Supernet):
            search = BilevelSearch(config, net, data)
            steps[name] = {"step": partial(search.step, (train, valid, {}), 0)}
        else:
            layout = torch.contiguous_format if name == "stock" else torch.channels_last
            batches = [(images.clone(memory_format=layout), labels) for images, labels in (train, valid)]
            steps[name] = {"step": StockBilevelStep(net, subject.renamed, config, *batches)}
    return steps

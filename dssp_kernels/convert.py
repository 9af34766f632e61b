"""fuse_mixed_ops(): another project's mixed ops, fused in place."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import operator
import types
import warnings
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any, NamedTuple, SupportsIndex, cast

from torch import Tensor, nn

from dssp_kernels.folding import norms_shared
from dssp_kernels.modules import FusedMixedEdge, mix, run_candidates

Reader = Callable[..., tuple[Iterable[nn.Module], Tensor, Tensor]]
"""(mixed op, *arguments of a call) -> its candidates, their weights [K], and x."""


def fuse_mixed_ops(model: nn.Module, *, matcher: Callable[[nn.Module], Reader | None] | None = None) -> int:
    """Fuse every mixed op of a supernet in place: sum_k weights_k * op_k(x) in one kernel, as in FusedMixedEdge.

    Recognised is the sum itself, wherever it stands in a module's forward():

        sum(w * op(x) for w, op in zip(weights, self._ops))

    whatever the names and the order, with ``enumerate`` or a list as well. That covers DARTS, Fair-DARTS (``_ops``),
    P-DARTS (``m_ops``) and PC-DARTS (a quarter of the channels; what surrounds the sum stays as it is). The module then
    runs its own forward() with nothing but that sum replaced. It stays the same object: parameters, buffers,
    state_dict keys, hooks, attributes and methods are what they were, optimizers and references keep working, and
    isinstance() still holds; only its class is now a subclass of its own. A module whose forward(x, weights) is that
    sum and nothing else is a FusedMixedEdge besides (prune(), FusedMixedNode).

    What a call brings decides anew: weights that are no floating-point tensor [K], or candidates that differ in shape,
    are summed as before. Outputs and gradients are those of the original up to rounding.

    Args:
        model: the supernet, or a single mixed op.
        matcher: for other forms; asked first about every module. For a module that computes
            sum_k weights_k * op_k(x), a function that reads a call, (module, *arguments) -> (candidates, weights, x);
            for any other module None. Take a function at module level, or the model cannot be pickled.

    Returns:
        How many mixed ops were fused; those that already were do not count.

    Warns once for each class that looks like a mixed op (``_ops`` or ``m_ops``, and forward() with two arguments) but
    is left as it is, with the reason.

    Raises:
        TypeError: naming the argument, what came and what was expected.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if matcher is not None and not callable(matcher):
        raise TypeError(f"matcher: expected a function of a module, got {type(matcher).__name__}")
    fused, left = 0, {}
    for module in model.modules():
        if isinstance(module, (_FusedSum, FusedMixedEdge)):
            continue
        reader = None if matcher is None else matcher(module)
        if reader is not None and not callable(reader):
            raise TypeError(f"matcher: expected it to return a function or None, got {type(reader).__name__}")
        reason = _fuse(module, reader)
        if reason is None:
            fused += 1
        else:
            left[module] = reason
    _warn_of_look_alikes(left)
    return fused


def _fuse(module: nn.Module, reader: Reader | None) -> str | None:
    """Fuse one mixed op; the reason why it cannot be done, or None."""
    if "forward" in vars(module):
        return "its forward() was set on the instance"
    host: Any = type(module)
    is_edge = False
    attributes: dict[str, Any] = {"_seen": (), "_seen_shared": []}
    if reader is None:
        form = _fused_form(host.forward)
        if isinstance(form, str):
            return form
        ops = getattr(module, form.ops, None)
        if not isinstance(ops, nn.ModuleList):
            return f"its {form.ops} is no nn.ModuleList"
        edge_attributes = _edge_attributes(module, form.ops, ops) if form.is_edge else None
        if edge_attributes is not None:
            is_edge = True
            attributes |= edge_attributes
    module.__class__ = _fused_class(host, reader, is_edge)
    vars(module).update(attributes)
    return None


def _edge_attributes(module: nn.Module, name: str, ops: nn.ModuleList) -> dict[str, Any] | None:
    """What makes the module a FusedMixedEdge; None if it uses one of the names for something else."""
    if not any(op is not None for op in ops):
        return None
    edge = FusedMixedEdge(ops, alpha=False, mask=False, relaxation="given")
    attributes = {key: value for key, value in vars(edge).items() if key not in vars(nn.Module())}
    names = {key for key in vars(FusedMixedEdge) if not key.startswith("__")} - {"forward", "extra_repr"}
    names |= {"_ops"} - {name}
    return None if any(hasattr(module, key) for key in names | set(attributes)) else attributes


def _warn_of_look_alikes(left: dict[nn.Module, str]) -> None:
    reasons: dict[type, list[str]] = {}
    for module, reason in left.items():
        if _looks_like_a_mixed_op(module):
            reasons.setdefault(type(module), []).append(reason)
    for cls, found in reasons.items():
        warnings.warn(
            f"fuse_mixed_ops: {len(found)} of class {cls.__module__}.{cls.__qualname__} left as they are: {found[0]}. "
            "If they compute sum_k weights_k * op_k(x), say so with matcher=",
            stacklevel=3,
        )


def _looks_like_a_mixed_op(module: nn.Module) -> bool:
    if not any(isinstance(module._modules.get(name), nn.ModuleList) for name in ("_ops", "m_ops")):
        return False
    if any(isinstance(inner, (_FusedSum, FusedMixedEdge)) for inner in module.modules()):
        return False  # a cell
    return len(inspect.signature(module.forward).parameters) == 2


# ---- the fused module ------------------------------------------------------------------------------------------------


class _FusedSum(nn.Module):
    """What a mixed op's own class is extended by."""

    _fused_from: tuple[type[nn.Module], Reader | None, bool]
    _seen: tuple[nn.Module | None, ...]
    _seen_shared: list[bool]

    def _fused_sum(
        self, ops: Iterable[nn.Module], weights: Tensor, x: Tensor, original: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """sum_k weights_k * ops_k(x); by the original expression where no kernel has its meaning."""
        candidates = tuple(ops)
        if not (
            isinstance(weights, Tensor)
            and weights.dim() == 1
            and weights.shape[0] == len(candidates) > 0
            and weights.is_floating_point()
            and isinstance(x, Tensor)
            and x.device == weights.device
        ):
            return original(weights)
        outputs, norms = run_candidates(candidates, self._shares_norm(candidates), x, self.training)
        if not all(_can_be_mixed(output, outputs[0]) for output in outputs):
            normalised = (o if norm is None else norm(o) for o, norm in zip(outputs, norms, strict=True))
            return sum(w * o for w, o in zip(weights, normalised, strict=True))
        return mix((outputs, norms), self.training, weights, None, "given")

    def _shares_norm(self, candidates: tuple[nn.Module | None, ...]) -> list[bool]:
        """norms_shared() of the candidates, found again when they are others than the last time."""
        if candidates != self._seen:
            self._seen, self._seen_shared = candidates, norms_shared(candidates)
        return self._seen_shared

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (_new_fused, self._fused_from, *reduced[2:])


def _can_be_mixed(output: Any, first: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.shape == first.shape


class _FusedEdge(_FusedSum, FusedMixedEdge):
    """A mixed op that computes the sum and nothing else."""

    def _fused_sum(
        self, ops: Iterable[nn.Module], weights: Tensor, x: Tensor, original: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return self.zero_output(x) if self._pruned else super()._fused_sum(ops, weights, x, original)

    @property
    def _norm_is_shared(self) -> list[bool]:  # type: ignore[override]  # FusedMixedEdge finds them once
        return self._shares_norm(tuple(self._ops))

    def remove(self) -> None:
        super().remove()
        self._seen = ()


def _new_fused(host: Any, reader: Reader | None, is_edge: bool) -> nn.Module:
    """An empty object, for copy and pickle to fill."""
    cls = _fused_class(host, reader, is_edge)
    return cls.__new__(cls)


@functools.cache
def _fused_class(host: Any, reader: Reader | None, is_edge: bool) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": host.__module__, "__doc__": host.__doc__}
    members["_fused_from"] = (host, reader, is_edge)
    if reader is not None:
        members["forward"] = _reading_forward(reader)
    else:
        form = _fused_form(host.forward)
        if isinstance(form, str):  # unpickled where the class is another one
            raise TypeError(f"{host.__module__}.{host.__qualname__} can no longer be fused: {form}")
        members["forward"] = form.forward
        if is_edge and form.ops != "_ops":
            members["_ops"] = property(operator.attrgetter(form.ops))
    bases = (_FusedEdge if is_edge else _FusedSum, host)
    return types.new_class(f"Fused{host.__name__}", bases, exec_body=lambda namespace: namespace.update(members))


def _reading_forward(reader: Reader) -> Callable[..., Tensor]:
    def forward(self: _FusedSum, *arguments: Any, **keywords: Any) -> Tensor:
        ops, weights, x = reader(self, *arguments, **keywords)
        candidates = tuple(ops)
        return self._fused_sum(
            *(candidates, weights, x),
            lambda given: sum(w * op(x) for w, op in zip(given, candidates, strict=True)),
        )

    return forward


# ---- recognition -----------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """A forward() with its sum replaced by a call of _fused_sum()."""

    forward: FunctionType
    ops: str  # the attribute that holds the candidates
    is_edge: bool  # forward(x, weights) is the sum and nothing else


@functools.cache
def _fused_form(forward: Any) -> _Form | str:
    """The fused forward(), or why there is none.

    The source is what is read, so it has to be that of the running code: both must compile to the same. The compiler
    looks at what a file imports and at the scopes around a function, so all of the file is compiled.
    """
    nothing = "its forward() has no sum(w * op(x) for w, op in zip(weights, self._ops))"
    if not isinstance(forward, FunctionType) or "sum" not in forward.__code__.co_names:
        return nothing
    live = forward.__code__
    text, unlike = _source(live)
    try:
        file = ast.parse(text)
    except SyntaxError:
        return unlike
    found = [node for node in ast.walk(file) if isinstance(node, ast.FunctionDef) and _is_at(node, live)]
    if len(found) != 1 or not _same(_compiled(file, live), live):
        return unlike
    rewrite = _Rewrite(found[0], forward)
    is_edge = rewrite.is_all_of(found[0])
    rewrite.generic_visit(found[0])
    if len(rewrite.found) != 1:
        return "its forward() sums over several lists of candidates" if rewrite.found else nothing
    code = _compiled(file, live)
    assert code is not None  # it was there before the sum was replaced
    cells = dict(zip(live.co_freevars, forward.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    fused = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, closure)
    fused.__kwdefaults__ = forward.__kwdefaults__
    fused.__annotations__ = forward.__annotations__
    fused.__dict__.update(forward.__dict__)
    return _Form(fused, rewrite.found.pop(), is_edge)


def _source(code: CodeType) -> tuple[str, str]:
    """The text of a function's file, and what to say if the function turns out to be another one.

    Where there is no file (standard input, exec), DARTS' spelling in the function's own names: if that compiles to the
    same, it is as good.
    """
    try:
        return "".join(inspect.findsource(code)[0]), "its forward() is wrapped in another, or its source has changed"
    except OSError:
        unlike = "the source of its forward() cannot be read"
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    if code.co_argcount != 3 or len(inner) != 1 or len(inner[0].co_varnames) != 3:
        return "", unlike
    (me, x, weights), (_, w, op) = code.co_varnames[:3], inner[0].co_varnames
    summed = f"sum({w} * {op}({x}) for {w}, {op} in zip({weights}, {me}.{code.co_names[-1]}))"
    lines_before = "\n" * (code.co_firstlineno - 1)
    return f"{lines_before}def {code.co_name}({me}, {x}, {weights}): return {summed}", unlike


def _is_at(function: ast.FunctionDef, code: CodeType) -> bool:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return (function.name, first) == (code.co_name, code.co_firstlineno)


def _compiled(file: ast.Module, like: CodeType) -> CodeType | None:
    """The code of one function of a file."""
    codes = [compile(ast.fix_missing_locations(file), like.co_filename, "exec", dont_inherit=True)]
    for code in codes:  # grows
        if (code.co_name, code.co_firstlineno) == (like.co_name, like.co_firstlineno):
            return code
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return None


_COMPARED = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount"),
)


def _same(a: Any, b: Any) -> bool:
    """Whether two code objects, or constants of such, do the same."""
    if type(a) is not type(b):
        return False
    if isinstance(a, CodeType):
        return all(getattr(a, name, None) == getattr(b, name, None) for name in _COMPARED) and _same(
            a.co_consts, b.co_consts
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


class _Sum(NamedTuple):
    """The pieces of sum(w * op(x) for w, op in zip(weights, self.ops))."""

    ops: ast.Attribute
    weights: ast.expr
    x: ast.Name


class _Rewrite(ast.NodeTransformer):
    """sum(...) -> self._fused_sum(self.ops, weights, x, lambda weights: sum(...)), outside of nested functions."""

    def __init__(self, function: ast.FunctionDef, forward: FunctionType) -> None:
        arguments = function.args
        self.arguments = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        self.has_other_arguments = bool(
            arguments.vararg or arguments.kwonlyargs or arguments.kwarg or arguments.defaults
        )
        self.found: set[str] = set()  # attributes that hold candidates
        code = forward.__code__
        taken = {*code.co_varnames, *code.co_cellvars, *code.co_freevars, *forward.__globals__}
        self.builtins = {"sum", "zip", "enumerate"} - taken
        self.names_self = bool(self.arguments) and not any(
            isinstance(node, ast.Name) and node.id == self.arguments[0] and not isinstance(node.ctx, ast.Load)
            for node in ast.walk(function)
        )

    def is_all_of(self, function: ast.FunctionDef) -> bool:
        """Whether the function is f(self, x, weights) and returns the sum of exactly these, and nothing else."""
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        match body:
            case [ast.Return(value)] if not self.has_other_arguments:
                found = self.sum_in(value)
            case _:
                return False
        match found:
            case _Sum(weights=ast.Name(weights), x=ast.Name(x)):
                return self.arguments[1:] == [x, weights]
        return False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Left alone: its variables are others."""
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        """Left alone, too."""
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The sum replaced, anything else searched further."""
        found = self.sum_in(node)
        if found is None:
            return self.generic_visit(node)
        self.found.add(found.ops.attr)
        ops, weights, x = (copy.deepcopy(piece) for piece in found)
        original = ast.Lambda(
            ast.arguments([], [ast.arg(_GIVEN)], None, [], [], None, []),
            cast(ast.expr, _Replace(found.weights, ast.Name(_GIVEN, ast.Load())).visit(node)),
        )
        method = ast.Attribute(ast.Name(self.arguments[0], ast.Load()), "_fused_sum", ast.Load())
        return ast.copy_location(ast.Call(method, [ops, weights, x, original], []), node)

    def sum_in(self, node: ast.AST | None) -> _Sum | None:
        """The pieces, if the node is such a sum."""
        match node:
            case ast.Call(
                ast.Name("sum"),
                [
                    ast.GeneratorExp(ast.BinOp(a, ast.Mult(), b), [ast.comprehension(ifs=[], is_async=0) as loop])
                    | ast.ListComp(ast.BinOp(a, ast.Mult(), b), [ast.comprehension(ifs=[], is_async=0) as loop])
                ],
                [],
            ) if "sum" in self.builtins and self.names_self:
                return self._read(a, b, loop) or self._read(b, a, loop)
        return None

    def _read(self, weight: ast.expr, product: ast.expr, loop: ast.comprehension) -> _Sum | None:
        """The pieces of ``weight * product for loop``."""
        match product, loop:
            case (
                ast.Call(ast.Name(op), [ast.Name() as x], []),
                ast.comprehension(
                    ast.Tuple([ast.Name(first), ast.Name(second)]), ast.Call(ast.Name(iterator), over, keywords)
                ),
            ) if first != second and x.id not in (first, second) and iterator in self.builtins:
                pass
            case _:
                return None
        match iterator, weight, over, keywords:
            case "zip", ast.Name(w), [p, q], [] | [ast.keyword("strict", ast.Constant())] if {w, op} == {first, second}:
                ops, weights = (p, q) if op == first else (q, p)
            case "enumerate", ast.Subscript(ast.Name() as weights, ast.Name(index)), [ops], []:
                if [index, op] != [first, second] or weights.id in (first, second):
                    return None
            case _:
                return None
        match ops:
            case ast.Attribute(ast.Name(owner)) if owner == self.arguments[0]:
                return _Sum(ops, weights, x)
        return None


_GIVEN = "_given_weights"


class _Replace(ast.NodeTransformer):
    """One node by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """The new node for the old one."""
        return self.new if node is self.old else self.generic_visit(node)

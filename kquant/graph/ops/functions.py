"""Functions of numbers as short programs of elementary functions: plain data, evaluated here and written by targets.

A program is a sequence of steps (name, operand, ...). An operand is an int, the number of a value (the inputs come
first, then the results of the steps), or a float, a constant. The last result is the function's. The steps of
x tanh(log(1 + exp(x))) are

    (("exp", 0), ("add", 1, 1.0), ("log", 2), ("tanh", 3), ("mul", 0, 4))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import tensorflow as tf

Tensor = Any
Step = tuple[Any, ...]
Program = tuple[Step, ...]

ELEMENTARY: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "abs": tf.abs,
        "neg": tf.negative,
        "exp": tf.exp,
        "log": tf.math.log,
        "sqrt": tf.sqrt,
        "rsqrt": tf.math.rsqrt,
        "floor": tf.floor,
        "ceil": tf.math.ceil,
        "round": tf.round,
        "sign": tf.sign,
        "sin": tf.sin,
        "cos": tf.cos,
        "tanh": tf.tanh,
        "logistic": tf.sigmoid,
        "elu": tf.nn.elu,
        "add": tf.add,
        "sub": tf.subtract,
        "mul": tf.multiply,
        "div": tf.divide,
        "pow": tf.pow,
        "atan2": tf.atan2,
        "floor_mod": tf.math.floormod,
        "maximum": tf.maximum,
        "minimum": tf.minimum,
        "greater": tf.greater,
        "greater_equal": tf.greater_equal,
        "less": tf.less,
        "less_equal": tf.less_equal,
        "equal": tf.equal,
        "not_equal": tf.not_equal,
        "logical_and": tf.logical_and,
        "logical_or": tf.logical_or,
        "logical_not": tf.logical_not,
        "select": tf.where,
    }
)


def run(program: Sequence[Step], inputs: Sequence[Tensor]) -> Tensor:
    """The value of a program.

    Args:
        program: its steps, lists where they come from JSON.
        inputs: tensors of one floating type (or of booleans, where a step takes them).
    """
    values = list(inputs)
    floating = next((v.dtype for v in map(tf.convert_to_tensor, values) if v.dtype.is_floating), tf.float32)
    for name, *operands in program:
        numbers = [values[o] if isinstance(o, int) else tf.constant(o, floating) for o in operands]
        values.append(ELEMENTARY[name](*numbers))
    return values[-1]


def inline(outer: Sequence[Step], inner: Sequence[Program | int | float], inputs: int) -> Program:
    """One program of what `outer` makes of values that other programs make.

    Args:
        outer: a program.
        inner: for each input of `outer`, a program of the `inputs` new inputs, or the number of one, or a constant.
        inputs: how many new inputs there are.
    """
    steps: dict[str, tuple[int, Step]] = {}  # by text, in which 1 and 1.0 differ: what is there is not computed again
    values: list[int | float] = []

    def append(program: Sequence[Step], known: list[int | float]) -> None:
        for name, *operands in program:
            step = (name, *(known[o] if isinstance(o, int) else o for o in operands))
            known.append(steps.setdefault(repr(step), (inputs + len(steps), step))[0])

    for part in inner:
        if isinstance(part, int | float):
            values.append(part)
            continue
        known: list[int | float] = list(range(inputs))
        append(part, known)
        values.append(known[-1])
    append(outer, values)
    return tuple(step for _, step in steps.values())


def program(write: Callable[..., Term], inputs: int = 1) -> Program:
    """The program of a Python expression, e.g. program(lambda x: x * (1.0 + x.exp()).log().tanh())."""
    steps: list[Step] = []
    write(*(Term(steps, inputs, k) for k in range(inputs)))
    return tuple(steps)


def erf(x: Term) -> Term:
    """The error function within 1.5e-7 (Abramowitz and Stegun, 7.1.26): targets have none."""
    t = 1.0 / (1.0 + 0.3275911 * x.abs())
    series = t * (1.061405429 * t - 1.453152027) + 1.421413741
    series = t * (t * (t * series - 0.284496736) + 0.254829592)
    return x.sign() * (1.0 - series * (-(x * x)).exp())


@dataclass(frozen=True, eq=False)
class Term:
    """A value of a program that is being written: operators and methods, named as elementary functions, add steps."""

    steps: list[Step]
    inputs: int
    index: int

    def call(self, name: str, *operands: Term | float) -> Term:
        """The elementary function `name` of operands, of which this need not be one."""
        self.steps.append((name, *(o.index if isinstance(o, Term) else float(o) for o in operands)))
        return Term(self.steps, self.inputs, self.inputs + len(self.steps) - 1)

    def __add__(self, other: Term | float) -> Term:
        return self.call("add", self, other)

    def __radd__(self, other: float) -> Term:
        return self.call("add", self, other)

    def __sub__(self, other: Term | float) -> Term:
        return self.call("sub", self, other)

    def __rsub__(self, other: float) -> Term:
        return self.call("sub", other, self)

    def __mul__(self, other: Term | float) -> Term:
        return self.call("mul", self, other)

    def __rmul__(self, other: float) -> Term:
        return self.call("mul", self, other)

    def __truediv__(self, other: Term | float) -> Term:
        return self.call("div", self, other)

    def __rtruediv__(self, other: float) -> Term:
        return self.call("div", other, self)

    def __neg__(self) -> Term:
        return self.call("neg", self)

    def __getattr__(self, name: str) -> Callable[..., Term]:
        """x.exp() is call("exp", x); x.maximum(0.0) is call("maximum", x, 0.0)."""
        if name not in ELEMENTARY:
            raise AttributeError(name)
        return lambda *others: self.call(name, self, *others)

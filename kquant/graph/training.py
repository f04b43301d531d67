"""What the weights of a node are in the user's layer, for training.

Folding and equalization change a weight: the node's is, element by element,

    factor * user's + offset

with factors that are frozen when the graph is made. Penalties and constraints are asked of the user's weight, so they
look at (node's - offset) / factor, in the shape that the user's layer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class UserWeight:
    """A weight of a node as the user's layer has it.

    Attributes:
        trainable: whether it trains; False also where the user's layer has no such weight.
        regularizer, constraint: the user's (functions of its weight), or None.
        shape: of the user's weight.
        order: its axes in the order in which the node's weight has them, before that is reshaped; None as they are.
        factor, offset: of the shape of the node's weight, see above; None for 1 and 0.
        zeros: where the user's weight is exactly zero, in the shape of the node's; None where it nowhere is.
        gaps: which of them are no weights of the user's, but holes of a dilated kernel.
        momentum: of the running statistics, where it is the gamma of a batch normalization.
    """

    trainable: bool = True
    regularizer: Any = None
    constraint: Any = None
    shape: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    factor: Array | None = None
    offset: Array | None = None
    zeros: Array | None = None
    gaps: Array | None = None
    momentum: float | None = None

    @classmethod
    def of(cls, variable: Any, value: Array, learns: bool, **facts: Any) -> UserWeight:
        """The weight `value` of a node that was made of a variable of the user's, None for none."""
        if variable is None:
            return cls(trainable=False)
        facts = {"shape": tuple(variable.shape), **facts}
        zeros, known = value == 0, int(np.prod(facts["shape"])) == value.size
        return cls(
            trainable=learns and bool(getattr(variable, "trainable", True)),
            regularizer=getattr(variable, "regularizer", None) if known else None,
            constraint=getattr(variable, "constraint", None) if known else None,
            zeros=zeros if zeros.any() else None,
            **facts,
        )

    @property
    def asked(self) -> bool:
        """Whether anything is asked of it."""
        return self.trainable and (self.regularizer is not None or self.constraint is not None)

    def scaled(self, scale: Array, offset: Array | float = 0.0) -> UserWeight:
        """Of the node's weight times `scale`, plus `offset`."""
        if not self.asked:
            return self
        factor = scale if self.factor is None else self.factor * scale
        before: Any = 0.0 if self.offset is None else self.offset * scale
        moved = before + offset
        return replace(self, factor=factor, offset=np.broadcast_to(moved, factor.shape) if np.any(moved) else None)


def with_affine(user: Mapping[str, UserWeight], bias: str, affine: Mapping[str, UserWeight]) -> dict[str, UserWeight]:
    """Of a linear operation that an affine was folded into, which its bias takes up.

    Args:
        user: of the operation.
        bias: the name of its bias: it trains where the offset does.
        affine: of the affine's "scale" and "offset"; a batch normalization's scale is kept as "gamma".
    """
    own, beta = user[bias], affine["offset"]
    found = {**user, bias: own if own.trainable or not beta.trainable else UserWeight(shape=beta.shape)}
    return {**found, "gamma": affine["scale"]} if affine["scale"].momentum is not None else found

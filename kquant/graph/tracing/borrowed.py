"""`Borrowed`: a layer of the user's that Keras cannot copy, in a model of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from kquant.errors import ModelError


@dataclass(frozen=True)
class Loan:
    """A layer that is no part of the one that holds it: Keras does not look in here for layers to track.

    Attributes:
        operation: the user's own.
        why: what is in the way of a copy.
    """

    operation: keras.Operation
    why: str


class NotCopied(ModelError):
    """A layer that Keras cannot copy: it is neither saved nor trained."""

    def __init__(self, loan: Loan):
        operation = loan.operation
        super().__init__(
            f"Layer {operation.name!r} ({type(operation).__name__}) stays in float, but Keras cannot serialize it: "
            f"{loan.why}. Give it a get_config() that returns all of its settings, or write a Lambda as a named, "
            "registered function or as a Layer subclass."
        )
        self.loan = loan


class Borrowed(keras.layers.Layer):
    """Runs the user's own layer or operation, with the weights that it has now, and leaves no trace in it.

    Args:
        loan: the user's own layer.
        name: of this one.
    """

    def __init__(self, loan: Loan, name: str):
        super().__init__(name=name, dtype="float32", trainable=False)
        self.loan = loan
        self.copies = [
            self.add_weight(
                shape=v.shape,
                dtype=v.dtype,
                initializer=lambda shape, dtype, v=v: keras.ops.convert_to_tensor(np.asarray(v)),
                trainable=False,
                name=f"weight_{k}",
            )
            for k, v in enumerate(_variables(loan.operation))
        ]
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        mapping = list(zip(_variables(self.loan.operation), (v.value for v in self.copies), strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self.loan.operation.call(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self.loan.operation.compute_output_spec(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        raise NotCopied(self.loan)


def _variables(operation: Any) -> list[Any]:
    return list(getattr(operation, "variables", ()))

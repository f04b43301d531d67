"""A numpy interpreter of .tflite files whose integers equal those of TFLite's reference kernels.

It reads the flatbuffer itself and knows nothing of kquant's graphs, so it can judge what the exporter wrote. Every
integer tensor equals the one of `OpResolverType.BUILTIN_REF` bit for bit. What each operator computes is in the records
of the kernels; the formulas lie beside this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kquant.errors import ExportError
from kquant.targets.builtin import Reference
from kquant.targets.litert.kernels import REFERENCE
from kquant.targets.litert.reader import Operator, Tensor, read

FloatOp = Callable[[Operator, Sequence[np.ndarray | None]], Sequence[np.ndarray]]


class IntegerReference:
    """Runs a .tflite file in integers.

    Args:
        model: the file's bytes, or its path.
        float_op: computes an operator that has no integer kernel here: (operator, its input values) -> its output
            values. Without it such an operator is an error.
        kernels: operator -> what it computes: `kernels.REFERENCE` (BUILTIN_REF), or `kernels.OPTIMIZED`, the kernels
            that run without delegates, for files with an operator version that the former lack.

    Raises:
        ExportError: the file cannot be read.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        float_op: FloatOp | None = None,
        kernels: Mapping[str, Reference] = REFERENCE,
    ) -> None:
        self.program = read(model)
        self._kernels = kernels
        self._float_op = float_op

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators, in the order of execution."""
        return self.program.operators

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the file's inputs, in order."""
        return tuple(t.name for t in self.program.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the file's outputs, in order."""
        return tuple(t.name for t in self.program.outputs)

    def unsupported(self) -> list[Operator]:
        """The operators that `run` leaves to `float_op`."""
        return [op for op in self.operators if not self._supports(op)]

    def _supports(self, op: Operator) -> bool:
        """Whether the operator has an integer kernel here: its code is known, and its values are integers.

        Of 64 bits only accumulators and indices are, and no kernel computes with those.
        """
        if op.code not in self._kernels or not op.outputs:
            return False
        tensors = [t for t in (*op.inputs, *op.outputs) if t is not None]
        return self._kernels[op.code].any_type or (
            all(np.issubdtype(t.dtype, np.integer) for t in tensors) and op.outputs[0].dtype != np.int64
        )

    def run(self, inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every tensor.

        Args:
            inputs: one array per input of the file, in order or by tensor name; the batch may differ from the file's.

        Returns:
            Tensor name -> values as stored, constants included.

        Raises:
            ExportError: an input has the wrong type or shape, or an operator cannot be computed.
        """
        tensors = {t.name: t.data for t in self.program.tensors if t.data is not None}
        tensors.update(self._feeds(inputs))
        for op in self.operators:
            tensors.update(self.execute(op, tensors))
        return tensors

    def run_op(self, index: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute one operator, by its index, from given inputs: see `execute`."""
        return self.execute(self.operators[index], tensors)

    def execute(self, op: Operator, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute one operator.

        Args:
            op: one of `operators`.
            tensors: values by tensor name; the file's constants need not be among them.

        Returns:
            The operator's outputs by tensor name.

        Raises:
            ExportError: the operator is not supported, or an input is missing or does not fit.
        """
        values = [None if t is None else self._value(op, t, tensors) for t in op.inputs]
        if self._supports(op):
            try:
                made = self._kernels[op.code].compute(op, values)
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                raise ExportError(f"{op} cannot be computed from its inputs: {error}") from error
            outputs: Sequence[np.ndarray] = made if isinstance(made, tuple) else (made,)
        elif self._float_op is not None:
            outputs = self._float_op(op, values)
        else:
            raise ExportError(f"{op}: the integer reference has no such kernel; pass float_op to compute it")
        return {t.name: v for t, v in zip(op.outputs, outputs, strict=True)}

    @staticmethod
    def _value(op: Operator, tensor: Tensor, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        value = tensors.get(tensor.name, tensor.data)
        if value is None:
            raise ExportError(f"{op}: no value for its input '{tensor.name}'; feed it")
        return value

    def _feeds(self, inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = self.program.inputs
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(wanted):
                raise ExportError(f"the file has {len(wanted)} inputs, {len(inputs)} were given")
            inputs = dict(zip((t.name for t in wanted), inputs, strict=True))
        feeds = {}
        for tensor in wanted:
            if tensor.name not in inputs:
                raise ExportError(
                    f"no value for the input '{tensor.name}'; the file's inputs: {[t.name for t in wanted]}"
                )
            value = np.asarray(inputs[tensor.name])
            if value.dtype != tensor.dtype or value.shape[1:] != tensor.shape[1:] or value.ndim != len(tensor.shape):
                raise ExportError(
                    f"input '{tensor.name}' takes {tensor.dtype} {tensor.shape}, "
                    f"but {value.dtype} {value.shape} was given"
                )
            feeds[tensor.name] = value
        return feeds

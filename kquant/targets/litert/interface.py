"""What a file says of the inputs and outputs of its model: names, in its signature, and how they are nested."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.graph.structure import is_plain, pack, unpack

_ENTRY = "kquant.structure"  # of the file's metadata, where inputs or outputs are not plain


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a file as a user knows them.

    Attributes:
        inputs: names, in the order of the file's inputs.
        input_structure, output_structure: see `graph.structure`; None where they are one tensor or a list.
    """

    inputs: tuple[str, ...]
    input_structure: Any = None
    output_structure: Any = None

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        """One array per input, in the order of the file.

        Args:
            inputs: an array, one per input in their order, a dict by their names, or nested as the model's inputs are.

        Raises:
            ValueError: they do not fit.
        """
        return [np.asarray(x) for x in unpack(self.input_structure, self.inputs, inputs)]

    def nested(self, outputs: Sequence[np.ndarray]) -> Any:
        """The outputs in the structure of the model's; a list where that is one tensor or a list."""
        return list(outputs) if is_plain(self.output_structure) else pack(self.output_structure, outputs)


def structure_metadata(inputs: Any, outputs: Any) -> dict[str, bytes]:
    """The entry that tells how inputs and outputs are nested; none where both are plain."""
    if is_plain(inputs) and is_plain(outputs):
        return {}
    nested = [None if is_plain(structure) else structure for structure in (inputs, outputs)]
    return {_ENTRY: json.dumps(nested).encode()}


def read_interface(content: bytes) -> Interface:
    """What a file says; inputs without a signature have the names of their tensors."""
    model = schema.Model.GetRootAs(content, 0)
    graph = model.Subgraphs(0)
    indices = [graph.Inputs(k) for k in range(graph.InputsLength())]
    names = {index: graph.Tensors(index).Name() or b"" for index in indices}
    if model.SignatureDefsLength():
        signature = model.SignatureDefs(0)
        entries = [signature.Inputs(k) for k in range(signature.InputsLength())]
        names |= {entry.TensorIndex(): entry.Name() for entry in entries}
    structures: list[Any] = [None, None]
    for k in range(model.MetadataLength()):
        entry = model.Metadata(k)
        if entry.Name() == _ENTRY.encode():
            structures = json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return Interface(tuple(names[index].decode() for index in indices), *structures)

r"""Dense layers in blocks of 32 by ai-edge-quantizer, for `experiments.blocks`.

    python aeq_blocks.py FOLDER     (in an environment with ai-edge-quantizer 0.10)

FOLDER holds NAME.tflite, a float FULLY_CONNECTED, and NAME.npz with the rows `x` that it reads. NAME.aeq.tflite becomes
its recipe dynamic_wi4b32 with GPTQ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from ai_edge_quantizer.algorithm_manager import AlgorithmName


def main(folder: str) -> None:
    """Quantize every file of a folder that is not quantized yet."""
    for problem in sorted(Path(folder).glob("*.npz")):
        source, made = problem.with_suffix(".tflite"), problem.with_suffix(".aeq.tflite")
        if made.exists():
            continue
        signature = Interpreter(model_path=str(source)).get_signature_runner()
        name = next(iter(signature.get_input_details()))
        rows = np.load(problem)["x"]
        work = quantizer.Quantizer(str(source), recipe.dynamic_wi4b32_afp32(algorithm_key=AlgorithmName.GPTQ))
        found = work.calibrate({"serving_default": [{name: rows}]})
        work.quantize(found, serialize_to_path=str(made))


if __name__ == "__main__":
    main(sys.argv[1])

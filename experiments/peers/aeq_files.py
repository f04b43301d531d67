r"""Whole files in static integers by ai-edge-quantizer, for `experiments.scenes`.

    python aeq_files.py FOLDER     (in an environment with ai-edge-quantizer 0.10)

FOLDER holds NAME.tflite, float, and NAME.npz with the samples `x` of its input. NAME.static_wi8_ai8.tflite and
NAME.static_wi4_ai8.tflite become its static quantization with 8-bit activations, weights of 8 and of 4 bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe_manager
from ai_edge_quantizer.qtyping import TFLOperationName


def main(folder: str) -> None:
    """Quantize every file of a folder that is not quantized yet."""
    for problem in sorted(Path(folder).glob("*.npz")):
        source = problem.with_suffix(".tflite")
        signature = Interpreter(model_path=str(source)).get_signature_runner()
        name = next(iter(signature.get_input_details()))
        samples = [{name: x[None]} for x in np.load(problem)["x"]]
        for bits in (8, 4):
            made = problem.with_suffix(f".static_wi{bits}_ai8.tflite")
            if made.exists():
                continue
            recipes = recipe_manager.RecipeManager()
            recipes.add_static_config(
                regex=".*",
                operation_name=TFLOperationName.ALL_SUPPORTED,
                activation_num_bits=8,
                weight_num_bits=bits,
            )
            try:
                work = quantizer.Quantizer(str(source), recipes.get_quantization_recipe())
                found = work.calibrate({"serving_default": samples})
                work.quantize(found, serialize_to_path=str(made))
            except (ValueError, RuntimeError) as error:
                print(f"{made.name}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])

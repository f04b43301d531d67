r"""AdaRound of one convolution with AIMET, for `experiments.benchmark --what=adaround`.

    python aimet_adaround.py PROBLEM.npz RESULT.npz     (in an environment with aimet-torch)

PROBLEM holds x [n, h, w, cin], kernel [h, w, cin / groups, cout], bias [cout], groups, bits, iterations and batch.
RESULT gets the rounded kernel, on AIMET's own min-max grid (per channel, scales in `scale`), and the seconds of the
iterations alone and of everything around them.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import library


def _tolerant(register: Callable[..., Any]) -> Callable[..., Any]:
    """torchvision's CPU wheel lacks operators that it registers fakes for; AIMET imports it and uses none."""

    def register_fake(*args: Any, **kwargs: Any) -> Any:
        decorate = register(*args, **kwargs)

        def attempt(function: Any) -> Any:
            try:
                return decorate(function)
            except RuntimeError:
                return function

        return attempt

    return register_fake


library.register_fake = _tolerant(library.register_fake)  # type: ignore[assignment]

from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from aimet_torch.common.defs import QuantScheme  # noqa: E402


def main(problem_file: str, result_file: str) -> None:
    """Round, and write what came out."""
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else torch.get_num_threads())
    problem = np.load(problem_file)
    kernel, batch, iterations = problem["kernel"], int(problem["batch"]), int(problem["iterations"])
    x = torch.from_numpy(np.ascontiguousarray(problem["x"].transpose(0, 3, 1, 2)))
    groups, (height, width) = int(problem["groups"]), kernel.shape[:2]
    conv = torch.nn.Conv2d(x.shape[1], kernel.shape[3], (height, width), padding="same", groups=groups)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))))
        conv.bias.copy_(torch.from_numpy(problem["bias"]))
    model = torch.nn.Sequential(conv, torch.nn.ReLU()).eval()

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, k: int) -> torch.Tensor:
            return x[k]

    loader = torch.utils.data.DataLoader(Images(), batch_size=batch)

    def rounded(steps: int) -> tuple[np.ndarray, np.ndarray, float]:
        parameters = AdaroundParameters(loader, len(loader), default_num_iterations=steps)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = Adaround.apply_adaround(
                model,
                x[:1],
                parameters,
                path=folder,
                filename_prefix="layer",
                default_param_bw=int(problem["bits"]),
                default_quant_scheme=QuantScheme.post_training_tf,
            )
            seconds = time.perf_counter() - start
            encodings = json.loads(Path(folder, "layer.encodings").read_text())
        encodings = next(iter(encodings.get("param_encodings", encodings).values()))
        # the module keeps soft-rounded weights, which its quantizer then rounds
        return (
            result[0].weight.detach().numpy().transpose(2, 3, 1, 0),
            np.array([e["scale"] for e in encodings]),
            seconds,
        )

    _, _, overhead = rounded(1)  # preparing the model and collecting the data is no part of an iteration
    soft, scale, seconds = rounded(iterations)
    half = 2 ** (int(problem["bits"]) - 1)
    found = np.clip(np.rint(soft / scale), -half, half - 1) * scale
    np.savez(result_file, kernel=found.astype(np.float32), scale=scale, seconds=seconds - overhead, overhead=overhead)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

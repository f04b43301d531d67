"""A diagnosis as one of a small MobileNetV1 looks, made by code from a seed."""

import numpy as np

import kquant
from kquant.diagnosis.drawing import draw_boxes
from kquant.diagnosis.pictures import difference, encoded
from kquant.diagnosis.records import (
    ChannelRanges,
    Diagnosis,
    Finding,
    Picture,
    Sensitivity,
    Stage,
    TargetRecord,
    TensorRecord,
)

BLOCKS = 13
SWITCHES_OFF = {"equalize": False, "absorb_bias": False, "adaround": False, "correct_bias": False}
EVIL = "</script><img src=x onerror=alert(1)>&\"'"
EMPTY = {
    "target_score": None,
    "recommendation": None,
    "recommended_score": None,
    "stages": (),
    "findings": (),
    "sensitivity": (),
    "tensors": (),
    "channels": (),
    "target": (),
    "advice": (),
    "model_report": "",
    "pictures": (),
}


def layers() -> list[tuple[str, str, int]]:
    """(name, op, channels) in the order of the network."""
    names = [("conv1", "conv2d", 8)]
    for i in range(1, BLOCKS + 1):
        width = min(256, 8 * 2 ** ((i + 1) // 2))
        names += [
            (f"conv_dw_{i}", "depthwise_conv2d", width // 2 if i % 2 else width),
            (f"conv_pw_{i}", "conv2d", width),
        ]
    return [*names, ("conv_preds", "conv2d", 1000)]


def diagnosis() -> Diagnosis:
    """Per-tensor weights with everything off: wide depthwise channels are the culprit, equalization cures them."""
    rng = np.random.default_rng(0)
    config = kquant.QuantConfig.load({"preset": "w8a8-per_tensor", **SWITCHES_OFF})
    better = kquant.QuantConfig.load({"preset": "w8a8-per_tensor", "equalize": True, "correct_bias": True})
    channels = tuple(_channels(rng, *layer) for layer in layers())
    sensitivity = [s for layer in layers() for s in _sensitivity(rng, *layer)]
    return Diagnosis(
        model="mobilenet_0.25_224",
        samples=1000,
        seconds=171.4,
        metric="top-1 accuracy, %",
        config=config.to_dict(),
        float_score=49.8,
        quantized_score=13.6,
        target_score=13.5,
        culprit="weights",
        verdict="Quantized weights cost 35.9 of the 36.2 points: the depthwise layers have channels up to 60 times "
        "wider than the median one, and one scale per tensor leaves the others a few steps. Equalization and bias "
        "correction bring back 35.0 points.",
        stages=_stages(),
        findings=_findings(),
        sensitivity=tuple(sorted(sensitivity, key=lambda s: s.alone_on)),
        tensors=tuple(t for layer in layers() for t in _tensors(rng, *layer)),
        channels=channels,
        target=tuple(_target(rng, name, op) for name, op, _ in layers()),
        recommendation=better.to_dict(),
        recommended_score=48.6,
        advice=(
            "One scale per channel (config w8a8, target litert) reached 49.1.",
            "Keep conv_dw_6 at 16 bits in the simulation to see what is left there: 48.9.",
            "Quantization-aware training starts from the recommended config: kquant.prepare_qat.",
        ),
        model_report="target: litert_per_tensor\nstep      taken  what, or why not\n"
        "--------  -----  ----------------\nequalize  yes    13 regions, 20 sweeps\n"
        "adaround  no     weights have 8 bits",
        pictures=tuple(_picture(rng, k) for k in (17, 3)),
    )


def _picture(rng: np.random.Generator, sample: int) -> Picture:
    """Squares that two networks see in noise, the second one a bit to the right."""
    image = rng.integers(60, 200, (48, 64, 3)).astype(np.uint8)
    drawn = [draw_boxes(image, np.array([[10.0 + right, 12, 40 + right, 36, 1, 0.9]])) for right in (0, 4)]
    differs = float(np.mean((drawn[0] != drawn[1]).any(-1)))
    files = [encoded(part) for part in (image, *drawn, difference(image, *drawn))]
    names = ("image", "float_drawn", "quantized_drawn", "difference")
    return Picture(sample=sample, differs=differs, **dict(zip(names, files, strict=True)))


def _stages() -> tuple[Stage, ...]:
    rows = [
        (
            "float check",
            "Does the simulation without quantizers equal the float model?",
            49.8,
            "It does, bit for bit.",
            True,
        ),
        (
            "weights only",
            "How much do quantized weights cost alone?",
            13.9,
            "35.9 points: weights are the culprit.",
            False,
        ),
        (
            "activations only",
            "How much do quantized activations cost alone?",
            49.3,
            "0.5 points: nothing to worry.",
            True,
        ),
        ("equalize", "Does cross-layer equalization help?", 46.9, "It brings back 33.3 points.", True),
        ("equalize, correct bias", "Does bias correction help on top?", 48.6, "Another 1.7 points.", True),
        ("per channel", "Would one scale per channel do?", 49.1, "It would, where the hardware allows it.", True),
        ("AdaRound", "Does optimized rounding help?", 48.5, "No: 8 bits leave it nothing to gain.", True),
        (
            "sensitivity",
            "Which layers carry the drop?",
            None,
            "conv_dw_6, conv_dw_10 and conv_dw_8 carry most of it.",
            False,
        ),
        ("target", "Does the file compute what the simulation does?", 13.5, "Within 1 LSB at every operation.", True),
    ]
    return tuple(Stage(name=n, question=q, score=s, verdict=v, ok=ok) for n, q, s, v, ok in rows)


def _findings() -> tuple[Finding, ...]:
    return (
        Finding(
            kind="wide_channels",
            nodes=tuple(f"conv_dw_{i}" for i in (10, 8, 6, 13, 11)),
            text="The widest channel of these layers spans 20 to 60 times the median one; at 8 bits half of the "
            "channels have fewer than 8 steps.",
            remedy="Equalize (equalize: true) or take one scale per channel.",
        ),
        Finding(
            kind="dead_channels",
            nodes=("conv_dw_1", "conv_dw_2"),
            text="14 of 24 channels are zero on all data, yet their weights widen the grid.",
            remedy="Equalization sets them to zero.",
        ),
        Finding(
            kind="saturation",
            nodes=("conv_pw_11",),
            text="3.1 % of the values lie beyond the grid [0, 6].",
            remedy="Calibrate with more data, or the min-max method.",
        ),
    )


def _damage(rng: np.random.Generator, op: str, kind: str) -> float:
    scale = {"depthwise_conv2d": 6.0, "conv2d": 0.4}[op] if kind == "weights" else 0.15
    return float(rng.gamma(0.7, scale))


def _sensitivity(rng: np.random.Generator, name: str, op: str, _: int) -> list[Sensitivity]:
    rows = []
    for kind in ("weights", "activations"):
        lost = _damage(rng, op, kind)
        rows.append(
            Sensitivity(
                node=name,
                layer=name,
                op=op,
                kind=kind,
                bits=8,
                alone_on=49.8 - lost,
                alone_off=13.6 + 0.6 * lost,
                sqnr=32 - 8 * float(np.log10(lost + 0.01)),
            )
        )
    return rows


def _channels(rng: np.random.Generator, name: str, op: str, count: int) -> ChannelRanges:
    spread = 1.3 if op == "depthwise_conv2d" else 0.4
    wide = np.exp(rng.normal(-1, spread, count))
    after = wide**0.15 * 0.8
    sides = rng.uniform(0.6, 1.0, (2, count))
    before, equal = (
        tuple((-w * a, -w * a / 4, 0.0, w * b / 4, w * b) for w, a, b in zip(x.tolist(), *sides.tolist(), strict=True))
        for x in (wide, after)
    )
    return ChannelRanges(node=name, before=before, after=equal)


def _tensors(rng: np.random.Generator, name: str, op: str, count: int) -> list[TensorRecord]:
    rows = []
    for kind in ("weights", "activations"):
        scale = float(rng.uniform(0.2, 2))
        values = (
            rng.laplace(0, scale, 20_000) if kind == "weights" else np.maximum(rng.normal(0.3, scale * 3, 20_000), 0)
        )
        counts, edges = np.histogram(values, 256)
        low, high = np.quantile(values, [0.0005, 0.9995])
        noise = (high - low) / 255 / np.sqrt(12)
        rows.append(
            TensorRecord(
                node=name if kind == "weights" else f"{name}_relu",
                layer=name,
                op=op,
                kind=kind,
                bits=8,
                low=float(low),
                high=float(high),
                seen_low=float(values.min()),
                seen_high=float(values.max()),
                sqnr=float(20 * np.log10(values.std() / noise)),
                saturated=float(np.mean((values < low) | (values > high))),
                channel_ratio=float(np.exp(rng.normal(1, 1))),
                dead_channels=int(rng.integers(0, 3)) if count < 20 else 0,
                counts=tuple(int(c) for c in counts),
                edges=tuple(float(e) for e in edges),
            )
        )
    return rows


def _target(rng: np.random.Generator, name: str, op: str) -> TargetRecord:
    off = float(rng.random() < 0.2)
    return TargetRecord(node=name, op=op, alone=off, propagated=off * 0.02, equal=1 - off * 0.02)

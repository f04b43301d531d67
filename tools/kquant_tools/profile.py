r"""What a .tflite file or a Keras model costs: bytes, multiplications, latency, memory, flash, by layer.

kquant-profile --model=model.tflite --target=tflm --html=profile.html
kquant-profile --model=quantized.keras --latencies=phone.json --measure=false

Latencies are measured on this machine with one thread, once for every kind of operator, and kept in --latencies (by
default in the user's cache folder). --measure=false takes those of --latencies as they are: of another device, where
this command wrote them.
"""

from __future__ import annotations

from absl import flags

from . import common
from .diagnose import HTML, JSON
from .quantize import TARGET

LATENCIES = flags.DEFINE_string("latencies", None, "JSON file of latencies by operator.")
MEASURE = flags.DEFINE_boolean("measure", True, "Measure what --latencies lacks on this machine.")
THREADS = flags.DEFINE_integer("threads", 1, "Threads of the measurement.", 1)
OWN = (common.MODEL, TARGET, LATENCIES, MEASURE, THREADS, JSON, HTML)


def main(argv: list[str]) -> None:
    """Profile, print the table, write the files."""
    json, html = common.writable(JSON.value, ".json"), common.writable(HTML.value, ".html")
    import kquant

    source = common.MODEL.value
    as_it_is = LATENCIES.value is not None and not MEASURE.value
    found = kquant.profile(
        source if source.endswith(".tflite") else common.load_model(source),
        TARGET.value or "litert",
        latency=LATENCIES.value if as_it_is else MEASURE.value,
        cache=LATENCIES.value,
        threads=THREADS.value,
    )
    print(found)
    common.write_result(found, json, html)


def run() -> None:
    """Console script."""
    common.launch(main, __doc__, OWN)


if __name__ == "__main__":
    run()

r"""Search the bits of every layer for a file within budgets, or for the smallest within a drop of accuracy.

kquant-search --model=float.keras --data=calibration.npz --max_bytes=160000 --found=mixed.yaml --html=search.html
kquant-search --model=float.keras --data=labelled.npz --max_drop=0.5 --resume=state.json --found=mixed.yaml
kquant-quantize --model=float.keras --data=calibration.npz --config=mixed.yaml --tflite=mixed.tflite

Data are a few hundred samples, with labels where accuracy counts: a third of them is held out. --resume keeps what was
evaluated; the command may be stopped at any time, and goes on from it. Budgets are bytes, and seconds for latency. The
config is --config with the changes of the other flags, as for kquant-quantize.
"""

from __future__ import annotations

from absl import app, flags

from . import common
from .diagnose import HTML, JSON, RESUME
from .quantize import CONFIG_FLAGS, PROGRESS, SEED, TARGET, config_of_flags

MAX_BYTES = flags.DEFINE_float("max_bytes", None, "Largest size of the file.")
MAX_LATENCY = flags.DEFINE_float("max_latency", None, "Most seconds of an inference on LiteRT.")
MAX_ARENA = flags.DEFINE_float("max_arena", None, "Most bytes of arena or SRAM on the target's device.")
MAX_FLASH = flags.DEFINE_float("max_flash", None, "Most bytes of flash on the target's device.")
MAX_DROP = flags.DEFINE_float("max_drop", None, "The most that the metric may lose; the smallest file is looked for.")
STRATEGY = flags.DEFINE_string("strategy", "milp", "milp, greedy or evolution.")
EFFORT = flags.DEFINE_integer("effort", 2, "Rounds of forward passes.", 1)
TABLE = flags.DEFINE_string("latency_table", None, "Latencies of another device, as kquant-profile keeps them (.json).")
FOUND = flags.DEFINE_string("found", None, "Write the config here (.yaml).")
OWN = (MAX_BYTES, MAX_LATENCY, MAX_ARENA, MAX_FLASH, MAX_DROP, STRATEGY, EFFORT, TABLE, FOUND)


def main(argv: list[str]) -> None:
    """Search, print what was found, write the files."""
    if common.DATA.value is None:
        raise app.UsageError("Pass the data to search with: --data=...")
    html, json = common.writable(HTML.value, ".html"), common.writable(JSON.value, ".json")
    config_path = common.writable(FOUND.value, ".yaml")
    import kquant

    config = config_of_flags()
    model = common.load_model(common.MODEL.value)
    result = kquant.search(
        model,
        common.load_data(model),
        common.metric_of_flags(),
        config=config,
        max_bytes=MAX_BYTES.value,
        max_latency=MAX_LATENCY.value,
        max_arena=MAX_ARENA.value,
        max_flash=MAX_FLASH.value,
        max_drop=MAX_DROP.value,
        target=TARGET.value or "litert",
        solver=STRATEGY.value,
        seed=SEED.value,
        progress=PROGRESS.value,
        resume=RESUME.value,
        latencies=None if TABLE.value is None else kquant.LatencyTable.load(TABLE.value),
        effort=EFFORT.value,
    )
    print(result)
    if config_path is not None:
        result.config.save(config_path)
        print(f"wrote {config_path}")
    common.write_result(result, json, html)


def run() -> None:
    """Console script."""
    shared = (common.MODEL, *common.DATA_FLAGS, common.METRIC, RESUME, HTML, JSON, SEED, PROGRESS)
    common.launch(main, __doc__, [*shared, *CONFIG_FLAGS, *OWN])


if __name__ == "__main__":
    run()

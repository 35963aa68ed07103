"""Pictures of what the benches wrote: `python -m bench.plots DIR` reads DIR/*.jsonl and writes PNGs next to them.

  latency.png   decode ms per token and prefill seconds against context, one line per preset
  speedup.png   the same, over our own dense
  roofline.png  kernels: FLOP/s against arithmetic intensity under the limits measured in the same run, and their shares

A picture shows one device, that of the newest line. If there are several lines for one point, the newest counts.
"""

import sys
from pathlib import Path

from bench.command_line import command_parser
from bench.e2e.curves import latency, speedup
from bench.figures import save
from bench.kernels.roofline import roofline
from bench.log import read_lines


def main(arguments: list[str] | None = None) -> int:
    """Draws all pictures with data; returns 1 if there is no data."""
    parser = command_parser("bench.plots", __doc__)
    parser.add_argument("folder", type=Path, help="where the benches wrote their *.jsonl")
    folder = parser.parse_args(arguments).folder
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file)]
    figures = {"latency.png": latency(lines), "speedup.png": speedup(lines), "roofline.png": roofline(lines)}
    return save(figures, folder)


if __name__ == "__main__":
    sys.exit(main())

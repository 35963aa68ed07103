"""What goes into a device's table of launch configurations."""

import json
from pathlib import Path
from typing import Any

from bench import tune


def tuned(workload: str, change: dict[str, int], median: float, spread: float = 0.01) -> dict[str, Any]:
    quartiles = [median * (1 - spread / 2), median * (1 + spread / 2)]
    labels = {"kind": "tune", "kernel": "op", "shape": "s", "workload": workload, "change": change}
    return {**labels, "median_ms": median, "quartiles_ms": quartiles}


def test_only_what_beats_the_heuristic_by_more_than_the_noise_goes_into_the_table(tmp_path: Path):
    faster = {"splits": 4}
    assert tune.choose([tuned("a", {}, 1.0), tuned("a", faster, 0.9)]) == {"op": {"s": faster}}
    assert tune.choose([tuned("a", {}, 1.0), tuned("a", faster, 0.985)]) == {}
    assert tune.choose([tuned("a", {}, 1.0, spread=0.2), tuned("a", faster, 0.9)]) == {}
    assert tune.choose([tuned("a", faster, 0.9)]) == {}
    # Another workload of the same shape, where it is not measured, and where it is slower.
    both = [tuned("a", {}, 1.0), tuned("a", faster, 0.8), tuned("b", {}, 1.0)]
    assert tune.choose(both) == {}
    assert tune.choose([*both, tuned("b", faster, 1.1)]) == {}
    assert tune.choose([*both, tuned("b", faster, 0.99)]) == {"op": {"s": faster}}
    file = tmp_path / "tuned" / "device.json"
    tune.merge({"op": {"s": faster}}, file)
    tune.merge({"op": {"t": {"stages": 2}}}, file)
    assert json.loads(file.read_text()) == {"op": {"s": faster, "t": {"stages": 2}}}

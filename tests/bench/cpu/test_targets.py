"""The table of targets."""

from bench.cpu.medians import medians
from bench.cpu.targets import targets_table
from tests.bench.cpu.samples import RESULTS


def test_targets_are_ratios_of_medians_in_the_same_run():
    table = {line.split("  ")[0]: line.split()[-4:] for line in targets_table(medians(RESULTS)).split("\n")}
    assert table["prefill 2K over transformers bf16"][-4:] == ["0.96", "short", "by", "4%"]
    assert table["decode 2K over llama.cpp F16"][-2:] == ["1.25", "PASS"], "against the faster of its settings"
    assert table["decode ms, 8K over 1K"][-4:] == ["1.39", "over", "by", "7%"]
    assert table["decode 8K over our dense"][-4:] == ["1.20", "short", "by", "25%"]
    assert table["prefill 8K over our dense"][-4:] == ["1.20", "short", "by", "8%"]
    assert table["prefill 8K over transformers bf16"][-2:] == ["not", "measured"]
    assert table["peak memory over the plan, largest"][-2:] == ["1.04", "PASS"]

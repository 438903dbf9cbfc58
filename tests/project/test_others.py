"""What others have is on one page, and all that it says is here is here."""

import importlib.util
import pathlib
import re

import pytest

import yoto_jax as yoto
from yoto_jax import conditional, monitoring, racing

PAGE = pathlib.Path(yoto.__file__).parent.parent / "docs/understand/others.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| ---")
]
OURS = {code for row in ROWS for code in re.findall(r"`([\w.]+)`", row[1])}
OPTIONS = {"lookahead", "keep", "chunk_size", "present", "axis_name", "param_specs"}


def test_every_weighting_is_on_the_page():
    assert set(yoto.weightings.methods()) <= OURS


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_is_said_to_be_here_is_here(name):
    parts = name.split(".")
    homes = (yoto, yoto.weightings, conditional, monitoring, racing)
    assert importlib.util.find_spec(f"yoto_jax.{parts[0]}") or any(
        hasattr(home, parts[0]) for home in homes
    )
    if len(parts) > 1:
        assert hasattr(importlib.import_module(f"yoto_jax.{parts[0]}"), parts[1])


# Names of TorchJD 0.18 that are ours under another one, or none of a method.
TORCHJD = {
    "CRMOGM": "CR-MOGM", "DualProj": "DualProj", "FairGrad": "FairGrad",
    "IMTLG": "IMTL", "IMTLL": "IMTL", "NashMTL": "Nash-MTL", "Random": "random weights",
    "AlignedMTL": "Aligned-MTL", "GeometricMean": "geometric", "UW": "uncertainty",
    "Constant": "constant", "Mean": "mean", "Sum": "sum", "TrimmedMean": "trimmed mean",
    "PCD": "priority-constrained", "DWA": "dynamic weight average",
    "STCH": "smooth Chebyshev",
}  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("torchjd") is None, reason="TorchJD is not installed"
)
def test_all_of_torchjd_is_on_the_page():
    page = PAGE.read_text().lower()
    for module in ("aggregation", "scalarization"):
        found = importlib.import_module(f"torchjd.{module}").__all__
        names = {name.removesuffix("Weighting") for name in found}
        for name in names - {"", "Aggregator", "Scalarizer"}:
            if not name.endswith("Aggregator"):
                assert TORCHJD.get(name, name).lower() in page, name

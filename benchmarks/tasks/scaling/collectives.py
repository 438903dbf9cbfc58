"""What a compiled program sends between devices, and what it holds in memory."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

OPERATIONS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_LINE = re.compile(rf"= (.+?) ({'|'.join(OPERATIONS)})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_BITS = {"pred": 8}


class Traffic(NamedTuple):
    """Collective operations of one step."""

    count: int
    bytes: int  # of the results, on each device
    operations: tuple[tuple[str, int], ...]  # bytes of each, in the order of the text


def traffic(compiled: Any) -> Traffic:
    """The collective operations in the optimised program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := _LINE.search(line):
            shapes = _SHAPE.findall(match[1])
            size = sum(
                _BITS.get(kind, int(bits or 8)) // 8 * math.prod(_dims(dims))
                for kind, bits, dims in shapes
            )
            found.append((match[2], size))
    return Traffic(len(found), sum(size for _, size in found), tuple(found))


def _dims(text: str) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def added(traffic: Traffic, plain: Traffic) -> Traffic:
    """What a program sends beyond a plain one."""
    rest = Counter(traffic.operations)
    rest.subtract(Counter(plain.operations))
    left = tuple((+rest).elements())
    return Traffic(
        traffic.count - plain.count, traffic.bytes - plain.bytes, tuple(left)
    )


def peak_bytes(compiled: Any) -> int:
    """Memory that a program needs at its peak, with what it is given and returns."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )

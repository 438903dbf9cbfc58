"""What a step of each rule costs, and what runs side by side gain."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import Rule, Task, prepare


def step_ratios(
    task: Task,
    rules: dict[str, tuple[Rule, dict[str, Any]]],
    baseline: str,
    rounds: int,
) -> dict[str, np.ndarray]:
    """Time of a step of each rule over that of the baseline, in turns, one lane each.

    Returns:
      The ratio in each round.
    """
    lanes = {name: (rule, [config]) for name, (rule, config) in rules.items()}
    seconds = _seconds(task, lanes, rounds)
    return {name: taken / seconds[baseline] for name, taken in seconds.items()}


def sweep_speed(
    task: Task, rule: Rule, config: dict[str, Any], lanes: int, rounds: int
) -> np.ndarray:
    """How many times faster so many runs are in one program than one by one.

    Returns:
      The ratio in each round. Compilation, once instead of for each run, is apart.
    """
    groups = {"one": (rule, [config]), "all": (rule, [config] * lanes)}
    seconds = _seconds(task, groups, rounds)
    return lanes * seconds["one"] / seconds["all"]


def _seconds(
    task: Task, groups: dict[str, tuple[Rule, list[dict[str, Any]]]], rounds: int
) -> dict[str, np.ndarray]:
    """Time of some steps of each group of lanes, in turns; [rounds] each."""
    length = min(20, task.steps)
    programs, carries = {}, {}
    for name, (rule, configs) in groups.items():
        config, seeds = rule.configure(configs), jnp.arange(len(configs))
        one = jax.local_devices()[:1]
        program = prepare(task, rule, config, len(configs), length, one)
        carries[name] = program.init(seeds, config)
        programs[name] = (program.advance, (task.data, seeds, config))
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(rounds + 1):
        for name, (advance, arguments) in programs.items():
            started = time.perf_counter()
            carries[name], _ = jax.block_until_ready(advance(carries[name], *arguments))
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up.
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}

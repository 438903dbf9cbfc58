"""Train one task under many ways of weighting its losses, and lose nothing if killed.

A run is one model trained once: a rule, a configuration of it and a seed. Every
finished run is a line in a file; ``--resume`` reads them back and continues a group of
lanes that was under way from where it was last saved. A run does not depend on when it
was interrupted.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress

from benchmarks.harness import lanes as lane_devices
from benchmarks.harness.results import rounded, thinned_curves
from benchmarks.harness.storage import (
    UNREADABLE,
    append_line,
    has_lines,
    read_arrays,
    read_lines,
    start_lines,
    write_arrays,
)
from benchmarks.harness.terminal import console, say
from benchmarks.harness.training import Carry, PyTree, Rule, Task, prepare

SAVE_SECONDS = 20.0
HISTORY_POINTS = 60
CHOOSING = "choosing"
"""Metric: what a rule spends on choosing weights, relative to training."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One model, trained once."""

    rule: str
    seed: int
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The run as text: what its line in the file is found by."""
        entry = {"rule": self.rule, "seed": self.seed, "config": dict(self.config)}
        return json.dumps(entry, sort_keys=True)


def settings(**config: Any) -> tuple[tuple[str, Any], ...]:
    """A configuration in a form that can be compared."""
    return tuple(sorted(config.items()))


def train(task: Task, rule: Rule, run: Run) -> PyTree:
    """The model of one run."""
    # As many lanes as everywhere, so that the program is there already.
    config = rule.configure([dict(run.config)] * task.lanes)
    seeds = jnp.full(task.lanes, run.seed)
    program = prepare(task, rule, config, task.lanes)
    carry = program.init(seeds, config)
    for part in range(program.chunks):
        carry, _ = program.advance(carry, task.data, seeds, config)
        carry = rule.after(task, carry, part + 1, program.chunks)
    models, _ = rule.finish(task, lane_devices.gathered(carry), seeds)
    return jax.tree.map(lambda x: x[0], models)


class Finished(NamedTuple):
    """What is kept of a run."""

    values: dict[tuple[str, str | None], float]
    history: dict[str, Any]  # "step", and of each loss its "losses" and "weights"
    seconds: float

    @property
    def cost(self) -> float:
        """Training and choosing weights, relative to training alone."""
        return 1 + self.values.get((CHOOSING, None), 0.0)


class Runs:
    """Runs of one task: those in the file, and those that are missing."""

    def __init__(
        self,
        task: Task,
        rules: dict[str, Rule],
        folder: Path,
        *,
        resume: bool,
        planned: int,
        devices: lane_devices.Devices | None = None,
    ):
        """Read what there is, or start.

        Args:
          task: What is trained.
          rules: By the names that runs have for them.
          folder: For the files.
          resume: Whether to go on with what is there.
          planned: How many runs there will be, for the progress bar.
          devices: That lanes are spread over, as in :func:`prepare`. What was done on
            some can be gone on with on others; numbers then differ by rounding.
        """
        self.task, self.rules, self.devices = task, rules, devices
        self.path = folder / f"{task.name}.runs.jsonl"
        self.partial = folder / f"{task.name}.partial.npz"
        self.finished: dict[str, Finished] = {}
        self.planned, self._trained = planned, 0
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.header = json.dumps({"task": task.name, **task.settings}, sort_keys=True)
        if resume and has_lines(self.path):
            self._read()
        else:
            self.partial.unlink(missing_ok=True)
            start_lines(self.path, self.header)
        self.resumed = len(self.finished)
        self._bar = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._row = self._bar.add_task(task.name, total=planned, completed=self.resumed)

    def _read(self) -> None:
        for line in read_lines(self.path, self.header):
            entry = json.loads(line)
            self.finished[entry["run"]] = Finished(
                {(m, d): float(v) for m, d, v in entry["values"]},
                entry["history"],
                entry["seconds"],
            )

    def finish(self, runs: Sequence[Run], description: str) -> list[Finished]:
        """These runs, trained unless they are in the file, in this order."""
        missing = [run for run in runs if run.key not in self.finished]
        lanes = self.task.lanes
        with self._bar if missing else contextlib.nullcontext():
            for rule in dict.fromkeys(run.rule for run in missing):
                group = [run for run in missing if run.rule == rule]
                for first in range(0, len(group), lanes):
                    self._train(group[first : first + lanes], description)
        return [self.finished[run.key] for run in runs]

    def _train(self, runs: list[Run], description: str) -> None:
        task = self.task
        rule = self.rules[runs[0].rule]
        # Lanes left over repeat the last run: one program serves every group.
        filled = runs + [runs[-1]] * (task.lanes - len(runs))
        config = rule.configure([dict(run.config) for run in filled])
        seeds = jnp.array([run.seed for run in filled])
        program = prepare(task, rule, config, task.lanes, None, self.devices)
        carry = program.init(seeds, config)
        group = json.dumps([run.key for run in filled])
        carry, parts, (seconds, choosing) = self._saved(group, carry)
        saved = time.monotonic()
        for _ in range(len(parts), program.chunks):
            started = time.monotonic()
            carry, seen = jax.block_until_ready(
                program.advance(carry, task.data, seeds, config)
            )
            parts.append(jax.device_get(seen))
            seconds += time.monotonic() - started
            started = time.monotonic()
            carry = rule.after(task, carry, len(parts), program.chunks)
            choosing += time.monotonic() - started
            share = len(runs) * len(parts) / program.chunks
            self._bar.update(
                self._row,
                completed=self.resumed + self._trained + share,
                description=description,
            )
            if time.monotonic() - saved > SAVE_SECONDS and len(parts) < program.chunks:
                self._save(group, carry, parts, (seconds, choosing))
                saved = time.monotonic()
        losses, weights = (np.concatenate(x) for x in zip(*parts, strict=True))
        carry = lane_devices.gathered(carry)
        models, chosen = rule.finish(task, carry, seeds)
        if chosen is not None:  # Once more, without the compilation, for the time.
            started = time.monotonic()
            rule.finish(task, carry, seeds)
            choosing += time.monotonic() - started
        measured = {k: np.asarray(v) for k, v in task.measure(models).items()}
        last = max(1, len(losses) // 20)
        for i, name in enumerate(task.names):
            measured[f"loss:{name}", None] = losses[-last:, :, i].mean(0)
            final = weights[-1, :, i] if chosen is None else chosen[name]
            measured[f"weight:{name}", None] = final
        if chosen is not None:
            share = np.full(task.lanes, choosing / seconds)
            measured[CHOOSING, None] = share
        done = {
            run: Finished(
                {k: rounded(v[lane]) for k, v in measured.items()},
                thinned(task.names, losses[:, lane], weights[:, lane]),
                rounded(seconds / len(runs)),
            )
            for lane, run in enumerate(runs)
        }
        append_line(self.path, "\n".join(itertools.starmap(_line, done.items())))
        self.finished |= {run.key: finished for run, finished in done.items()}
        self.partial.unlink(missing_ok=True)
        self._trained += len(runs)
        self._bar.update(self._row, completed=self.resumed + self._trained)
        if not console.is_terminal:
            self._report(description, seconds)

    def _report(self, description: str, seconds: float) -> None:
        done = self.resumed + self._trained
        each = (time.monotonic() - self._started) / self._trained
        left = max(self.planned - done, 0) * each
        say(
            f"{self.task.name}: {done} of {self.planned} runs, about "
            f"{left / 60:.0f} min left ({description}: {seconds:.1f} s)"
        )

    def _save(
        self, group: str, carry: Carry, parts: list[Any], seconds: tuple[float, float]
    ) -> None:
        leaves = [np.asarray(_bare(leaf)) for leaf in jax.tree.leaves(carry)]
        arrays = {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
        for i, (losses, weights) in enumerate(parts):
            arrays |= {f"losses {i}": losses, f"weights {i}": weights}
        about = {
            "header": self.header,
            "group": group,
            "parts": len(parts),
            "seconds": seconds,
        }
        known = {name: np.asarray(value) for name, value in about.items()}
        write_arrays(self.partial, known | arrays)

    def _saved(
        self, group: str, fresh: Carry
    ) -> tuple[Carry, list[Any], tuple[float, float]]:
        """What was saved of this group of runs, or a fresh start."""
        if not self.partial.is_file():
            return fresh, [], (0.0, 0.0)
        leaves, structure = jax.tree.flatten(fresh)
        try:
            saved = read_arrays(self.partial)
            if (str(saved["header"]), str(saved["group"])) != (self.header, group):
                return fresh, [], (0.0, 0.0)
            stored = [saved[f"leaf {i}"] for i in range(len(leaves))]
            parts = [
                (saved[f"losses {i}"], saved[f"weights {i}"])
                for i in range(int(saved["parts"]))
            ]
            training, choosing = map(float, saved["seconds"])
        except UNREADABLE as error:
            say(f"{self.partial} cannot be used: {error}. Its runs start again.")
            return fresh, [], (0.0, 0.0)
        kinds = [(x.shape, x.dtype) for x in map(_bare, leaves)]
        if [(x.shape, x.dtype) for x in stored] != kinds:
            say(f"{self.partial} is of another version. Its runs start again.")
            return fresh, [], (0.0, 0.0)
        stored = [_like(x, leaf) for x, leaf in zip(stored, leaves, strict=True)]
        return structure.unflatten(stored), parts, (training, choosing)


def _bare(leaf: jax.Array) -> jax.Array:
    """A random key as the numbers it is made of; any other array as it is."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _like(stored: np.ndarray, leaf: jax.Array) -> jax.Array:
    """The inverse of :func:`_bare`."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(stored))
    return jnp.asarray(stored)


def _line(run: Run, done: Finished) -> str:
    values = [[metric, domain, v] for (metric, domain), v in done.values.items()]
    entry = {
        "run": run.key,
        "values": values,
        "history": done.history,
        "seconds": done.seconds,
    }
    return json.dumps(entry, separators=(",", ":"))


def thinned(
    names: Sequence[str], losses: np.ndarray, weights: np.ndarray
) -> dict[str, Any]:
    """Losses and weights [steps, K + 1] over time, averaged over stretches of steps."""
    by_name = lambda curves: dict(zip(names, curves.T, strict=True))
    curves = {"losses": by_name(losses), "weights": by_name(weights)}
    return thinned_curves(curves, HISTORY_POINTS)

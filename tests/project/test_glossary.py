"""Public signatures speak one language: one word, one meaning, one way to pass it."""

import collections
import inspect
import pathlib
import re

import pytest

import yoto_jax
import yoto_jax.checkpoints
import yoto_jax.linen
import yoto_jax.nnx
from yoto_jax import conditional, monitoring, racing, weightings

ROOT = pathlib.Path(__file__).parent.parent.parent
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
MODULES = (
    yoto_jax,
    weightings,
    conditional,
    monitoring,
    racing,
    yoto_jax.checkpoints,
    yoto_jax.linen,
    yoto_jax.nnx,
)

# What a parameter must not be called, and what it is called instead.
SYNONYMS = {
    "rho": "hyperparameter_decay",
    "lam": "weights",
    "lambda_": "weights",
    "task_weights": "weights",
    "learned": "mu",
    "loss_logits": "mu",
    "layout": "structure",
    "treedef": "structure",
    "place": "index",
    "tasks": "losses",
    "task_losses": "losses",
    "loss_values": "losses",
    "num_tasks": "losses",
    "main": "primary",
    "basic": "primary",
    "loss_function": "loss_fn",
    "objective_fn": "loss_fn",
    "model_params": "params",
    "parameters": "params",
    "optimizer_state": "opt_state",
    "opt": "optimizer",
    "tx": "optimizer",
    "lr": "learning_rate",
    "momentum_decay": "momentum",
    "rng": "key",
    "seed": "key",
    "prng_key": "key",
    "mask_present": "present",
    "labelled": "present",
    "aux": "has_aux",
    "axis": "axis_name",
    "n_chunks": "chunk_size",
    "chunks": "chunk_size",
}
INNER = ("LossLogits", "LossSpec", "Method", "OutlierRule", "Paper")
"""Classes that the library makes, or that only authors of methods call."""

# Parameters that vary from function to function, and why. An entry fails, too, once it
# does not vary any more.
PAPERS = "the setting of each paper"
MEANINGS = "another meaning in each"
REQUIRED = "optional where there is a natural choice"
MAIN = "may go without its name where it is the main option"
DEFAULTS = {
    "alpha": PAPERS,
    "beta": PAPERS,
    "choice_decay": REQUIRED,
    "decay": PAPERS,
    "downstream": REQUIRED,
    "eps": PAPERS,
    "every": "a look at gradients costs more than one at weights",
    "form": PAPERS,
    "gamma": PAPERS,
    "groups": REQUIRED,
    "hidden": "a trunk for all parameters is narrower than one for each layer",
    "hyperparameter_decay": "SGD and Adam scale gradients differently",
    "index": MEANINGS,
    "initial": PAPERS,
    "keep": MEANINGS,
    "key": REQUIRED,
    "learning_rate": PAPERS,
    "length": "a look at gradients is longer than one at weights",
    "method": MEANINGS,
    "losses": "an optimizer does without where nothing is to be skipped by them",
    "normalize": MEANINGS,
    "penalty": PAPERS,
    "primary": REQUIRED,
    "regularization": PAPERS,
    "scale": MEANINGS,
    "step": REQUIRED,
    "support": REQUIRED,
    "temperature": PAPERS,
    "warmup": PAPERS,
    "weights": REQUIRED,
    "weight_decay": "as in Optax",
}
KINDS = {
    "b1": "as in Optax",
    "b2": "as in Optax",
    "choice_decay": MAIN,
    "downstream": MAIN,
    "eps": "as in Optax",
    "epsilon": "fields of a Flax module have no kind",
    "gamma": MAIN,
    "groups": MAIN,
    "hidden": "fields of a Flax module have no kind",
    "hyperparameter_decay": "as weight_decay in Optax",
    "index": MAIN,
    "key": MAIN,
    "learning_rate": "as in Optax",
    "losses": "an extra argument of an optimizer",
    "mask": "as in Optax",
    "scale": MAIN,
    "step": MAIN,
    "support": MAIN,
    "temperature": MAIN,
}
FLAX = {"name", "parent"}
"""Fields that Flax adds to every module."""


def public():
    """Paths and objects of everything that is exported."""
    for module in MODULES:
        own = [
            name
            for name, thing in vars(module).items()
            if getattr(thing, "__module__", "") == module.__name__
        ]
        for name in getattr(module, "__all__", own):  # Some are imported when needed.
            if not name.startswith("_"):
                path = f"{module.__name__}.{name}"
                yield (
                    path.removeprefix("yoto_jax.") if path.count(".") > 1 else path,
                    (getattr(module, name)),
                )


def is_inner(kind):
    return hasattr(kind, "_fields") or kind.__name__ in INNER


def callables():
    """Functions, and classes that users call with their public methods."""
    for path, thing in public():
        if inspect.isfunction(thing):
            yield path, thing
        if inspect.isclass(thing) and not is_inner(thing):
            if inspect.isfunction(thing.__init__):
                yield path, thing
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{path}.{method}", function


def uses():
    """By name of a parameter: who takes it, and how."""
    found = collections.defaultdict(dict)
    for path, function in callables():
        for parameter in inspect.signature(function).parameters.values():
            variadic = (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.kind in variadic or parameter.name in {"self", *FLAX}:
                continue
            found[parameter.name][path] = parameter
    return dict(found)


USES = uses()


def varying(trait):
    """Parameters that are not alike everywhere, with each way and who has it."""
    found = {}
    for name, takers in USES.items():
        ways = collections.defaultdict(list)
        for path, parameter in takers.items():
            ways[trait(parameter)].append(path)
        if len(ways) > 1:
            found[name] = dict(ways)
    return found


def default(parameter):
    return "none" if parameter.default is parameter.empty else repr(parameter.default)


def kind(parameter):
    return parameter.kind.description


@pytest.mark.parametrize(
    ("trait", "listed"),
    [(default, DEFAULTS), (kind, KINDS)],
    ids=["default", "kind"],
)
def test_a_parameter_is_the_same_everywhere_or_listed_with_a_reason(trait, listed):
    found = varying(trait)
    unlisted = {name: ways for name, ways in found.items() if name not in listed}
    assert not unlisted, "unify these, or list them with a reason"
    alike = sorted(set(listed) - set(found))
    assert not alike, "these do not vary any more: take them off the list"


def test_no_parameter_has_a_synonym_for_a_name():
    found = {
        f"{path}({name}): {SYNONYMS[name]}"
        for name in set(USES) & set(SYNONYMS)
        for path in USES[name]
    }
    assert not found, "these are called otherwise elsewhere"


def test_no_name_is_a_synonym_of_another():
    assert not set(SYNONYMS) & set(SYNONYMS.values())


def rows():
    """Term, names in code, and meaning: of each row of the tables."""
    for line in GLOSSARY.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] not in ("term", "---"):
            yield cells


def test_the_glossary_names_parameters_that_there_are():
    table = list(rows())
    assert len(table) > 40
    for term, code, _ in table:
        for name in re.findall(r"`(\w+)`", code):
            assert name in USES, f"{term}: no public function has a parameter {name!r}"


def test_the_glossary_has_no_term_twice():
    terms = [term for term, *_ in rows()]
    assert len(set(terms)) == len(terms)


COMMON = 4
"""A parameter of so many functions or more has to be in the glossary."""


def test_common_parameters_are_in_the_glossary():
    named = {name for _, code, _ in rows() for name in re.findall(r"`(\w+)`", code)}
    own = {name for name in DEFAULTS if DEFAULTS[name] in (PAPERS, MEANINGS)}
    common = {name for name, takers in USES.items() if len(takers) >= COMMON}
    assert common - own <= named

"""What a method is in the table: its line, what it takes and gives, and how a step of its kind is driven."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from modelwright.core.errors import UserError


def source_of(module: str) -> Path:
    """The source file of a module, found without importing it."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None:
        raise UserError(f"{module} has no source", f"the package {package} is not installed", "install it again")
    if not spec.submodule_search_locations:
        return Path(spec.origin or "")
    at = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return at / "__init__.py" if at.is_dir() else at.with_suffix(".py")


@dataclass(frozen=True)
class Shape:
    """What a kind of method takes and gives: checkpoint, dataset, reward (a reward model), scores. One that gives nothing only measures."""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    may_take: tuple[str, ...] = ()
    loads_in: str = ""
    driver: Literal["curate", "reshape", "tune", "measure"] = "measure"  # the file of runner/ that drives it
    may_only_measure: bool = False  # with some settings it gives nothing: the command line does not ask for a place


@dataclass(frozen=True)
class Entry:
    """One method: its name (family.method), one line, its papers (arXiv numbers or words), and the module that holds it."""

    name: str
    line: str
    paper: str
    shape: Shape
    module: str
    loads_in: str

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @property
    def takes(self) -> tuple[str, ...]:
        return self.shape.takes

    @property
    def gives(self) -> tuple[str, ...]:
        return self.shape.gives

    @property
    def may_take(self) -> tuple[str, ...]:
        return self.shape.may_take

    @property
    def file(self) -> Path:
        """The method's source file, found without importing it."""
        return source_of(self.module)


def method(name: str, line: str, paper: str, shape: Shape, *, module: str = "", loads_in: str = "") -> Entry:
    """One line of the table. The module is modelwright.FAMILY.METHOD unless given; its name METHOD is the function or class."""
    return Entry(name, line, paper, shape, module or f"modelwright.{name}", loads_in or shape.loads_in)


STOCK = "transformers, vLLM"
OURS = "transformers, after `import modelwright.models`"
RESHAPES = Shape(takes=("checkpoint",), gives=("checkpoint",), loads_in=STOCK, driver="reshape")
CREATES = Shape(takes=("dataset",), gives=("checkpoint",), loads_in=STOCK, driver="reshape")
TUNES = Shape(takes=("checkpoint", "dataset"), gives=("checkpoint",), loads_in=STOCK, driver="tune")
GATHERS = Shape(  # trains, and names its own sources
    takes=("checkpoint",), may_take=("dataset",), gives=("checkpoint",), loads_in=STOCK, driver="tune"
)
REWARDS = Shape(takes=("checkpoint", "dataset"), gives=("reward",), loads_in=STOCK, driver="tune")  # the checkpoint stays what it was
ALIGNS = Shape(takes=("checkpoint", "dataset"), may_take=("reward",), gives=("checkpoint",), loads_in=STOCK, driver="tune")
CURATES = Shape(gives=("dataset",), loads_in="datasets", driver="curate")
REFINES = Shape(takes=("dataset",), gives=("dataset",), loads_in="datasets", driver="curate")
WRITES = Shape(may_take=("dataset",), gives=("dataset",), loads_in="datasets")  # a model writes or judges rows
TEACHES = Shape(may_take=("checkpoint", "dataset"), gives=("dataset",), loads_in="datasets", may_only_measure=True)
SCORES = Shape(gives=("scores",), loads_in="any reader of jsonl; reward functions and models through modelwright.reward.table.wrapper")
MEASURES = Shape()  # from recorded results alone
JUDGES = Shape(may_take=("checkpoint",))
INSPECTS = Shape(may_take=("checkpoint", "dataset"))  # a checkpoint, or recorded results
PROBES = Shape(takes=("checkpoint",), may_take=("dataset",))
SERVES = Shape(takes=("checkpoint",))

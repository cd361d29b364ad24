"""Recipes: a run as a YAML file with its model, tasks, methods, seeds and held-out texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from curlora.continual.data import AnswersSpec, HeldOutSpec, OwnTextSpec, TaskSpec
from curlora.continual.grid import expand
from curlora.continual.method_spec import MethodSpec
from curlora.continual.model_spec import ModelSpec
from curlora.continual.plugins import PLUGINS
from curlora.continual.problems import at_their_places, describe_errors, unknown_names
from curlora.continual.protocol import SWITCHES, Protocol
from curlora.continual.settings import OF_A_METHOD, Settings

__all__ = ["Recipe"]

_PERMUTED_AT_MOST = 4


class Resources(BaseModel, extra="forbid", frozen=True):
    """The CPU threads and GPUs that one method with one seed runs on.

    ``cpus`` is the number of threads. If it is ``None``, each worker has one, and a run without workers has all of the
    process's. ``gpus`` is used only with workers; 0.5 puts two workers on one GPU. If it is ``None``, each worker gets
    one GPU where there are any.
    """

    cpus: Annotated[int, Field(gt=0)] | None = None
    gpus: Annotated[float, Field(ge=0, le=1)] | None = None

    def threads(self, workers: bool) -> int:
        """Return the number of CPU threads of a job, with workers or without."""
        return self.cpus or (1 if workers else torch.get_num_threads())


def _distinct(values: list[Any]) -> list[Any]:
    names = [getattr(value, "name", value) for value in values]
    # The names are folder names, and some file systems ignore case.
    plain = [name.casefold() if isinstance(name, str) else name for name in names]
    twice = [name for name, same in zip(names, plain, strict=True) if plain.count(same) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


def _kind_of_text(value: Any) -> str | None:
    if isinstance(value, (HeldOutSpec, AnswersSpec, OwnTextSpec)):
        return type(value).__name__
    if not isinstance(value, dict):
        return None
    kinds = {"prompts": "AnswersSpec", "written_by": "OwnTextSpec", "path": "HeldOutSpec", "hub": "HeldOutSpec"}
    misspelt = "HeldOutSpec" if value.keys() - {"name"} else None  # its error names the key
    return next((kind for key, kind in kinds.items() if key in value), misspelt)


Text = Annotated[
    Annotated[HeldOutSpec, Tag("HeldOutSpec")]
    | Annotated[AnswersSpec, Tag("AnswersSpec")]
    | Annotated[OwnTextSpec, Tag("OwnTextSpec")],
    Discriminator(
        _kind_of_text,
        custom_error_type="text",
        custom_error_message="a text is a mapping with a name, and a path, hub, prompts or written_by",
    ),
]


class Recipe(BaseModel, extra="forbid", frozen=True):
    """A run.

    Paths are relative to the recipe's folder and may hold ``${VARIABLES}`` of the environment. ``output`` is relative
    to the working directory.

    A method ``frozen`` is added if there is none, so every score can be compared with the frozen model's. It trains
    only the heads of classification tasks.

    ``heldout`` are texts that no method uses. ``guard`` is a general text that plug-ins use; it must differ from the
    held-out texts. Each of them may also be the base model's answers to ``prompts``, or text that the model writes
    freely (``written_by``).

    ``orders`` are further orders of the tasks, each a list of all their names, or ``all`` orders. Every method is run
    in the order of ``tasks`` first and then in each of these.

    ``limits`` are limits on the guard's text: ``kl`` from the base model in nats per token, ``perplexity_increase`` as
    a fraction. For each limit the report shows the best of each method within it.

    ``switches`` changes switches of the ``protocol``. ``reference`` overrides ``training`` under the paper's protocol.
    """

    title: str
    model: ModelSpec
    tasks: Annotated[list[TaskSpec], Field(min_length=1), AfterValidator(_distinct)]
    methods: Annotated[list[MethodSpec], Field(min_length=1), AfterValidator(_distinct)]
    heldout: Annotated[list[Text], Field(min_length=1), AfterValidator(_distinct)]
    guard: Text | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(_distinct)] = [0]
    orders: list[list[str]] = []
    training: Settings = Settings()
    protocol: Literal["corrected", "paper"] = "corrected"
    switches: dict[str, str] = {}
    reference: dict[str, Any] = {}
    resources: Resources = Resources()
    limits: dict[Literal["kl", "perplexity_increase"], list[Annotated[float, Field(gt=0)]]] = {}
    output: Path | None = None

    # Maps the paths in use to the paths as written in the recipe.
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("methods", mode="before")
    @classmethod
    def _grids(cls, methods: Any) -> Any:
        if not isinstance(methods, list):
            return methods
        # An entry with the values of its grid is already expanded.
        return [
            one
            for method in methods
            for one in (expand(method) if isinstance(method, dict) and not method.get("grid") else [method])
        ]

    @field_validator("methods")
    @classmethod
    def _with_frozen(cls, methods: list[MethodSpec], info: ValidationInfo) -> list[MethodSpec]:
        if any(part.method == "frozen" for part in methods):
            return methods
        if any(part.name == "frozen" for part in methods):
            raise ValueError("the name 'frozen' is reserved for the method frozen, which trains only the heads")
        heads = any(task.kind == "classification" for task in info.data.get("tasks", []))
        return [MethodSpec(name="frozen", method="frozen", label="Heads only" if heads else "Base model"), *methods]

    @field_validator("orders", mode="before")
    @classmethod
    def _all_orders(cls, value: Any, info: ValidationInfo) -> Any:
        names = [task.name for task in info.data.get("tasks", [])]
        if value != "all":
            return value
        if len(names) > _PERMUTED_AT_MOST:
            raise ValueError(
                f"all orders of {len(names)} tasks are too many (at most {_PERMUTED_AT_MOST} tasks); list some orders"
            )
        return [list(order) for order in itertools.permutations(names)][1:]

    @field_validator("orders")
    @classmethod
    def _orders_of_all_tasks(cls, orders: list[list[str]], info: ValidationInfo) -> list[list[str]]:
        names = [task.name for task in info.data.get("tasks", [])]
        for number, order in enumerate(orders):
            if sorted(order) != sorted(names):
                raise ValueError(f"an order must name each task once: {', '.join(names)}; got {', '.join(order)}")
            if order == names or order in orders[:number]:
                raise ValueError(f"the order {', '.join(order)} is listed twice (the order of tasks is the first)")
        return orders

    @field_validator("heldout", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("training", mode="before")
    @classmethod
    def _no_switches(cls, value: Any) -> Any:
        given = value if isinstance(value, dict) else {}
        misplaced = [name for name, (corrected, _, _) in SWITCHES.items() if given.get(name, corrected) != corrected]
        if misplaced:
            raise ValueError(f"{misplaced[0]} is a switch of the protocol: put it under switches")
        return value

    @field_validator("protocol", mode="before")
    @classmethod
    def _protocol_by_its_earlier_name(cls, value: Any) -> Any:
        return "corrected" if value == "honest" else value  # as in the directories of earlier versions

    @field_validator("switches")
    @classmethod
    def _known_switches(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in value if name not in SWITCHES]
        if unknown:
            raise ValueError(unknown_names("the protocol", unknown, SWITCHES, "switch"))
        return value

    @field_validator("reference")
    @classmethod
    def _known_reference(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_settings(None, [("reference", value)])
        return value

    @field_validator("tasks")
    @classmethod
    def _known_training(cls, tasks: list[TaskSpec]) -> list[TaskSpec]:
        variants = [(task.name, variant) for task in tasks for variant in (task, task.variant(reference=True))]
        changes = [(f"task {name!r}: training", variant.training) for name, variant in variants]
        _check_settings(None, changes)
        misplaced = [
            f"task {task.name!r}: training: {key} must be the same for all tasks"
            for task in tasks
            for key in sorted(
                task.training.keys() & {"forward_transfer", "cache_frozen_layers", "fp32_products", *SWITCHES}
            )
        ]
        if misplaced:
            raise at_their_places(misplaced)
        return tasks

    @model_validator(mode="after")
    def _guard_is_there(self) -> Recipe:
        if self.guard is not None and self.guard.name in [text.name for text in self.heldout]:
            raise ValueError(
                f"guard and heldout: both have the name {self.guard.name!r}. The guard's text must be another text"
            )
        lacking = [
            f"method {method.name!r}: plug-in {plugin['name']!r} needs a general text: name one under guard"
            for method in self.methods
            for plugin in method.plugins
            if PLUGINS[plugin["name"]].needs_guard_text and self.guard is None
        ]
        lacking += [
            f"method {method.name!r} needs a general text: name one under guard"
            for method in self.methods
            if self.guard is None and method.make(Protocol()).needs_guard_text
        ]
        if lacking:
            raise at_their_places(lacking)
        return self

    @model_validator(mode="after")
    def _switches_fit(self) -> Recipe:
        readout = self.switched().readout
        _check_settings(self.training, [("reference", self.reference)])
        for task in self.tasks:
            if task.kind != "classification" and readout == "last_position":
                raise ValueError(
                    f"readout: last_position is for classification tasks, but task {task.name!r} is a {task.kind} task"
                )
            for variant in (task, task.variant(reference=True)):
                _check_settings(self.settings(), [(f"task {task.name!r}: training", variant.training)])
        unknown = [
            unknown_names(f"method {method.name!r}: training", [key], [*Settings.model_fields, "learning_rate"])
            for method in self.methods
            for key in sorted(set(method.training) - set(Settings.model_fields) - {"learning_rate"})
        ]
        unknown += [
            f"method {method.name!r}: training: a method's learning_rate stands beside its name, not under training"
            for method in self.methods
            if "learning_rate" in method.training
        ]
        if unknown:
            raise at_their_places(list(dict.fromkeys(unknown)))
        misplaced = [
            f"method {method.name!r}: training: {key!r} cannot differ between methods; these settings can: "
            f"{', '.join(sorted(OF_A_METHOD))}"
            for method in self.methods
            for key in sorted(set(method.training) - OF_A_METHOD)
        ]
        if misplaced:
            raise at_their_places(misplaced)
        _check_settings(self.settings(), [(f"method {one.name!r}: training", one.training) for one in self.methods])
        return self

    def portable(self) -> Recipe:
        """Return the recipe with its paths as written and only the name of a model's folder.

        It says what is run but not where the files are, and identifies a run.
        """
        content = _replaced(self.model_dump(mode="json"), self._written)
        if Path(content["model"]["name"]).is_absolute():
            content["model"]["name"] = Path(content["model"]["name"]).name
        return Recipe.model_validate(content)

    def settings(self) -> Settings:
        """Return the settings under the protocol."""
        changes = self.reference if self.protocol == "paper" else {}
        return self.training.changed({**changes, **self.switched().settings})

    def switched(self) -> Protocol:
        """Return the protocol with its switches."""
        try:
            return Protocol.named(self.protocol, **self.switches)
        except ValidationError as error:
            raise at_their_places(describe_errors(error, Protocol, self.switches, "switches")) from error


def _check_settings(settings: Settings | None, changes: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Check ``settings`` with each of the changes; if ``None``, check each changed entry by itself."""
    problems: list[str] = []
    for where, change in changes:
        try:
            (settings or Settings()).changed(change)
        except ValidationError as error:
            if settings is not None or any(one["loc"] for one in error.errors()):
                problems += describe_errors(error, Settings, change, where)
    if problems:
        raise at_their_places(list(dict.fromkeys(problems)))


def _replaced(content: Any, strings: dict[str, str]) -> Any:
    if isinstance(content, dict):
        return {key: _replaced(value, strings) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, strings) for value in content]
    return strings.get(content, content) if isinstance(content, str) else content

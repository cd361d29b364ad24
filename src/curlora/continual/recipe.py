"""Recipes: a run as a YAML file with its model, tasks, methods, seeds and held-out texts."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig

from curlora.continual.data import AnswersSpec, HeldOutSpec, OwnTextSpec, TaskSpec
from curlora.continual.errors import RecipeError
from curlora.continual.grid import expand
from curlora.continual.methods import Method, make_method
from curlora.continual.plugins import PLUGINS, Plugin, make_plugin
from curlora.continual.problems import at_their_places, describe_errors, place, unknown_names
from curlora.continual.protocol import SWITCHES, Protocol
from curlora.continual.recipe_file import read_recipe_file
from curlora.continual.settings import OF_A_METHOD, Settings
from curlora.hub import no_such_folder

__all__ = ["MethodSpec", "ModelSpec", "Recipe", "RecipeError", "load_recipe", "packaged_recipes"]

_PERMUTED_AT_MOST = 4


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Spec):
    """The base model: a folder or a hub id, and optionally a GGUF file in it.

    ``quantization`` is a ``quantization_config`` of transformers, such as
    ``{quant_method: bitsandbytes, load_in_4bit: true}``.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{value!r} is not a floating-point dtype of torch, such as float32 or bfloat16")
        return value

    @field_validator("quantization")
    @classmethod
    def _known_quantization(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and "quant_method" not in value:
            raise ValueError("quant_method is missing, such as bitsandbytes, torchao or hqq")
        return value

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer and set a padding token."""
        self._check_folder()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision, gguf_file=self.gguf_file)
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name: the tokenizer of {self.name} cannot be loaded: {error}") from error
        if tokenizer.pad_token is None:  # any token works, because padding is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def load_empty(self) -> torch.nn.Module:
        """Make the model from its configuration on the meta device: without weights, and not quantized."""
        self._check_folder()
        try:
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, gguf_file=self.gguf_file)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name: the configuration of {self.name} cannot be loaded: {error}") from error

    def load(self) -> torch.nn.Module:
        """Load a fresh model."""
        given = self.quantization
        self._check_folder()
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name,
                revision=self.revision,
                gguf_file=self.gguf_file,
                dtype=getattr(torch, self.dtype),
                quantization_config=None if given is None else AutoQuantizationConfig.from_dict(dict(given)),
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name: {self.name} cannot be loaded: {error}") from error

    def _check_folder(self) -> None:
        if problem := no_such_folder(self.name):
            raise RecipeError(f"model.name: {problem}")


class Resources(_Spec):
    """The CPU threads and GPUs that one method with one seed runs on.

    ``cpus`` is the number of threads; all of the process's if ``None``. ``gpus`` is used only with workers; 0.5 puts
    two workers on one GPU. If it is ``None``, each worker gets one GPU where there are any.
    """

    cpus: Annotated[int, Field(gt=0)] | None = None
    gpus: Annotated[float, Field(ge=0, le=1)] | None = None


class MethodSpec(_Spec):
    """A method, ``frozen``, ``full`` or an adapter of PEFT with the options of its configuration, and its plug-ins.

    With ``adapter_per_task`` each task trains its own adapter beside those of earlier tasks. ``training`` overrides
    settings for this method. ``{grid: [...]}`` in place of any value but a name stands for several methods, one for
    each value; ``grid`` then holds one method's values.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(@[A-Za-z0-9_.,=+-]+)?$")]
    method: str
    label: str | None = None
    options: dict[str, Any] = {}
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    adapter_per_task: bool = False
    plugins: list[dict[str, Any]] = []
    training: dict[str, Any] = {}
    grid: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> MethodSpec:
        problems = []
        try:
            self._make([], Protocol())
        except ValueError as error:
            problems.append(str(error))
        for plugin in self.plugins:
            try:
                self._plugin(plugin)
            except ValueError as error:
                problems.append(str(error))
        if {"guard", "scale_back"} <= {str(plugin.get("name")) for plugin in self.plugins}:
            problems.append("plugins: guard and scale_back each keep a limit of their own: leave one of them out")
        if problems:
            raise ValueError("\n".join(problems))
        self.make(Protocol())
        return self

    def make(self, protocol: Protocol) -> Method:
        """Make the method under a protocol.

        Raises:
            ValueError: if the method, a plug-in or one of their options is unknown, missing or not allowed.
        """
        acting = list(PLUGINS)
        return self._make(
            [self._plugin(one) for one in sorted(self.plugins, key=lambda one: acting.index(one["name"]))], protocol
        )

    def _make(self, plugins: Sequence[Callable[[], Plugin]], protocol: Protocol) -> Method:
        return make_method(
            self.method,
            self.name,
            self.label or self.name,
            self.learning_rate or 0.0,
            {**(protocol.curlora_options if self.method == "curlora" else {}), **self.options},
            plugins,
            lora_init=protocol.lora_init,
            adapter_per_task=self.adapter_per_task,
            training=self.training,
            grid=self.grid,
        )

    def _plugin(self, plugin: dict[str, Any]) -> Callable[[], Plugin]:
        if not isinstance(plugin.get("name"), str):
            raise ValueError(f"plugins: a plug-in needs a name, such as guard: {plugin}")
        name, rest = plugin["name"], {key: value for key, value in plugin.items() if key != "name"}
        if [other.get("name") for other in self.plugins].count(name) > 1:
            raise ValueError(f"plugins: {name!r} is listed twice")
        made = make_plugin(name, rest)
        if made.only_for not in (None, self.method):
            raise ValueError(f"plug-in {name!r} is only for method {made.only_for!r}, not for {self.method!r}")
        if self.adapter_per_task and made.holds_trained:
            raise ValueError(
                f"plug-in {name!r} protects what earlier tasks have trained. With adapter_per_task later tasks do not "
                "change that: leave the plug-in out"
            )
        return lambda: make_plugin(name, rest)


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
    kinds = {"prompts": "AnswersSpec", "written_by": "OwnTextSpec"}
    return next((kind for key, kind in kinds.items() if key in value), "HeldOutSpec")


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


class Recipe(_Spec):
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


def packaged_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with curlora, by name."""
    folder = Path(str(resources.files("curlora").joinpath("recipes")))
    # The demo's recipes are left out: `curlora demo` downloads their files first.
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem not in ("demo", "demo-full")}


def load_recipe(path: Path | str, changes: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file, or the name of a recipe that comes with curlora.
        changes: strings ``key.key=value``, with a number in place of a key for an entry of a list; the value is YAML.
        folder: the folder that paths in the recipe are relative to; the recipe's own folder if ``None``.

    Raises:
        RecipeError: if the file does not exist or is not YAML; or naming every entry that is missing, unknown or not
            allowed.
    """
    path = Path(path)
    if not path.exists() and str(path) in packaged_recipes():
        path = packaged_recipes()[str(path)]
    try:
        content, written, wrong = read_recipe_file(path, changes, folder or path.absolute().parent, Recipe.model_fields)
    except OSError as error:
        near = difflib.get_close_matches(path.stem, packaged_recipes(), n=1)
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}. It is neither a file nor one of the recipes that come with "
            f"curlora: {', '.join(packaged_recipes())}." + (f" Did you mean {near[0]!r}?" if near else "")
        ) from error
    content["methods"] = _expanded(content.get("methods"), wrong)
    lines = [f"{where}: {what}" for where, what in wrong.items()]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        told = tuple(f"{where}{end}" for where in wrong for end in (":", " "))
        # An error that is not about a value of the grid is the same in all of an entry's methods: it is named once.
        named = {**content, "methods": _with_entrys_names(content["methods"])}
        lines += [line for line in describe_errors(error, Recipe, named) if not line.startswith(told)]
    if lines:
        raise RecipeError(f"{path} is not a recipe that can be run:\n" + "\n".join(f"  {line}" for line in lines))
    recipe._written.update(written)
    return recipe


def _expanded(methods: Any, wrong: dict[str, str]) -> Any:
    """Return the methods with their grids expanded. A grid that is wrong is added to ``wrong``, without its values."""
    if not isinstance(methods, list):
        return methods
    found: list[Any] = []
    for number, method in enumerate(methods):
        try:
            found += expand(method) if isinstance(method, dict) else [method]
        except ValueError as error:
            wrong[place(["methods", number], {"methods": methods})] = str(error)
            found.append(method)
    return found


def _with_entrys_names(methods: Any) -> Any:
    if not isinstance(methods, list):
        return methods
    return [{**one, "name": one["name"].partition("@")[0]} if _is_named(one) else one for one in methods]


def _is_named(method: Any) -> bool:
    return isinstance(method, dict) and isinstance(method.get("name"), str)


def _replaced(content: Any, strings: dict[str, str]) -> Any:
    if isinstance(content, dict):
        return {key: _replaced(value, strings) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, strings) for value in content]
    return strings.get(content, content) if isinstance(content, str) else content

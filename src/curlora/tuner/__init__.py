"""The PEFT plug-in. Importing this package makes CURLoRA one of PEFT's methods, in memory only."""

from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """Give PEFT's closed ``PeftType`` enum one more member, which registering a method asks for."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


if "CURLORA" in PeftType.__members__:
    raise ImportError("this PEFT already has a method called CURLORA; curlora cannot be registered beside it")
_add_peft_type("CURLORA")

from curlora.tuner.config import CurloraConfig  # noqa: E402  (its peft_type is the member just added)
from curlora.tuner.layer import CurloraLayer  # noqa: E402
from curlora.tuner.model import CurloraModel  # noqa: E402

register_peft_method(name="curlora", config_cls=CurloraConfig, model_cls=CurloraModel)

__all__ = ["CurloraConfig", "CurloraLayer", "CurloraModel"]

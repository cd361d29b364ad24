"""The PEFT plug-in. Importing this package registers CURLoRA with PEFT in the running process."""

from peft.utils import register_peft_method

from curlora import _compat

_compat.add_peft_type("CURLORA")

from curlora.tuner.config import CurloraConfig  # noqa: E402  (its peft_type is the member just added)
from curlora.tuner.format import is_adapter  # noqa: E402
from curlora.tuner.layer import CurloraLayer  # noqa: E402
from curlora.tuner.model import CurloraModel, swap_adapter  # noqa: E402

register_peft_method(name="curlora", config_cls=CurloraConfig, model_cls=CurloraModel)
_compat.tie_like_lora(CurloraModel)
_compat.read_configurations(is_adapter)
_compat.check_digests_on_read(CurloraConfig, is_adapter)
_compat.support_mixed_models(CurloraConfig, CurloraModel, CurloraLayer)
_compat.support_hotswapping(CurloraConfig, swap_adapter)

__all__ = ["CurloraConfig", "CurloraLayer", "CurloraModel"]

"""The few architectures that no stock class can hold. Importing this package registers them with the Auto classes."""

from modelwright.models import dha as _dha  # noqa: F401
from modelwright.models import hyper_moe as _hyper_moe  # noqa: F401
from modelwright.models import lora_moe as _lora_moe  # noqa: F401
from modelwright.models import mix_ln as _mix_ln  # noqa: F401
from modelwright.models import music as _music  # noqa: F401
from modelwright.models import pixels as _pixels  # noqa: F401
from modelwright.models import reward as _reward  # noqa: F401
from modelwright.models import rmoe as _rmoe  # noqa: F401
from modelwright.models import tool_reward as _tool_reward  # noqa: F401

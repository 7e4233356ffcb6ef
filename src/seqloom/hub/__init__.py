"""The Hugging Face face: importing this registers Seqloom models with transformers' Auto classes.

    import seqloom.hub
    model = AutoModelForCausalLM.from_pretrained("a/folder")
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from seqloom.hub.cache import SeqloomCache
from seqloom.hub.config import SeqloomConfig
from seqloom.hub.files import export, load
from seqloom.hub.foreign import import_checkpoint
from seqloom.hub.modeling import (
    SeqloomForCausalLM,
    SeqloomForMaskedLM,
    SeqloomForSequenceClassification,
    SeqloomForTokenClassification,
    SeqloomModel,
    SeqloomPreTrainedModel,
    wrap,
)

AutoConfig.register(SeqloomConfig.model_type, SeqloomConfig, exist_ok=True)
AutoModel.register(SeqloomConfig, SeqloomModel, exist_ok=True)
AutoModelForCausalLM.register(SeqloomConfig, SeqloomForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(SeqloomConfig, SeqloomForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(SeqloomConfig, SeqloomForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(SeqloomConfig, SeqloomForTokenClassification, exist_ok=True)

__all__ = [
    "SeqloomCache", "SeqloomConfig", "SeqloomForCausalLM", "SeqloomForMaskedLM", "SeqloomForSequenceClassification",
    "SeqloomForTokenClassification", "SeqloomModel", "SeqloomPreTrainedModel", "export", "import_checkpoint", "load", "wrap",
]

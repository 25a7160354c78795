from .predict import (
    Predictions as Predictions,
)
from .predict import (
    Record as Record,
)
from .predict import (
    model_transform as model_transform,
)
from .predict import (
    predict as predict,
)
from .streaming import (
    StreamingClassifier as StreamingClassifier,
)
from .streaming import (
    StreamingStep as StreamingStep,
)
from .streaming import (
    detach_state as detach_state,
)

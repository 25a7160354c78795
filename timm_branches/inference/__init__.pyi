from .clips import (
    ClipPredictions as ClipPredictions,
)
from .clips import (
    ClipRecord as ClipRecord,
)
from .clips import (
    predict_clips as predict_clips,
)
from .dense import (
    DensePredictions as DensePredictions,
)
from .dense import (
    DenseRecord as DenseRecord,
)
from .dense import (
    predict_pixels as predict_pixels,
)
from .export import (
    Exported as Exported,
)
from .export import (
    export_model as export_model,
)
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

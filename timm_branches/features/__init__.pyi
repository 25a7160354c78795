from .cache import (
    FeatureDataset as FeatureDataset,
)
from .cache import (
    cache_features as cache_features,
)
from .heads_only import (
    HeadsOnly as HeadsOnly,
)

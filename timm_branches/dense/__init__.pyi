from .augmented import (
    augmented_inference as augmented_inference,
)
from .baseline import (
    PixelBaseline as PixelBaseline,
)
from .losses import (
    boundary_loss as boundary_loss,
)
from .losses import (
    charbonnier_loss as charbonnier_loss,
)
from .losses import (
    dice_loss as dice_loss,
)
from .losses import (
    focal_loss as focal_loss,
)
from .losses import (
    get_dense_loss as get_dense_loss,
)
from .losses import (
    lovasz_loss as lovasz_loss,
)
from .losses import (
    median_frequency_weights as median_frequency_weights,
)
from .losses import (
    ohem_loss as ohem_loss,
)
from .losses import (
    pixel_cross_entropy as pixel_cross_entropy,
)
from .metrics import (
    SegmentationEvaluator as SegmentationEvaluator,
)
from .restoration import (
    RestorationEvaluator as RestorationEvaluator,
)
from .restoration import (
    peak_signal_noise_ratio as peak_signal_noise_ratio,
)
from .restoration import (
    structural_similarity as structural_similarity,
)
from .samples import (
    package_photographs as package_photographs,
)
from .samples import (
    package_segmentation as package_segmentation,
)
from .tiles import (
    tiled_inference as tiled_inference,
)

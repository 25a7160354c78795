from .clips.dataset import (
    ClipDataset as ClipDataset,
)
from .clips.dataset import (
    ClipSubset as ClipSubset,
)
from .clips.dataset import (
    create_clip_dataset as create_clip_dataset,
)
from .clips.dataset import (
    create_clip_splits as create_clip_splits,
)
from .clips.dataset import (
    split_clips as split_clips,
)
from .clips.loader import (
    ClipBatch as ClipBatch,
)
from .clips.loader import (
    collate_clips as collate_clips,
)
from .clips.loader import (
    create_clip_loader as create_clip_loader,
)
from .clips.sampling import (
    FrameSampler as FrameSampler,
)
from .datasets import (
    HierarchicalDataset as HierarchicalDataset,
)
from .datasets import (
    HierarchicalSubset as HierarchicalSubset,
)
from .datasets import (
    coarsen_labels as coarsen_labels,
)
from .datasets import (
    create_dataset as create_dataset,
)
from .datasets import (
    create_splits as create_splits,
)
from .datasets import (
    split_dataset as split_dataset,
)
from .loader import (
    BalancedSampler as BalancedSampler,
)
from .loader import (
    EpochSampler as EpochSampler,
)
from .loader import (
    Loader as Loader,
)
from .loader import (
    create_loader as create_loader,
)
from .masks import (
    MaskColors as MaskColors,
)
from .masks import (
    coco_masks as coco_masks,
)
from .mixup import (
    HierarchicalMixup as HierarchicalMixup,
)
from .mixup import (
    split_levels as split_levels,
)
from .names import (
    label_names as label_names,
)
from .pair_transform import (
    PairTransform as PairTransform,
)
from .restoration import (
    DenoisingDataset as DenoisingDataset,
)
from .restoration import (
    RestorationDataset as RestorationDataset,
)
from .segmentation import (
    SegmentationDataset as SegmentationDataset,
)
from .sources import (
    Source as Source,
)
from .sources import (
    register_reader as register_reader,
)
from .summary import (
    DataSummary as DataSummary,
)
from .summary import (
    summarize as summarize,
)
from .transforms import (
    SampleTransform as SampleTransform,
)
from .transforms import (
    create_transform as create_transform,
)

"""What a declarative bundle may name: pure data, read by `medseg.bundle.trust`.

Names are exact. A prefix would let in whatever a module happens to import: the lookup behind `_target_` walks
attributes, so below an allowed prefix `medseg.io` it would also find `medseg.io.os.system`.

Whoever adds a name has looked at every argument of it for text that ends in an import, an evaluation, a download, a
pickle, or a text file with a name of the config's choosing, and has added a row to `ARGUMENTS` where there was one.
What writes files has a row in `PLACES`.
Left out for such a reason: `Lambda` and its kin, `TorchVision`, `TorchIO` and `CuCIM` (any attribute of a library by
name), `PatchInferer` (`merger_cls` is imported), `PerceptualLoss` and the classification backbones (downloads),
`NPZDictItemDataset` and `CSVDataset`, `LogfileHandler`, `ClassificationSaver` and `SaveClassificationd` (text files
under any name), `MLFlowHandler`, `ClearMLHandler` and `TrtHandler`, and all of `monai.bundle`, `monai.apps`,
`torch.hub`, `torch.jit` and `torch.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from medseg import components
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALLOWED", "ARGUMENTS", "PLACES"]

# Kind -> module -> names.
ALLOWED: Final[Mapping[str, Mapping[str, str]]] = {
    "medseg": {"medseg.components": " ".join(components.__all__)},
    "network": {
        "monai.networks.nets": """
            AHNet AttentionUnet BasicUNet BasicUNetPlusPlus DAF3D DynUNet FlexibleUNet HighResNet MedNeXt MedNeXtB
            MedNeXtL MedNeXtM MedNeXtS RegUNet SegResNet SegResNetDS SegResNetDS2 SegResNetVAE SwinUNETR UNet UNETR
            VNet VoxelMorphUNet
        """,
    },
    "loss": {
        "monai.losses": """
            AsymmetricUnifiedFocalLoss BoundaryLoss DeepSupervisionLoss DiceCELoss DiceFocalLoss DiceLoss FocalLoss
            GeneralizedDiceFocalLoss GeneralizedDiceLoss GeneralizedWassersteinDiceLoss HausdorffDTLoss
            LogHausdorffDTLoss MaskedDiceLoss MaskedLoss MCCLoss NACLLoss SoftclDiceLoss SoftDiceclDiceLoss TverskyLoss
        """,
        "torch.nn": """
            BCELoss BCEWithLogitsLoss CrossEntropyLoss GaussianNLLLoss HuberLoss KLDivLoss L1Loss MSELoss
            MultiLabelSoftMarginLoss NLLLoss PoissonNLLLoss SmoothL1Loss SoftMarginLoss
        """,
    },
    "metric": {
        "monai.metrics": """
            AbsoluteVolumeDifferenceMetric CalibrationErrorMetric ConfusionMatrixMetric CumulativeAverage DiceMetric
            FBetaScore GeneralizedDiceScore HausdorffDistanceMetric LossMetric MAEMetric MeanIoU MSEMetric
            PanopticQualityMetric ROCAUCMetric RMSEMetric SurfaceDiceMetric SurfaceDistanceMetric
        """,
        "ignite.metrics": "Accuracy Loss Precision Recall",
    },
    "handler": {
        "monai.handlers": """
            CheckpointLoader CheckpointSaver ConfusionMatrix DecollateBatch EarlyStopHandler GarbageCollector
            HausdorffDistance IgniteMetricHandler LrScheduleHandler MeanDice MeanIoUHandler MetricLogger MetricsSaver
            PanopticQuality PostProcessing SmartCacheHandler StatsHandler SurfaceDistance TensorBoardImageHandler
            TensorBoardStatsHandler ValidationHandler from_engine stopping_fn_from_loss stopping_fn_from_metric
        """,
    },
    "transform": {
        "monai.transforms": """
            Activations AsDiscrete Compose EnsureType Invert KeepLargestConnectedComponent LoadImage OneOf RandomOrder
            SaveImage SomeOf
            BorderPadd BoundingRectd CenterScaleCropd CenterSpatialCropd CropForegroundd DivisiblePadd
            RandCropByLabelClassesd RandCropByPosNegLabeld RandScaleCropd RandSpatialCropd RandSpatialCropSamplesd
            RandWeightedCropd ResizeWithPadOrCropd SpatialCropd SpatialPadd
            AdjustContrastd ClipIntensityPercentilesd GaussianSharpend GaussianSmoothd GibbsNoised HistogramNormalized
            MaskIntensityd MedianSmoothd NormalizeIntensityd RandAdjustContrastd RandBiasFieldd RandCoarseDropoutd
            RandCoarseShuffled RandGaussianNoised RandGaussianSharpend RandGaussianSmoothd RandGibbsNoised
            RandHistogramShiftd RandKSpaceSpikeNoised RandRicianNoised RandScaleIntensityd RandScaleIntensityFixedMeand
            RandShiftIntensityd RandStdShiftIntensityd SavitzkyGolaySmoothd ScaleIntensityd ScaleIntensityRanged
            ScaleIntensityRangePercentilesd ShiftIntensityd StdShiftIntensityd ThresholdIntensityd
            Affined Flipd GridDistortiond Orientationd Rand2DElasticd Rand3DElasticd RandAffined RandAxisFlipd RandFlipd
            RandGridDistortiond RandRotate90d RandRotated RandSimulateLowResolutiond RandSmoothDeformd RandZoomd
            ResampleToMatchd Resized Rotate90d Rotated Spacingd SpatialResampled Zoomd
            Activationsd AsDiscreted DistanceTransformEDTd FillHolesd Invertd KeepLargestConnectedComponentd
            LabelFilterd LabelToContourd MeanEnsembled ProbNMSd RemoveSmallObjectsd VoteEnsembled
            LoadImaged SaveImaged
            AddCoordinateChannelsd AsChannelLastd CastToTyped ClassesToIndicesd ConcatItemsd
            ConvertToMultiChannelBasedOnBratsClassesd CopyItemsd DataStatsd DeleteItemsd EnsureChannelFirstd EnsureTyped
            FgBgToIndicesd FlattenSubKeysd FromMetaTensord Identityd LabelToMaskd MapLabelValued RepeatChanneld
            SelectItemsd SplitDimd SqueezeDimd ToDeviced ToMetaTensord ToNumpyd ToTensord Transposed
        """,
    },
    "inferer": {
        "monai.inferers": "SimpleInferer SliceInferer SlidingWindowInferer SlidingWindowInfererAdapt",
    },
    "data": {
        "monai.data": """
            CacheDataset DataLoader Dataset DistributedSampler ITKReader NibabelReader NrrdReader NumpyReader
            PersistentDataset PILReader PydicomReader SmartCacheDataset ThreadDataLoader load_decathlon_datalist
        """,
        "torch.utils.data": "DataLoader",
    },
    "optimizer": {
        "monai.optimizers": "Novograd",
        "torch.optim": """
            ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS NAdam RAdam RMSprop Rprop SGD SparseAdam
        """,
    },
    "scheduler": {
        "monai.optimizers": "ExponentialLR LinearLR WarmupCosineSchedule",
        "torch.optim.lr_scheduler": """
            ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LinearLR
            MultiStepLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR StepLR
        """,
    },
    "engine": {
        "monai.engines": """
            EnsembleEvaluator PrepareBatchDefault PrepareBatchExtraInput SupervisedEvaluator SupervisedTrainer
        """,
    },
    "machine": {
        "monai.utils": "set_determinism",
        "torch": "device",
        "torch.cuda": "is_available",
    },
}

# Target ("*" is every target) -> argument -> the only values it may have. A component of this page may stand there if
# its class is one of them; no other, for parts that hand a value on would let any value through.
ARGUMENTS: Final[Mapping[str, Mapping[str, tuple[bool | str | None, ...]]]] = {
    "*": {
        # MONAI imports any dotted path, and takes any name of monai.data, given for these two.
        "reader": (
            None,
            *("ITKReader", "NibabelReader", "NrrdReader", "NumpyReader", "PILReader", "PydicomReader", "WSIReader"),
        ),
        "writer": (None, "ITKWriter", "NibabelWriter", "PILWriter"),
        "pretrained": (False, None),  # downloads, or reads any file
        "allow_pickle": (False, None),  # passed through LoadImage to numpy.load
        "weights_only": (True,),  # passed to torch.load
        "pickle_module": ("pickle",),  # writes the cache that weights_only guards
        "compile_kwargs": (None,),  # torch.compile takes the path of a C++ compiler among its options
        # Passed through LoadImage to nibabel and NumPy: "r+" would let later steps change the image's own file.
        "mmap": (True, False, "c", "r"),
        "mmap_mode": (None, "c", "r"),
        "data_root_dir": ("",),  # MONAI joins the way from it to the image, which may lead up, to the output folder
    },
    **{entry.target: entry.choices for entry in NETWORKS.values() if entry.choices},
    "monai.networks.nets.FlexibleUNet": {
        "backbone": (
            *(f"efficientnet-{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "l2")),
            *(f"resnet{depth}" for depth in ("10", "18", "34", "50", "101", "152", "200")),
        ),
    },
}

# Part that writes files -> the argument that says where: the run's `output_dir`, or a folder inside the bundle.
PLACES: Final[Mapping[str, str]] = {
    "medseg.components.PredictionPictures": "output_dir",
    "medseg.components.Checkpoints": "output_dir",
    "medseg.components.RunLog": "output_dir",
    "medseg.components.SeededDataset": "cache_dir",
    "medseg.components.SaveMaskd": "output_dir",
    "monai.data.PersistentDataset": "cache_dir",
    "monai.handlers.CheckpointSaver": "save_dir",
    "monai.handlers.MetricsSaver": "save_dir",
    "monai.handlers.TensorBoardImageHandler": "log_dir",
    "monai.handlers.TensorBoardStatsHandler": "log_dir",
    "monai.transforms.SaveImage": "output_dir",
    "monai.transforms.SaveImaged": "output_dir",
}

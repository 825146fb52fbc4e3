"""Allowlist of the components that a declarative bundle may use; pure data for `medseg.bundle.trust`.

Names are exact. A prefix would also allow whatever a module imports: the lookup behind `_target_` walks attributes, so
an allowed prefix `medseg.io` would also allow `medseg.io.os.system`.

Before adding a name, check each of its arguments for text that leads to an import, an evaluation, a download, a pickle,
or a text file with a name from the config, and restrict such arguments in `ARGUMENTS`. A component that writes files
needs a row in `PLACES`.
Excluded for such reasons: `Lambda` and its kind, `TorchVision`, `TorchIO` and `CuCIM` (any attribute of a library by
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

# Names by kind of component and module.
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

# Allowed values by target ("*" for every target) and argument. A component is allowed as the value if its class is one
# of them, and no other, because a component that returns its argument would let any value through.
ARGUMENTS: Final[Mapping[str, Mapping[str, tuple[bool | str | None, ...]]]] = {
    "*": {
        # MONAI imports any dotted path, or looks up any name in monai.data, for these two.
        "reader": (
            None,
            *("ITKReader", "NibabelReader", "NrrdReader", "NumpyReader", "PILReader", "PydicomReader", "WSIReader"),
        ),
        "writer": (None, "ITKWriter", "NibabelWriter", "PILWriter"),
        "pretrained": (False, None),  # downloads weights, or reads any file
        "allow_pickle": (False, None),  # passed through LoadImage to numpy.load
        "weights_only": (True,),  # passed to torch.load
        "pickle_module": ("pickle",),  # writes the cache that is read with weights_only
        "compile_kwargs": (None,),  # the options of torch.compile include the path of a C++ compiler
        # Passed through LoadImage to nibabel and NumPy: "r+" would let later steps modify the image file.
        "mmap": (True, False, "c", "r"),
        "mmap_mode": (None, "c", "r"),
        "data_root_dir": (
            "",
        ),  # MONAI appends the relative path from here to the image, which may contain "..", to the output folder
    },
    **{entry.target: entry.choices for entry in NETWORKS.values() if entry.choices},
    "monai.networks.nets.FlexibleUNet": {
        "backbone": (
            *(f"efficientnet-{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "l2")),
            *(f"resnet{depth}" for depth in ("10", "18", "34", "50", "101", "152", "200")),
        ),
    },
}

# Argument with the output folder of each component that writes files: `@output_dir`, or a folder inside the bundle.
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

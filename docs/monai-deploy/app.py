"""A MONAI Deploy application: a DICOM series in, a DICOM SEG out, by a network that `medseg export` wrote.

Usage: `python app.py --model model.ts --input folder_of_a_series --output results`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from exported import Exported, find_series, read_exported
from holoscan.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, init_app_context
from monai.deploy.core.domain.dicom_series_selection import SelectedSeries, StudySelectedSeries
from monai.deploy.operators import (
    DICOMDataLoaderOperator,
    DICOMSegmentationWriterOperator,
    DICOMSeriesSelectorOperator,
    DICOMSeriesToVolumeOperator,
    IOMapping,
    ModelInfo,
    MonaiBundleInferenceOperator,
)
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, SaveImaged
from pydicom.sr.coding import Code

from medseg.errors import CaseError, MedsegError
from medseg.io.dicom import Series
from medseg.io.dicom.terms import segment_term


class WholeSeriesOperator(DICOMSeriesSelectorOperator):
    """Selects the series that was looked through; the SDK's loader passes over what it cannot read.

    Args:
        fragment: the application.
        wanted: the series.
        name: of the operator.
    """

    def __init__(self, fragment: Application, wanted: Series, *, name: str) -> None:
        self._wanted = wanted
        super().__init__(fragment, name=name)

    def filter(self, selection_rules: Any, dicom_study_list: list[Any], *args: Any) -> list[StudySelectedSeries]:
        """Return the series, or raise CaseError if images of it are missing."""
        count = 0
        for study in dicom_study_list:
            for series in study.get_all_series():
                if str(series.SeriesInstanceUID) == self._wanted.uid:
                    count = len(series.get_sop_instances())
                    selected = StudySelectedSeries(study)
                    selected.add_selected_series(SelectedSeries("image", series))
        if count != len(self._wanted.files):
            raise CaseError(
                f"MONAI Deploy loaded {count} of the {len(self._wanted.files)} images in "
                f"{self._wanted.files[0].parent}, see above: use `medseg predict --format dicom-seg`"
            )
        return [selected]


class NetworkOperator(MonaiBundleInferenceOperator):
    """Runs the config that lies in the `.ts` file: its preprocessing and its sliding window, which also restores."""

    def _get_compose(self, obj_name: str, disallowed_prefixes: list[str]) -> Compose:
        """Return a chain without the bundle's reader and writer, whose work the SDK does."""
        steps = self.parser.get_parsed_content(obj_name).transforms
        kept = [step for step in steps if not isinstance(step, LoadImaged | SaveImaged)]
        return Compose([EnsureChannelFirstd("image"), *kept] if obj_name == "preprocessing" else kept)

    def predict(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the label map `(1, 1, x, y, z)`; the inferer wants torch's network, not the SDK's cover of it."""
        return self._inferer(data, self._model_network.predictor)


class SegmentationApp(Application):
    """Load, select, stack, segment, write.

    Args:
        context: the paths of the command line and the environment, and the network.
        exported: what the network's file says of itself.
        series: what to segment; others in the folder are passed over.
    """

    def __init__(self, context: AppContext, exported: Exported, series: Series) -> None:
        self._context = context
        self._exported = exported
        self._series = series
        super().__init__([sys.executable, sys.argv[0]])

    def compose(self) -> None:
        """Connect the operators. Without the condition the loader would start over for ever."""
        once = CountCondition(self, 1)
        load = DICOMDataLoaderOperator(self, once, input_folder=Path(self._context.input_path), name="load")
        select = WholeSeriesOperator(self, self._series, name="select")
        stack = DICOMSeriesToVolumeOperator(self, name="stack")
        segment = NetworkOperator(
            self,
            app_context=self._context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            name="segment",
        )
        write = DICOMSegmentationWriterOperator(
            self,
            segment_descriptions=[self.segment(name) for name in self._exported.labels],
            output_folder=Path(self._context.output_path),
            model_info=ModelInfo("medseg", self._exported.name, self._exported.version),
            name="write",
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, stack, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(stack, segment, {("image", "image")})
        self.add_flow(select, write, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(segment, write, {("pred", "seg_image")})

    def segment(self, name: str) -> SegmentDescription:
        """Return a label in the words of DICOM, the same as `medseg predict --format dicom-seg` uses."""
        term = segment_term(name)
        return SegmentDescription(
            segment_label=term.name,
            segmented_property_category=Code(*term.category),
            segmented_property_type=Code(*term.type),
            anatomic_regions=[Code(*term.region)] if term.region else None,
            algorithm_name=self._exported.name[:64],
            algorithm_version=self._exported.version,
        )


def main(arguments: list[str]) -> int:
    """Run the application with the options that all MONAI Deploy applications have; return the exit code."""
    # The SDK's notices name series and studies
    context = init_app_context(["app.py", "--log-level", "WARN", *arguments])
    os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "WARN")
    results = Path(context.output_path)
    before = set(results.glob("*.dcm"))
    try:
        exported = read_exported(Path(context.model_path))
        series = find_series(Path(context.input_path))
        SegmentationApp(context, exported, series).run()
    except MedsegError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    written = set(results.glob("*.dcm")) - before
    sys.stdout.write("".join(f"{path}\n" for path in sorted(written)))
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

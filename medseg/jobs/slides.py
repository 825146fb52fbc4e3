"""Prediction of whole-slide images with a bundle for color images, window by window.

The result is the outlines of the objects, as GeoJSON in pixels of the slide's finest level, and on request a label
image at the model's resolution. Slides are read and written in pieces, so that they never have to fit in memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import CaseError, MedsegError, RequestError
from medseg.io.names import mask_name
from medseg.transforms.traits import traits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from medseg.io.slides.geojson import GeoJSONWriter
    from medseg.io.slides.slide import Slide
    from medseg.types import Case

__all__ = ["SlidePredictor", "check_slides"]

_OUTPUTS = ("", "tiff")


def check_slides(slides: Sequence[Case], cases: Sequence[Case], config: Mapping[str, Any], output: Path) -> None:
    """Check the additional requirements of slides before the prediction, without heavy imports.

    Args:
        slides: Cases to predict as slides, at least one.
        cases: All cases of the run.
        config: Inference config of the bundle.
        output: Folder of the results.

    Raises:
        RequestError: Unknown resolution of the model, a mask format that slides do not support, or output that would
            overwrite a slide or another mask.
    """
    _check_resolution(slides[0].image, config)
    wanted = config.get("output_format") or ""
    if wanted not in _OUTPUTS:
        raise RequestError(
            f"Unsupported output format for the slide '{slides[0].image}': its label image is written as tiff, not as "
            f"{wanted!r}."
        )
    images = {Path(case.image).resolve(): case.image for case in cases}
    masks = {case.output: case.image for case in cases if case not in slides}
    for case in slides:
        label_image = _label_image(output / case.output)
        replaced = images.get(label_image.resolve())
        if replaced is not None:
            which = "the slide" if replaced == case.image else f"'{replaced}'"
            raise RequestError(f"The output for '{case.image}' would overwrite {which}: choose another folder.")
        shared = masks.get(label_image.relative_to(output).as_posix())
        if wanted and shared is not None:
            raise RequestError(
                f"{case.image} and {shared} would share the mask {label_image.name}: rename one of them."
            )


def _check_resolution(slide: str, config: Mapping[str, Any]) -> None:
    for setting in ("microns_per_pixel", "slide_microns_per_pixel"):
        value = config.get(setting)
        if value is not None and (isinstance(value, (bool, str)) or not 0 < value < float("inf")):
            raise RequestError(f"Invalid {setting}={value!r}: expected a resolution above 0, in µm/px.")
    if config.get("microns_per_pixel") is None:
        raise RequestError(
            f"Unknown resolution: '{slide}' is a slide, but the bundle does not state the resolution its model was "
            "trained at. Pass it with --mpp, in µm/px."
        )


class SlidePredictor:
    """Predicts slides with the components of a bundle for color images.

    Args:
        network: Trained network.
        inferer: A `medseg.components.SlidingWindowInferer`.
        preprocessing: A `Compose` of a loader followed by transforms that process each pixel independently.
        postprocessing: A `Compose` of a writer only.
        microns_per_pixel: Resolution the model was trained at, in µm per pixel; slides are read at this resolution.
        slide_microns_per_pixel: Resolution of the finest level of slides that do not state it, in µm per pixel.
        skip_glass: Whether to run only windows with tissue, according to `medseg.io.slides.tissue.find_tissue`.
        tiff_slides: Whether all TIFF files are slides (see `medseg.io.list_cases`).

    Raises:
        RequestError: A component that needs the whole image.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Any,
        *,
        preprocessing: Any,
        postprocessing: Any,
        microns_per_pixel: float | None = None,
        slide_microns_per_pixel: float | None = None,
        skip_glass: bool = True,
        tiff_slides: bool = False,
    ) -> None:
        self.network = network
        self.inferer = _checked_inferer(inferer)
        self.prepare = _per_pixel(preprocessing)
        _refuse_others(postprocessing)
        self.microns_per_pixel = microns_per_pixel
        self.slide_microns_per_pixel = slide_microns_per_pixel
        self.skip_glass = skip_glass
        self.tiff_slides = tiff_slides

    def __call__(self, image: str, polygons: Path, *, labels: Mapping[int, str], output_format: str = "") -> None:
        """Predict one slide; output files are written atomically.

        Args:
            image: Path of the slide.
            polygons: GeoJSON file to write.
            labels: Names of the classes by index.
            output_format: "tiff" to also write a label image next to the GeoJSON file; empty for none.

        Raises:
            CaseError: A file that is damaged or not a slide, or a resolution that is unknown or too coarse.
        """
        from medseg.machine import reuse_memory

        with _as_case(image), self._opened(image) as slide, reuse_memory():
            self.network.eval()
            self._write(slide, polygons, labels, output_format)

    @contextmanager
    def _opened(self, image: str) -> Iterator[Slide]:
        from medseg.io.slides.slide import open_slide

        try:
            slide = open_slide(
                image, microns_per_pixel=self.microns_per_pixel, default_mpp=self.slide_microns_per_pixel
            )
        except RequestError as error:  # of this slide only; the others continue
            raise CaseError(str(error)) from error
        except CaseError as error:
            if error.code != "no-resolution":
                raise
            raise CaseError(
                f"{image} {error.data['reason']}, so it cannot be read at {self.microns_per_pixel} µm/px. Pass --set "
                "slide_microns_per_pixel=X, the resolution of its finest level in µm/px.",
                code=error.code,
                path=error.path,
                **error.data,
            ) from error
        with slide:
            yield slide

    def _write(self, slide: Slide, polygons: Path, labels: Mapping[int, str], output_format: str) -> None:
        from medseg.inferers.slides import label_strips
        from medseg.io.slides.geojson import GeoJSONStyle, GeoJSONWriter
        from medseg.io.slides.tiff_pyramid import write_label_pyramid

        wanted = slide.tissue().touches if self.skip_glass else None
        strips = label_strips(slide, self.network, self.inferer, prepare=self.prepare, wanted=wanted)
        size = slide.shape[1], slide.shape[2]
        with GeoJSONWriter(polygons, GeoJSONStyle(labels=labels, scale=slide.scale)) as writer:
            passing = _outlined(strips, size[0], writer)
            if output_format == "tiff":
                write_label_pyramid(passing, _label_image(polygons), size, microns_per_pixel=slide.mpp)
            else:
                for _ in passing:
                    pass


def _outlined(strips: Iterable[Any], width: int, writer: GeoJSONWriter) -> Iterator[Any]:
    """Yield the strips, and write the objects that each of them completes."""
    from medseg.io.slides.components import ObjectMerger

    merger = ObjectMerger(width)
    for strip in strips:
        writer.add(merger.add(strip))
        yield strip
    writer.add(merger.finish())


def _label_image(polygons: Path) -> Path:
    return polygons.with_name(mask_name(polygons.name.removesuffix(".geojson"), "tiff"))


@contextmanager
def _as_case(image: str) -> Iterator[None]:
    """Convert any exception of a slide into a `CaseError` that names the slide."""
    try:
        yield
    except MedsegError:
        raise
    except Exception as error:
        raise CaseError(f"{image}: {type(error).__name__}: {error}") from error


def _checked_inferer(inferer: Any) -> Any:
    from medseg.inferers.sliding_window import SlidingWindowInferer

    if isinstance(inferer, SlidingWindowInferer):
        return inferer
    raise RequestError(
        f"Unsupported inferer for slides: the bundle has {type(inferer).__name__}, expected "
        "medseg.inferers.SlidingWindowInferer. Replace the inferer, or cut the slide into tiles."
    )


def _per_pixel(preprocessing: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the transforms after loading as a function of an image of shape (C, x, y).

    Raises:
        RequestError: A transform that does not process each pixel independently.
    """
    from monai.data import MetaTensor
    from monai.transforms import LoadImaged

    steps = [step for step in preprocessing.transforms if not isinstance(step, LoadImaged)]
    for step in steps:
        traits = traits_of(step)
        if traits is None or not traits.is_per_pixel(step):
            raise RequestError(
                f"Unsupported preprocessing for slides: {type(step).__name__} may need the whole image, but slides are "
                "read in pieces. Scale by constants (ScaleIntensityRanged), or cut the slide into tiles."
            )

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        data: dict[str, Any] = {"image": MetaTensor(pixels)}
        for step in steps:
            data = step(data)
        image: torch.Tensor = data["image"]
        return (image.as_tensor() if isinstance(image, MetaTensor) else image).float()

    return prepare


def _refuse_others(postprocessing: Any) -> None:
    from monai.transforms import SaveImaged

    for step in postprocessing.transforms:
        if not isinstance(step, SaveImaged):
            raise RequestError(
                f"Unsupported postprocessing for slides: {type(step).__name__} needs the whole mask, but slides are "
                "written in pieces. Remove it, or cut the slide into tiles."
            )

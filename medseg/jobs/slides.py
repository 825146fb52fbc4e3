"""Whole-slide images through a bundle for color pictures: its network, windows and intensities, on demand.

What a slide becomes is the outlines of its objects, as GeoJSON in pixels of the slide's finest level, and where asked
for a label image at the model's resolution. Nothing of the size of the slide is ever held.
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
    """Check before the work what slides need beyond other images; nothing heavy is imported.

    Args:
        slides: Cases to predict as slides, at least one.
        cases: All cases of the run.
        config: The bundle's inference config.
        output: Folder of the results.

    Raises:
        RequestError: The model's resolution is not known, masks are to have a format that slides do not get, or one
            would replace its slide.
    """
    _check_resolution(slides[0].image, config)
    wanted = config.get("output_format") or ""
    if wanted not in _OUTPUTS:
        raise RequestError(
            f"'{slides[0].image}' is a slide: its polygons may come with a label image as tiff, not as {wanted!r}"
        )
    images = {Path(case.image).resolve(): case.image for case in cases}
    masks = {case.output: case.image for case in cases if case not in slides}
    for case in slides:
        label_image = _label_image(output / case.output)
        replaced = images.get(label_image.resolve())
        if replaced is not None:
            which = "the slide" if replaced == case.image else f"'{replaced}'"
            raise RequestError(f"the results of '{case.image}' might replace {which}; choose another folder")
        shared = masks.get(label_image.relative_to(output).as_posix())
        if wanted and shared is not None:
            raise RequestError(f"{case.image} and {shared} would share the mask {label_image.name}: rename one.")


def _check_resolution(slide: str, config: Mapping[str, Any]) -> None:
    for knob in ("microns_per_pixel", "slide_microns_per_pixel"):
        value = config.get(knob)
        if value is not None and (isinstance(value, (bool, str)) or not 0 < value < float("inf")):
            raise RequestError(f"'{knob}' must be a resolution above 0 µm/px, found {value!r}")
    if config.get("microns_per_pixel") is None:
        raise RequestError(
            f"'{slide}' is a slide, and this bundle does not say at which resolution its model works: give --mpp, the "
            "resolution (µm/px) the model was trained at"
        )


class SlidePredictor:
    """Predicts slides with the parts that a bundle has for pictures.

    Args:
        network: with its weights.
        inferer: a `medseg.components.SlidingWindowInferer`.
        preprocessing: a `Compose` that loads, and then changes pixels one by one.
        postprocessing: a `Compose` that saves, and nothing else.
        microns_per_pixel: of the pictures that the model was trained on; slides are read at this resolution.
        slide_microns_per_pixel: of the finest level of slides that do not say it themselves.
        skip_glass: run only windows with tissue, as `medseg.io.slides.tissue.find_tissue` finds it.
        tiff_slides: whether all TIFF are slides (see `medseg.io.list_cases`).

    Raises:
        RequestError: a part that needs a picture as a whole.
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
        """Predict one slide; what is written is there when all of it is.

        Args:
            image: the slide.
            polygons: the GeoJSON file to write.
            labels: name of each class.
            output_format: "tiff" for a label image beside it, of the same name.

        Raises:
            CaseError: the slide is damaged, has no known or a much coarser resolution, or is none.
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
        except RequestError as error:  # about this slide; the next may have what is asked for
            raise CaseError(str(error)) from error
        except CaseError as error:
            if error.code != "no-resolution":
                raise
            raise CaseError(
                f"{image} {error.data['reason']}, so it cannot be read at {self.microns_per_pixel} µm/px: give --set "
                "slide_microns_per_pixel, the resolution of its finest level in µm/px.",
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
    """Pass strips on, and write the objects that they complete."""
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
    """Turn what goes wrong with one slide into an error of ours that names it."""
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
        f"slides need a medseg.inferers.SlidingWindowInferer, and the bundle has a {type(inferer).__name__}: cut the "
        "slide into pictures, or replace the inferer"
    )


def _per_pixel(preprocessing: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the steps after loading as a function of pixels `(C, x, y)`.

    Raises:
        RequestError: a step that looks at more than a pixel, by its name.
    """
    from monai.data import MetaTensor
    from monai.transforms import LoadImaged

    steps = [step for step in preprocessing.transforms if not isinstance(step, LoadImaged)]
    for step in steps:
        traits = traits_of(step)
        if traits is None or not traits.is_per_pixel(step):
            raise RequestError(
                f"the bundle's preprocessing has {type(step).__name__}, which may need a picture as a whole: slides "
                "are read in pieces. Scale by constants (ScaleIntensityRanged), or cut the slide into pictures"
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
                f"the bundle's postprocessing has {type(step).__name__}, which needs a mask as a whole: slides are "
                "written piece by piece. Leave it out, or cut the slide into pictures"
            )

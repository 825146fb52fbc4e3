"""Features of networks that do not give them: recorded by hooks while a block of code runs.

The taps have the names of `medseg.types.TrainingOutput`: `E1..En`, `B`, `Dn..D1`. The number is the level of
resolution, 1 the finest; a level where a network has no block of its own is left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from monai.networks.nets import BasicUNet, BasicUNetPlusPlus, DynUNet, SegResNet, SwinUNETR
from torch import Tensor, nn

from medseg.errors import RequestError, SizeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    Taps = Mapping[str, "str | Tap"]
    Blocks = dict[str, tuple["Tap", ...]]  # name -> its first layer, where it has two taps, and its last

__all__ = ["FeatureTaps", "Tap", "preset_taps"]


@dataclass(frozen=True)
class Tap:
    """Where a feature is recorded.

    Attributes:
        path: of the module within the network, as in `nn.Module.get_submodule`; its output is recorded.
        call: which call of that module within one forward pass, from 0; -1 is the last.
        channels_last: the output is `(B, *spatial, C)`; it is recorded as `(B, C, *spatial)`.
    """

    path: str
    call: int = -1
    channels_last: bool = False


class FeatureTaps:
    """Record the outputs of a network's modules while open.

    A context manager: hooks exist only between entering and leaving it, so the network itself stays as it was, to be
    saved, scripted and exported. A forward pass replaces the features of the one before.

    Args:
        network: whose modules.
        taps: name -> module path or `Tap`, in the order of computation; "auto" takes `preset_taps`.
        taps_per_block: 1 or 2, for "auto".

    Raises:
        RequestError: a path leads to no module, or "auto" does not know the network.
    """

    def __init__(self, network: nn.Module, taps: Taps | str = "auto", *, taps_per_block: int = 1) -> None:
        chosen = _chosen(network, taps, taps_per_block)
        self.network = network
        self.taps = {name: tap if isinstance(tap, Tap) else Tap(tap) for name, tap in chosen.items()}
        self._modules = {name: _module(network, name, tap.path) for name, tap in self.taps.items()}
        self._handles: list[RemovableHandle] = []
        self._calls: Counter[str] = Counter()
        self._recorded: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> FeatureTaps:
        self.close()
        self._handles = [self.network.register_forward_pre_hook(self._begin)]
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._record, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all hooks and forget the features."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    @property
    def features(self) -> dict[str, Tensor]:
        """The features `(B, C, *spatial)` of the latest forward pass by tap name, in the order of `taps`.

        Raises:
            RequestError: a module was not called since the taps were opened, or a later layer changed its output in
                place, so that the network's own value is lost.
        """
        features = {}
        for name, tap in self.taps.items():
            if name not in self._recorded:
                raise RequestError(
                    f"tap '{name}' recorded nothing: call {tap.call} of '{tap.path}' did not happen. Run the network "
                    "while the taps are open, and choose modules that it calls."
                )
            feature, version = self._recorded[name]
            if _version(feature) != version:
                raise RequestError(
                    f"tap '{name}': the output of '{tap.path}' was changed in place by a later layer; "
                    "tap that layer, or make it not in-place."
                )
            features[name] = feature.movedim(-1, 1) if tap.channels_last else feature
        return features

    def _begin(self, _network: nn.Module, _arguments: Any) -> None:
        self._forget()

    def _forget(self) -> None:
        self._calls.clear()
        self._recorded.clear()

    def _record(self, name: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        tap = self.taps[name]
        call = self._calls[name]
        self._calls[name] += 1
        if tap.call not in (-1, call):
            return
        if not isinstance(output, Tensor) or output.dim() < 4:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise SizeError(f"tap '{name}': '{tap.path}' gave {found}; tap a module that gives (B, C, *spatial).")
        self._recorded[name] = (output, _version(output))


def preset_taps(network: nn.Module, taps_per_block: int = 1) -> dict[str, Tap]:
    """Return the taps of one of MONAI's BasicUNet, BasicUNetPlusPlus, DynUNet, SegResNet, SwinUNETR.

    Args:
        network: an instance of one of them, or of a subclass.
        taps_per_block: 1, the output of each block; 2, that of its first and of its last layer, named with `_0` and
            `_1`. The last decoder block `D1` always has one. The encoder of SwinUNETR is its transformer, not the
            convolutions on the way of its skips.

    Raises:
        RequestError: the network has no preset.
    """
    if taps_per_block not in (1, 2):
        raise RequestError(f"taps_per_block={taps_per_block}: a block is tapped 1 or 2 times.")
    for kind, blocks in PRESETS.items():
        if isinstance(network, kind):
            return _named(blocks(network, taps_per_block), taps_per_block)
    raise RequestError(
        f"{type(network).__name__} has no preset taps, only {', '.join(kind.__name__ for kind in PRESETS)}; "
        'say which modules to tap, from the image down and up again: taps={"E1": "path.of.module", ...}.'
    )


def _named(blocks: Blocks, taps_per_block: int) -> dict[str, Tap]:
    named = {}
    for name, layers in blocks.items():
        if taps_per_block == 1 or name == "D1":
            named[name] = layers[-1]
        else:
            named |= {f"{name}_0": layers[0], f"{name}_1": layers[-1]}
    return named


def _levels(encoder: Sequence[str], decoder: Sequence[str]) -> dict[str, str]:
    """Name blocks by level: encoder from the finest to the bottleneck, decoder from the coarsest to the finest."""
    names = [f"E{level + 1}" for level in range(len(encoder) - 1)] + ["B"]
    names += [f"D{len(decoder) - level}" for level in range(len(decoder))]
    return dict(zip(names, [*encoder, *decoder], strict=True))


def _blocks(paths: Mapping[str, str], first: Callable[[str], Tap]) -> Blocks:
    return {name: (first(path), Tap(path)) for name, path in paths.items()}


def _basic_unet(_network: nn.Module, _taps_per_block: int) -> Blocks:
    paths = _levels(
        ["conv_0", "down_1", "down_2", "down_3", "down_4"],
        ["upcat_4", "upcat_3", "upcat_2", "upcat_1"],
    )
    return _blocks(paths, _first_of_two_convs)


def _basic_unet_plus_plus(_network: nn.Module, _taps_per_block: int) -> Blocks:
    paths = _levels(
        ["conv_0_0", "conv_1_0", "conv_2_0", "conv_3_0", "conv_4_0"],
        ["upcat_3_1", "upcat_2_2", "upcat_1_3", "upcat_0_4"],
    )
    return _blocks(paths, _first_of_two_convs)


def _first_of_two_convs(path: str) -> Tap:
    return Tap(f"{path}.conv_0" if path in ("conv_0", "conv_0_0") else f"{path}.convs.conv_0")


def _dyn_unet(network: Any, _taps_per_block: int) -> Blocks:
    encoder = ["input_block", *_items("downsamples", network.downsamples), "bottleneck"]
    return _blocks(_levels(encoder, _items("upsamples", network.upsamples)), _first_activation)


def _first_activation(path: str) -> Tap:
    """A block of DynUNet and SwinUNETR calls one activation module after each of its two convolutions."""
    if path.startswith(("upsamples", "decoder")):
        path = f"{path}.conv_block"
    elif path.startswith("encoder"):
        path = f"{path}.layer"
    return Tap(f"{path}.lrelu", call=0)


def _seg_res_net(network: Any, _taps_per_block: int) -> Blocks:
    paths = _levels(_items("down_layers", network.down_layers), _items("up_layers", network.up_layers))
    # An encoder level starts with its down-sampling, a decoder level with its first block.
    return _blocks(paths, lambda path: Tap(f"{path}.{int(path.startswith('down'))}"))


def _swin_unetr(network: Any, taps_per_block: int) -> Blocks:
    if taps_per_block == 1:
        # The output of a stage comes after the merging of patches, one level down.
        stages = {"E3": 1, "E4": 2, "E5": 3, "B": 4}
        encoder: Blocks = {name: (Tap(f"swinViT.layers{stage}.0"),) for name, stage in stages.items()}
    else:
        encoder = {f"E{stage + 1}": _transformers(network, f"swinViT.layers{stage}.0.blocks") for stage in (1, 2, 3, 4)}
    decoder = {f"D{level}": f"decoder{level}" for level in (5, 4, 3, 2, 1)}
    return {**_blocks({"E1": "encoder1"}, _first_activation), **encoder, **_blocks(decoder, _first_activation)}


def _transformers(network: nn.Module, path: str) -> tuple[Tap, Tap]:
    """First and last transformer layer of a stage, before the merging."""
    layers = _items(path, network.get_submodule(path).children())
    return Tap(layers[0], channels_last=True), Tap(layers[-1], channels_last=True)


def _items(path: str, modules: Iterable[nn.Module]) -> list[str]:
    return [f"{path}.{index}" for index, _ in enumerate(modules)]


PRESETS: dict[type[nn.Module], Callable[[Any, int], Blocks]] = {
    BasicUNet: _basic_unet,
    BasicUNetPlusPlus: _basic_unet_plus_plus,
    DynUNet: _dyn_unet,
    SegResNet: _seg_res_net,
    SwinUNETR: _swin_unetr,
}


def _chosen(network: nn.Module, taps: Taps | str, taps_per_block: int) -> Taps:
    if not isinstance(taps, str):
        return taps
    if taps != "auto":
        raise RequestError(f'taps="{taps}" is not known; give "auto", or names with the paths of modules.')
    return preset_taps(network, taps_per_block)


def _module(network: nn.Module, name: str, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        parts = ", ".join(name for name, _ in network.named_children())
        raise RequestError(
            f"tap '{name}': {type(network).__name__} has no module '{path}'; its parts are {parts}."
        ) from None


def _version(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version

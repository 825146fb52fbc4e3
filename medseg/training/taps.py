"""Feature taps: forward hooks that record intermediate features of networks that do not return them.

The taps have the names of `medseg.types.TrainingOutput`: `E1..En`, `B`, `Dn..D1`. The number is the resolution level,
1 is the finest; levels without a block are omitted.
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
    Blocks = dict[str, tuple["Tap", ...]]  # name -> last layer, or first and last layer

__all__ = ["FeatureTaps", "Tap", "preset_taps"]


@dataclass(frozen=True)
class Tap:
    """Module whose output is recorded as a feature.

    Attributes:
        path: Path of the module within the network, as in `nn.Module.get_submodule`.
        call: Index of the call of the module within one forward pass, from 0; -1 is the last call.
        channels_last: Whether the output is `(B, *spatial, C)`; it is returned as `(B, C, *spatial)`.
    """

    path: str
    call: int = -1
    channels_last: bool = False


class FeatureTaps:
    """Context manager that records the outputs of a network's modules.

    Hooks are registered on entering and removed on exit, so the network can be saved, scripted and exported as usual.
    Each forward pass replaces the features of the previous one.

    Args:
        network: Network with the tapped modules.
        taps: Module path or `Tap` by name, in order of computation; "auto" uses `preset_taps`.
        taps_per_block: Taps per block, 1 or 2, for "auto".

    Raises:
        RequestError: No module with the given path, or no preset for the network.
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
        """Remove all hooks and discard the features."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    @property
    def features(self) -> dict[str, Tensor]:
        """Features `(B, C, *spatial)` of the latest forward pass by tap name, in the order of `taps`.

        Raises:
            RequestError: A module was not called since the taps were opened, or a later layer modified its output in
                place.
        """
        features = {}
        for name, tap in self.taps.items():
            if name not in self._recorded:
                raise RequestError(
                    f"tap '{name}' recorded nothing: call {tap.call} of '{tap.path}' did not occur. Run the network "
                    "while the taps are open, and tap modules that it calls."
                )
            feature, version = self._recorded[name]
            if _version(feature) != version:
                raise RequestError(
                    f"tap '{name}': the output of '{tap.path}' was modified in place by a later layer; "
                    "tap that layer, or set inplace=False."
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
            raise SizeError(f"tap '{name}': '{tap.path}' returned {found}, expected a tensor (B, C, *spatial).")
        self._recorded[name] = (output, _version(output))


def preset_taps(network: nn.Module, taps_per_block: int = 1) -> dict[str, Tap]:
    """Return the taps of MONAI's BasicUNet, BasicUNetPlusPlus, DynUNet, SegResNet or SwinUNETR.

    Args:
        network: Instance of one of these networks or of a subclass.
        taps_per_block: 1 taps the output of each block; 2 taps its first and its last layer, with the suffixes `_0` and
            `_1`. The last decoder block `D1` always has one tap. The encoder of SwinUNETR is its transformer, not the
            convolutions in its skip connections.

    Raises:
        RequestError: No preset for the network, or a number of taps other than 1 or 2.
    """
    if taps_per_block not in (1, 2):
        raise RequestError(f"taps_per_block={taps_per_block}: expected 1 or 2.")
    for kind, blocks in PRESETS.items():
        if isinstance(network, kind):
            return _named(blocks(network, taps_per_block), taps_per_block)
    raise RequestError(
        f"no preset taps for {type(network).__name__}, only for {', '.join(kind.__name__ for kind in PRESETS)}; "
        'list the modules to tap from encoder to decoder: taps={"E1": "path.of.module", ...}.'
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
    """Name blocks by level: encoder from finest to bottleneck, decoder from coarsest to finest."""
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
    """Return the first call of the activation, which DynUNet and SwinUNETR share between two convolutions."""
    if path.startswith(("upsamples", "decoder")):
        path = f"{path}.conv_block"
    elif path.startswith("encoder"):
        path = f"{path}.layer"
    return Tap(f"{path}.lrelu", call=0)


def _seg_res_net(network: Any, _taps_per_block: int) -> Blocks:
    paths = _levels(_items("down_layers", network.down_layers), _items("up_layers", network.up_layers))
    # An encoder level starts with its downsampling, a decoder level with its first block.
    return _blocks(paths, lambda path: Tap(f"{path}.{int(path.startswith('down'))}"))


def _swin_unetr(network: Any, taps_per_block: int) -> Blocks:
    if taps_per_block == 1:
        # A stage returns its output after patch merging, one level deeper.
        stages = {"E3": 1, "E4": 2, "E5": 3, "B": 4}
        encoder: Blocks = {name: (Tap(f"swinViT.layers{stage}.0"),) for name, stage in stages.items()}
    else:
        encoder = {f"E{stage + 1}": _transformers(network, f"swinViT.layers{stage}.0.blocks") for stage in (1, 2, 3, 4)}
    decoder = {f"D{level}": f"decoder{level}" for level in (5, 4, 3, 2, 1)}
    return {**_blocks({"E1": "encoder1"}, _first_activation), **encoder, **_blocks(decoder, _first_activation)}


def _transformers(network: nn.Module, path: str) -> tuple[Tap, Tap]:
    """Return the first and the last transformer layer of a stage, before patch merging."""
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
        raise RequestError(f'invalid taps="{taps}"; expected "auto" or module paths by name.')
    return preset_taps(network, taps_per_block)


def _module(network: nn.Module, name: str, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        parts = ", ".join(name for name, _ in network.named_children())
        raise RequestError(
            f"tap '{name}': {type(network).__name__} has no module '{path}'; its modules are {parts}."
        ) from None


def _version(tensor: Tensor) -> int:
    """Return the number of in-place modifications; 0 for inference tensors, which do not track them."""
    return 0 if tensor.is_inference() else tensor._version

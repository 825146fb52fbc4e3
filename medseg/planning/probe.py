"""Probe: measure a few training steps and one validation window of a planned bundle, in a separate process.

Everything measured is built from the bundle's train config, so that the measurement matches the training. A separate
process starts with clean memory, and if it is killed for lack of memory, the plan is known not to fit.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import RequestError, in_a_line, out_of_memory, own_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Measurement", "measure"]

_WARM = 1
_TIMED = 5
_DRAWS = 12
_LIMIT_SECONDS = 1800
_KILLED = 137


@dataclass(frozen=True)
class Measurement:
    """Measurements of a probe; times are in seconds and memory is in bytes.

    Attributes:
        device: Device, "cpu" or the name of the GPU.
        threads: Number of threads of torch.
        step_seconds: Time of a training step without its data, by precision.
        draw_seconds: Time to crop and augment one training patch of a cached case.
        load_seconds: Time to load and prepare one case.
        window_seconds: Time of one window of validation.
        step_bytes: Increase of the device memory by the training steps.
        program_bytes: Memory of the process before the first step, with libraries and one case.
        workers: Number of worker processes that load and augment during the steps.
        busy: Wall time of the steps divided by that on idle cores; well above 1 if other programs use the CPU.
        fits: Whether the process finished; False if it ran out of memory, in which case the other figures are 0.
    """

    device: str
    threads: int
    step_seconds: dict[str, float]
    draw_seconds: float
    load_seconds: float
    window_seconds: float
    step_bytes: int
    program_bytes: int
    workers: int = 0
    busy: float = 1.0
    fits: bool = True

    @property
    def precision(self) -> str:
        """Precision to train in: bfloat16 if it saves at least a fifth of the time, otherwise float32."""
        plain = self.step_seconds.get("float32", math.inf)
        half = self.step_seconds.get("bfloat16", math.inf)
        return "bfloat16" if half < 0.8 * plain else "float32"


def measure(config: Mapping[str, Any], case: Mapping[str, str]) -> Measurement:
    """Measure a train config on one case.

    Args:
        config: Content of a `configs/train.json`.
        case: Image, label and name of a typical case.

    Raises:
        RequestError: The config fails to run, or a step takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        task.write_text(json.dumps({"config": config, "case": case, "folder": folder}), encoding="utf-8")
        try:
            done = subprocess.run(  # noqa: S603 - this module, run by the current interpreter
                [sys.executable, "-m", "medseg.planning.probe", str(task), str(answer)],
                capture_output=True,
                text=True,
                timeout=_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RequestError(
                f"The measurement of the planned network took more than {_LIMIT_SECONDS // 60} minutes and was "
                "stopped. Lower --memory or set a --budget for a smaller network."
            ) from error
        if answer.is_file():
            content = json.loads(answer.read_text(encoding="utf-8"))
            if "error" in content:
                raise RequestError(f"A training step of the planned bundle failed: {content['error']}")
            return Measurement(**content)
    if done.returncode in (-9, _KILLED):
        return Measurement("", 0, {}, 0.0, 0.0, 0.0, 0, 0, fits=False)
    last = (done.stderr.strip().splitlines() or ["no error output"])[-1]
    raise RequestError(f"The measurement of the planned bundle failed with exit code {done.returncode}: {last}")


def _probe(task: Mapping[str, Any]) -> Measurement:
    """Take the measurements, in the separate process."""
    import torch
    from monai.bundle import ConfigParser

    from medseg.machine import resident_bytes

    def parsed(**changes: Any) -> Any:
        config = json.loads(json.dumps(task["config"]))
        config["train"]["dataset"]["data"] = [dict(task["case"])]
        config |= {
            "bundle_root": task["folder"],
            "output_dir": task["folder"],
            "cache_memory": "auto",
            "num_workers": 0,
        }
        parser = ConfigParser({**config, **changes})
        parser.parse()
        return parser

    torch.manual_seed(0)
    parser = parsed()
    dataset = parser.get_parsed_content("train::dataset")
    # Readers are imported with the first case, so the second one is timed.
    again = parsed()
    start = time.perf_counter()
    again.get_parsed_content("train::dataset")
    load = time.perf_counter() - start
    samples = _drawn(dataset, 0)
    start = time.perf_counter()
    draws = max(2, math.ceil(_DRAWS / len(samples)))
    drawn = [sample for epoch in range(draws) for sample in _drawn(dataset, epoch)]
    draw = (time.perf_counter() - start) / len(drawn)
    batch = _collated(drawn, int(task["config"]["batch_size"]) * len(samples))
    device = parser.get_parsed_content("device")
    program = resident_bytes()
    steps, peak = {}, 0
    wall, processor = time.perf_counter(), time.process_time()
    for precision in _precisions(device):
        steps[precision], used = _time_steps(parsed(precision=precision), batch, device)
        peak = max(peak, used)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    busy = wall * torch.get_num_threads() / max(processor, 1e-6) if device.type == "cpu" else 1.0
    window = _time_window(parser, batch, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    workers = int(task["config"].get("num_workers", 0))
    return Measurement(name, torch.get_num_threads(), steps, draw, load, window, peak, program, workers, busy)


def _drawn(dataset: Any, epoch: int) -> list[Any]:
    """Return the patches of the case in one epoch; each epoch crops others."""
    from medseg.training.dataset import SeededDataset

    sample = dataset[(epoch, 0) if isinstance(dataset, SeededDataset) else 0]
    return list(sample) if isinstance(sample, list) else [sample]


def _collated(drawn: Sequence[Any], count: int) -> Any:
    from monai.data import list_data_collate

    return list_data_collate([drawn[number % len(drawn)] for number in range(count)])


def _precisions(device: Any) -> tuple[str, ...]:
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return ("float32",)
    return ("float32", "bfloat16")


def _time_steps(parser: Any, batch: Any, device: Any) -> tuple[float, int]:
    """Return the time of a training step in seconds, and the increase of the memory in bytes."""
    import torch

    from medseg.inferers.window_runner import NetworkProbe

    watch = NetworkProbe()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    network = parser.get_parsed_content("training_network").train()
    loss_function, optimizer = parser.get_parsed_content("loss"), parser.get_parsed_content("optimizer")
    image, label = batch["image"].to(device), batch["label"].to(device)
    seconds = []
    for _ in range(_WARM + _TIMED):
        start = _now(device)
        optimizer.zero_grad()
        loss = loss_function(network(image), label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        seconds.append(_now(device) - start)
    if not bool(torch.isfinite(loss)):
        raise RequestError(
            f"The loss of the first training steps is not finite ({float(loss.detach())}). Check the intensities of "
            "the data set with `medseg doctor`."
        )
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else watch.used()
    return min(seconds[_WARM:]), int(used)


def _time_window(parser: Any, batch: Any, device: Any) -> float:
    """Return the time in seconds of the config's validation inferer on an image of one window."""
    import torch

    size = [int(n) for n in parser.get_parsed_content("roi_size")]
    network = parser.get_parsed_content("network").eval()
    inferer = parser.get_parsed_content("validate::inferer")
    image = torch.zeros(1, batch["image"].shape[1], *size, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(1 + _WARM):
            start = _now(device)
            inferer(image, network)
            seconds.append(_now(device) - start)
    return min(seconds)


def _now(device: Any) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def _main() -> int:
    task_file, answer_file = map(Path, sys.argv[1:3])
    task = json.loads(task_file.read_text(encoding="utf-8"))
    try:
        content = asdict(_probe(task))
    except Exception as error:  # of any kind: the parent process reports it in one line
        if out_of_memory(error):
            return _KILLED
        content = {"error": str(own_error(error) or in_a_line(error))}
    answer_file.write_text(json.dumps(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())

"""Runs nnU-Net's training or prediction with its environment's Python: `python nnunet_tool.py train|predict ARGUMENTS`.

Either looks for the trainer's class by importing every trainer that nnU-Net has. The one of its Primus transformer
needs the compiled operators of torchvision, of which the package index has no CPU build; nothing else here needs them.
"""

import sys
from unittest import mock

from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run.run_training import run_training_entry

if __name__ == "__main__":
    sys.modules["dynamic_network_architectures.architectures.primus"] = mock.MagicMock()
    job = sys.argv.pop(1)
    {"train": run_training_entry, "predict": predict_entry_point}[job]()

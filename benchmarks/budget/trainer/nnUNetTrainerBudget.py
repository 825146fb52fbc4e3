"""nnU-Net's trainer with a budget of CPU time instead of 1,000 epochs.

nnU-Net finds the class by the environment variable `nnUNet_extTrainer`. Everything but the length is its own: network,
loss, augmentation, optimizer; the polynomial decay of its learning rate runs over the budget instead of the epochs.
"""

import json
import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerBudget(nnUNetTrainer):  # noqa: N801  # nnU-Net's own style
    """Train for `BUDGET_CPU_SECONDS` of CPU time with the seed `BUDGET_SEED`."""

    # The base class looks up its arguments by these names.
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.budget = float(os.environ["BUDGET_CPU_SECONDS"])
        torch.manual_seed(int(os.environ["BUDGET_SEED"]))
        # Short epochs: the learning rate follows the budget, and nnU-Net's validation takes little of it.
        self.num_iterations_per_epoch = 10
        self.num_val_iterations_per_epoch = 1
        self.num_epochs = 10**6
        self.save_every = 10**6
        self.iterations = 0

    def on_train_epoch_start(self):
        """Set the learning rate for the remaining budget."""
        super().on_train_epoch_start()
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * max(1 - self.used() / self.budget, 0) ** 0.9

    def on_epoch_end(self):
        """Count the step, and stop at the end of the budget."""
        self.iterations += self.num_iterations_per_epoch
        super().on_epoch_end()
        if self.used() >= self.budget:
            self.num_epochs = self.current_epoch

    def run_training(self):
        """Run nnU-Net's epochs until the budget ends."""
        self.on_train_start()
        while self.current_epoch < self.num_epochs:
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(steps)
            with torch.no_grad():
                self.on_validation_epoch_start()
                steps = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
                self.on_validation_epoch_end(steps)
            self.on_epoch_end()
        facts = {
            "iterations": self.iterations,
            "batch_size": self.batch_size,
            "cpu_s": self.used(),
            "precision": "float32",
        }
        Path(self.output_folder, "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities=False):
        """Skip the final validation: masks are predicted afterwards without mirroring, as of all contestants."""

    @staticmethod
    def used():
        """Return the CPU time of this process, which has no workers."""
        times = os.times()
        return times.user + times.system

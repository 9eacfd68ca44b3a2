"""The arguments that the trainers of all stages get."""

import pytest
import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from align.recipe import Sft
from pipelines.trainer_log import training_arguments

SECTION = Sft(lr=1e-3, batch_size=8, micro_batch_size=4)


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_two_visible_gpus_change_no_batch(monkeypatch, tmp_path, kind):
    # What transformers does then: it counts them, and multiplies the batch by their number.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "bf16": False}
    assert kind(**settings).train_batch_size == 8
    arguments = training_arguments(kind, SECTION, tmp_path, steps=3, seed=0, use_cpu=False)
    assert arguments.n_gpu == 1
    assert (arguments.train_batch_size, arguments.gradient_accumulation_steps) == (4, 2)


def test_there_is_no_gpu_where_none_is(tmp_path):
    assert training_arguments(TrainingArguments, SECTION, tmp_path, steps=3, seed=0).n_gpu == 0

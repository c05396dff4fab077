# pyright: reportPrivateImportUsage=false
"""Fine-tunes a mixture of experts on a JSONL of messages by TRL's SFTTrainer; a second start resumes:

torchrun --nproc-per-node 4 docs/examples/train_by_trl.py MODEL chats.jsonl OUT
"""

import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

from moe_dist.hf.ep.resume import ExactResume  # also registers ep_implementation="moe_dist"
from moe_dist.monitor.attached.trainer import RecordRouting

folder, chats, out = sys.argv[1:]
ranks = int(os.environ["WORLD_SIZE"])


class ResumableTrainer(ExactResume, SFTTrainer): ...  # saves and loads the optimizer of sharded experts


parallel = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="moe_dist")
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel)
on_cpu = not torch.cuda.is_available()
arguments = SFTConfig(
    out,
    max_steps=6,
    save_steps=2,
    logging_steps=1,
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    max_length=512,
    use_cpu=on_cpu,
    bf16=not on_cpu,
    report_to="tensorboard",
)
trainer = ResumableTrainer(
    model,
    arguments,
    train_dataset=load_dataset("json", data_files=chats, split="train"),
    processing_class=AutoTokenizer.from_pretrained(folder),
    callbacks=[RecordRouting(pictures_every=2)],  # OUT/routing: records, heat maps, traces
)
# Trainer writes trainer_state.json last, so a checkpoint with this file is whole.
saved = [each.parent for each in Path(out).glob("checkpoint-*/trainer_state.json")]
last = max(saved, key=lambda each: int(each.name.removeprefix("checkpoint-")), default=None)
trainer.train(resume_from_checkpoint=last and str(last))
trainer.save_model(out)
